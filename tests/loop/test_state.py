"""A run that is saved, loaded into new objects and continued equals the uninterrupted one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from balancing import (
    ANCHORED,
    COMBINED,
    IN_FORWARD,
    MONITORING,
    SHUFFLING,
    STATEFUL,
    STEPPING,
    TWO_GRADIENTS,
    arguments,
)
from ranks import ranks
from soak import KINDS, ON_UPDATE, Network, Training, batch, differences
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mmfuse

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)

ALL = [*(kind for kind in KINDS if kind != "OGM"), *(kinds.split(" + ")[0] for kinds in COMBINED)]
HALF, END = 10, 20
# Two ranks with one batch of 2^k rows: a mean over the ranks divides by a power of two, exactly.
ROWS = 8


def parts(kind: str) -> set[str]:
    """The methods that act together."""
    return set(kind.removesuffix(ON_UPDATE).split(" + "))


ON_BOUNDARY, WITHIN = 5, 4  # steps of an epoch: the tenth step is the last of one, or not


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The ranks have one thread each: PyTorch's sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(
    kind: str, seed: int = 0, anchor_dtype: torch.dtype | None = None, ddp: bool = False
) -> Training:
    torch.manual_seed(seed)
    network = Network()
    wrapped = DistributedDataParallel(network) if ddp else None
    return Training([kind], network, wrapped, anchor_dtype)


def whole(value: Any) -> Any:
    """Copies of all tensors, unsharded, in the same containers."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(item) for item in value]
    if not isinstance(value, Tensor):
        return value
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().clone()


def train(
    training: Training, first: int, end: int, *, per_epoch: int = WITHIN, micro: int = 1
) -> list[Any]:
    """Steps `first` to `end` of a run; what the methods have said in each."""
    (kind,) = training.methods
    said = []
    for step in range(first, end):
        if step % per_epoch == 0:
            training.begin_epoch(kind, step // per_epoch)
        batches = [batch(micro * step + i, 0, ROWS) for i in range(micro)]
        said.append(whole(training.step(kind, batches)))
    if kind in IN_FORWARD:  # in training nothing depends on ARM's average
        (method,) = training.methods[kind].values()
        features = {"audio": torch.ones(1, 1), "visual": torch.ones(1, 1)}
        said.append(whole(method.eval()(features)))
        method.train()
    return said


def save(training: Training, path: Path, how: str) -> None:
    if how == "torch":
        torch.save(training.state_dict(), path)
    else:
        dcp.save(objects(training), checkpoint_id=path)


def load(training: Training, path: Path, how: str) -> None:
    if how == "torch":
        training.load_state_dict(torch.load(path, weights_only=True))
        return
    state = objects(training)
    dcp.load(state, checkpoint_id=path)
    (optimizer,) = training.optimizers.values()
    set_state_dict(
        training.network,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def objects(training: Training) -> dict[str, Any]:
    """The objects that DCP saves and loads; the methods are stateful objects by its protocol."""
    (optimizer,) = training.optimizers.values()
    model_state, optimizer_state = get_state_dict(training.network, optimizer)
    (methods,) = training.methods.values()
    return {"model": model_state, "optimizer": optimizer_state, **methods}


@pytest.mark.parametrize("how", ["torch", "dcp"])
@pytest.mark.parametrize("per_epoch", [pytest.param(ON_BOUNDARY, marks=pytest.mark.slow), WITHIN])
@pytest.mark.parametrize("kind", ALL)
def test_a_resumed_run_goes_on_bit_for_bit(
    kind: str, per_epoch: int, how: str, tmp_path: Path
) -> None:
    straight = made(kind)
    train(straight, 0, HALF, per_epoch=per_epoch)
    save(straight, tmp_path / "saved", how)
    expected = train(straight, HALF, END, per_epoch=per_epoch)

    resumed = made(kind, seed=1)
    assert differences(resumed.state_dict()["network"], straight.state_dict()["network"])
    load(resumed, tmp_path / "saved", how)
    said = train(resumed, HALF, END, per_epoch=per_epoch)
    assert differences(said, expected) == []
    assert differences(resumed.state_dict(), straight.state_dict()) == []


@pytest.mark.parametrize("kind", ALL)
def test_with_gradient_accumulation(kind: str, tmp_path: Path) -> None:
    straight = made(kind)
    train(straight, 0, HALF, micro=2)
    save(straight, tmp_path / "saved", "torch")
    expected = train(straight, HALF, END, micro=2)
    resumed = made(kind, seed=1)
    load(resumed, tmp_path / "saved", "torch")
    assert differences(train(resumed, HALF, END, micro=2), expected) == []
    assert differences(resumed.state_dict(), straight.state_dict()) == []


@pytest.mark.parametrize("how", ["torch", "dcp"])
@pytest.mark.parametrize("kind", ANCHORED)
def test_anchors_of_bfloat16(kind: str, how: str, tmp_path: Path) -> None:
    straight = made(kind, anchor_dtype=torch.bfloat16)
    train(straight, 0, HALF)
    save(straight, tmp_path / "saved", how)
    expected = train(straight, HALF, END)
    resumed = made(kind, seed=1, anchor_dtype=torch.bfloat16)
    load(resumed, tmp_path / "saved", how)
    anchors = resumed.methods[kind][kind].anchors.tensors
    assert {anchor.dtype for anchor in anchors} == {torch.bfloat16}
    assert differences(train(resumed, HALF, END), expected) == []
    assert differences(resumed.state_dict(), straight.state_dict()) == []


def remembers(kind: str) -> bool:
    """True if a step within an epoch leaves something in the state."""
    training = made(kind)
    train(training, 0, WITHIN + 1)  # into the epoch in which methods begin
    before = whole(training.state_dict()["methods"])
    train(training, WITHIN + 1, WITHIN + 2)
    return bool(differences(training.state_dict()["methods"], before))


@pytest.mark.parametrize("kind", [k for k in ALL if parts(k) & {*STATEFUL, *IN_FORWARD}])
def test_it_is_the_state_of_the_method_that_makes_the_difference(kind: str) -> None:
    """The runs above would notice a method whose state is not loaded.

    But for one whose state goes by the epoch, or is given to it, as prototypes are here.
    """
    straight, resumed = made(kind), made(kind, seed=1)
    train(straight, 0, HALF, per_epoch=ON_BOUNDARY)
    state = copy.deepcopy(straight.state_dict())
    expected = train(straight, HALF, END, per_epoch=ON_BOUNDARY)
    state["methods"] = resumed.state_dict()["methods"]
    resumed.load_state_dict(state)
    # ARL keeps the last step's weights for its release alone (tests/methods/test_arl.py).
    matters = remembers(kind) and kind != "ARL"
    assert matters or kind in IN_FORWARD
    found = train(resumed, HALF, END, per_epoch=ON_BOUNDARY)
    assert bool(differences(found, expected)) == matters
    ours, theirs = resumed.state_dict(), straight.state_dict()
    # In training ARM uses nothing of what it has seen before: its average is for `eval()`.
    alike = kind == "ARM" or not matters
    assert bool(differences(ours["network"], theirs["network"])) == (not alike)


def go_on(rank: int, kind: str, path: Path, how: str) -> tuple[Any, Any, Any]:
    training = made(kind, seed=10 + rank, ddp=True)
    load(training, path, how)
    loaded = whole(training.state_dict())
    said = train(training, HALF, END)
    return loaded, said, whole(training.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torch", "dcp"])
@pytest.mark.parametrize("kind", ALL)
def test_from_one_rank_to_two(kind: str, how: str, tmp_path: Path) -> None:
    alone = made(kind)
    train(alone, 0, HALF)
    save(alone, tmp_path / "saved", how)
    saved = whole(alone.state_dict())
    expected = train(alone, HALF, END)

    together = ranks(2).run(go_on, kind, tmp_path / "saved", how)
    for loaded, _, _ in together:
        assert differences(loaded, saved) == []
    (_, first_said, first), (_, second_said, second) = together
    assert differences(first, second) == []
    # Every sample of the whole batch has its own mask, or each rank's part is permuted.
    if parts(kind) & {*SHUFFLING}:
        assert differences(first_said, second_said)
    elif kind in (*MONITORING, *TWO_GRADIENTS):
        # And its own views; their mean is the same everywhere. With DDP the joint gradient is
        # a difference, which rounds.
        assert differences(first_said, second_said) == []
    else:
        assert differences(first_said, expected) == []
        assert differences(first, alone.state_dict()) == []


def sharded(kind: str, seed: int, size: int, anchor_dtype: torch.dtype | None) -> Training:
    torch.manual_seed(seed)
    network = Network()
    mesh = init_device_mesh("cpu", (size,))
    for part in (network.audio_net, network.visual_net, network):
        fully_shard(part, mesh=mesh)
    return Training([kind], network, None, anchor_dtype)


def load_sharded(
    rank: int, kind: str, path: Path, anchor_dtype: torch.dtype | None
) -> tuple[Any, list[int], list[Any]]:
    training = sharded(kind, 10 + rank, 2, anchor_dtype)
    load(training, path, "dcp")
    method = training.methods[kind][kind]
    held = [anchor.numel() for anchor in method.anchors.tensors]
    state = whole(training.state_dict())
    return state, held, train(training, HALF, END)


@pytest.mark.slow
@pytest.mark.parametrize("anchor_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ANCHORED)
def test_anchors_of_one_process_are_spread_over_two(
    kind: str, anchor_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    alone = made(kind, anchor_dtype=anchor_dtype)
    train(alone, 0, HALF)
    save(alone, tmp_path / "saved", "dcp")
    together = ranks(2).run(load_sharded, kind, tmp_path / "saved", anchor_dtype)
    held = [sum(parts) for _, parts, _ in together]
    everything = sum(p.numel() for p in alone.methods[kind][kind].modalities.parameters)
    assert sum(held) == everything and all(part < everything for part in held)
    for state, _, _ in together:
        assert differences(state, alone.state_dict()) == []
    assert differences(together[0][2][-1][1:], together[1][2][-1][1:]) == []


def save_sharded(
    rank: int, kind: str, path: Path, anchor_dtype: torch.dtype | None
) -> tuple[Any, Any]:
    training = sharded(kind, 0, 2, anchor_dtype)
    train(training, 0, HALF)
    save(training, path, "dcp")
    saved = whole(training.state_dict())
    train(training, HALF, END)
    return saved, whole(training.state_dict())


def resume_sharded(
    rank: int, kind: str, path: Path, anchor_dtype: torch.dtype | None
) -> tuple[Any, Any]:
    training = sharded(kind, 10, 2, anchor_dtype)
    load(training, path, "dcp")
    loaded = whole(training.state_dict())
    train(training, HALF, END)
    return loaded, whole(training.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("anchor_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ANCHORED)
def test_anchors_of_two_shards_are_loaded_by_two_and_by_one(
    kind: str, anchor_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    written = ranks(2).run(save_sharded, kind, tmp_path / "saved", anchor_dtype)
    read = ranks(2).run(resume_sharded, kind, tmp_path / "saved", anchor_dtype)
    assert differences(read, written) == []
    alone = made(kind, seed=1, anchor_dtype=anchor_dtype)
    load(alone, tmp_path / "saved", "dcp")
    assert differences(alone.state_dict(), written[0][0]) == []
    train(alone, HALF, END)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("OGM-GE", lambda s: s.pop("stream")),
        ("OGM-GE", lambda s: s.update(stream={})),
        ("OGM-GE", lambda s: s.pop("epoch")),
        ("RedReg", lambda s: s.pop("step")),
        ("RedReg", lambda s: s.update(stream={"state": torch.zeros(3, dtype=torch.int64)})),
        ("RedReg", lambda s: s["anchors"]["tensors"].pop()),
        ("RedReg", lambda s: s["anchors"].pop("tensors")),
        ("InfoReg", lambda s: s.update(anchors={})),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(kind: str, change: Any) -> None:
    training, other = made(kind), made(kind, seed=1)
    train(training, 0, 2)
    train(other, 0, 3)
    name, method = next(iter(training.methods[kind].items()))
    state = copy.deepcopy(other.methods[kind][name].state_dict())
    change(state)
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match=r"lacks|holds|expected"):
        method.load_state_dict(state)
    assert differences(method.state_dict(), before) == []


@pytest.mark.parametrize("kind", STEPPING)
def test_loading_forgets_the_micro_batches_of_a_step_that_was_begun(kind: str) -> None:
    training, other = made(kind), made(kind)
    for each in (training, other):
        train(each, 0, 2)
    (method,) = training.methods[kind].values()
    state = whole(training.state_dict())
    _, seen, _ = training.network(*batch(99, 0, ROWS))
    method.observe(**arguments(method, seen))
    training.load_state_dict(state)
    other.load_state_dict(copy.deepcopy(state))
    assert differences(train(training, 2, 4), train(other, 2, 4)) == []
    assert differences(training.state_dict(), other.state_dict()) == []


def test_seeds_differ() -> None:
    """New objects do have other streams: a run that goes on took its own from the checkpoint."""
    first, second = (made("RedReg", seed=s).methods["RedReg"]["RedReg"] for s in (0, 1))
    assert isinstance(first, mmfuse.RedReg)
    assert not torch.equal(first.stream.state, second.stream.state)
