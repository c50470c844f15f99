"""Every method's step recorded once and replayed gives what it gives step by step.

On a GPU by a CUDA graph; on the CPU by a recording of the operators, which finds a state that is
put in a new tensor, a number that is kept in Python, and a copy from the host.
"""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import samples
import torch
from balancing import KINDS, ON_UPDATES, balance, make, see, show, start
from cells import Cell
from networks import AudioVisual, batch
from no_sync import no_host_sync
from replay import Captured
from states import differences
from torch import Tensor, nn

import mmfuse
from mmfuse import OPM, NoiseStream, ogm_backward
from mmfuse.ops import _tensors
from mmfuse.ops._registry import OPS

REPLAYS = 3
Data = tuple[Tensor, Tensor, Tensor]
Outcome = tuple[Tensor, Any]


class Training:
    """A network with one method on it, whose steps see the same three tensors."""

    def __init__(self, kind: str, model: AudioVisual, cell: Cell) -> None:
        self.model = copy.deepcopy(model)
        self.cell = cell
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.stream = NoiseStream(5, cell.device)
        self.data: Data = tuple(x.to(cell.device) for x in batch())
        self.method: Any = None
        if kind != OGM_BACKWARD:
            name = kind.removesuffix(ON_UPDATE)
            more: dict[str, Any] = {} if name == kind else {"apply_to": "update"}
            backend = cell.backend
            self.method = make(
                name, self.model.encoders, stream=self.stream, backend=backend, **more
            )
            if name != kind:
                self.method.attach(self.optimizer)
            if isinstance(self.method, nn.Module):
                self.method.to(cell.device)
            start(self.method)

    def step(self) -> Outcome:
        """The loss, and what the method has returned."""
        self.optimizer.zero_grad()
        a, v = self.model.features(*self.data[:2])
        inputs = {"audio": self.data[0], "visual": self.data[1]}
        seen = see(self.model.fc, {"audio": a, "visual": v}, inputs, self.data[2])
        shown = show(self.method, self.model.fc, seen)
        if self.method is not None:
            result = balance(self.method, shown)
        else:
            result = ogm_backward(
                shown.loss,
                self.model.encoders,
                seen["logits"],
                self.data[2],
                stream=self.stream,
                backend=self.cell.backend,
            )
        self.optimizer.step()
        return shown.loss.detach(), result

    def show(self, data: Data) -> None:
        for tensor, new in zip(self.data, data, strict=True):
            tensor.copy_(new)

    def state(self) -> dict[str, Any]:
        method = {} if self.method is None else dict(self.method.state_dict())
        # RedReg's count in Python belongs to the recording.
        method.pop("step", None)
        state = {"model": dict(self.model.state_dict()), "method": method}
        return copy.deepcopy({**state, "stream": self.stream.state})


OGM_BACKWARD, ON_UPDATE = "ogm_backward", " on the update"
EVERY = [*KINDS, *(kind + ON_UPDATE for kind in ON_UPDATES), OGM_BACKWARD]


@pytest.fixture
def _repeatable() -> Iterator[None]:
    """Convolutions that give the same bits again."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def warmed(kind: str, model: AudioVisual, cell: Cell) -> Training:
    """Runs steps on a stream of their own first, as CUDA graphs want them."""
    training = Training(kind, model, cell)
    steps = 2  # the second finds the optimizer's state, and no gradient of a first step
    if cell.device == "cpu":
        for _ in range(steps):
            training.step()
        return training
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(steps):
            training.step()
    torch.cuda.current_stream().wait_stream(side)
    return training


@pytest.mark.slow_except_on("cpu", "cuda")
@pytest.mark.usefixtures("_repeatable")
@pytest.mark.parametrize("kind", EVERY)
def test_a_replay_is_a_step(cell: Cell, kind: str) -> None:
    cell.skip_slow()
    model = AudioVisual().to(cell.device)
    torch.manual_seed(1)
    eager = warmed(kind, model, cell)
    torch.manual_seed(1)
    replayed = warmed(kind, model, cell)
    assert differences(replayed.state(), eager.state()) == []
    shown = [batch() for _ in range(REPLAYS + 1)]
    # The last batch is shown twice: what differs then is the noise, or the state.
    for i, data in enumerate([*shown, shown[-1]]):
        for training in (eager, replayed):
            training.show(data)
        expected = eager.step()
        if i == 0:
            replayed.optimizer.zero_grad()
            captured = Captured(replayed.step, cell.device)
        else:
            captured.replay()
        found = captured.result
        assert torch.equal(found[0], expected[0])
        assert differences(vars(found[1]), vars(expected[1])) == []
        assert differences(replayed.state(), eager.state()) == []


@pytest.mark.usefixtures("_repeatable")
@pytest.mark.parametrize("kind", EVERY)
def test_no_host_synchronisation(cell: Cell, kind: str) -> None:
    """The whole step, its backward pass included."""
    cell.skip_slow()
    training = warmed(kind, AudioVisual().to(cell.device), cell)
    with no_host_sync(cell.device):
        training.step()


def test_every_replay_draws_fresh_noise(cell: Cell) -> None:
    grads = [torch.zeros(37, device=cell.device), torch.zeros(5, 3, device=cell.device)]
    stream = NoiseStream(9, cell.device)
    scale, std = (torch.tensor(x, device=cell.device) for x in ([1.0, 1.0], [1.0, 2.0]))

    def step() -> None:
        for grad in grads:
            grad.zero_()
        mmfuse.ops.update_grads_(grads, scale, noise_std=std, stream=stream, backend=cell.backend)
        stream.advance()

    step()
    captured = Captured(step, cell.device)
    seen = [torch.cat([g.flatten().clone() for g in grads])]
    for _ in range(REPLAYS):
        captured.replay()
        seen.append(torch.cat([g.flatten().clone() for g in grads]))
    assert stream.state.tolist() == [9, 2 + REPLAYS]
    fresh = NoiseStream(9, cell.device)
    fresh.advance()
    for noise in seen:
        expected = torch.cat([fresh.normal(37, 0), 2 * fresh.normal(15, 1)])
        torch.testing.assert_close(noise, expected, atol=2e-5, rtol=2e-5)
        fresh.advance()


@pytest.mark.usefixtures("_repeatable")
@pytest.mark.parametrize("kind", ["OGM", "InfoReg", "ARM"])
def test_what_is_kept_on_the_device_may_be_missing(
    cell: Cell, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The captured step may be the first one with these gradients."""
    cell.skip_slow()
    model = AudioVisual().to(cell.device)
    torch.manual_seed(1)
    eager = warmed(kind, model, cell)
    torch.manual_seed(1)
    replayed = warmed(kind, model, cell)
    for training in (eager, replayed):
        training.model.audio_net.conv1.weight.requires_grad_(False)
    expected = eager.step()
    monkeypatch.setattr(_tensors, "_kept", OrderedDict())
    monkeypatch.setattr(_tensors, "_kept_for_graphs", {})
    if cell.device == "cpu":
        monkeypatch.setattr(_tensors, "_capturing", lambda device: True)
    replayed.optimizer.zero_grad()
    found = Captured(replayed.step, cell.device).result
    assert not _tensors._kept and not _tensors._kept_for_graphs
    assert torch.equal(found[0], expected[0])
    assert differences(vars(found[1]), vars(expected[1])) == []


class Turns:
    """Two encoders whose features take turns at one head, with MLA on it."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(2)
        self.encoders = nn.ModuleDict({n: nn.Linear(4 + i, 6) for i, n in enumerate("av")})
        self.head = nn.Linear(6, 3)
        self.model = nn.ModuleList([self.encoders, self.head]).to(device)
        self.model.append(mmfuse.MLA(self.head, batches=3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.inputs = {n: torch.zeros(5, 4 + i, device=device) for i, n in enumerate("av")}
        self.labels = torch.arange(5, device=device) % 3

    def step(self) -> list[Tensor]:
        """A batch, of two turns: the share of the head's gradient that each has kept."""
        kept = []
        for name, x in self.inputs.items():
            self.optimizer.zero_grad()
            feature = self.encoders[name](x)
            nn.functional.cross_entropy(self.head(feature), self.labels).backward()
            kept.append(self.model[2].step(feature).kept)
            self.optimizer.step()
        return kept

    def show(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for x in self.inputs.values():
            x.copy_(torch.randn(x.shape, generator=generator))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_replay_is_two_turns_of_mla(device: str) -> None:
    """Projector and turns go on, and the first turn, which projects nothing, is not replayed."""
    eager, replayed = Turns(device), Turns(device)
    side = torch.cuda.Stream() if device == "cuda" else None
    for turns in (eager, replayed):
        turns.show(0)
        if side is None:
            turns.step()
            continue
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            turns.step()
        torch.cuda.current_stream().wait_stream(side)
    for i in range(1 + REPLAYS):
        for turns in (eager, replayed):
            turns.show(1 + i)
        expected = eager.step()
        if i == 0:
            replayed.optimizer.zero_grad()
            captured = Captured(replayed.step, device)
        else:
            captured.replay()
        assert all(map(torch.equal, captured.result, expected))
        assert all(0 < float(each) < 1 for each in expected)
        found, state = (dict(turns.model.state_dict()) for turns in (replayed, eager))
        assert differences(found, state) == []
        assert int(state["2.turns"]) == 2 * (2 + i)


def test_opm_as_released_copies_nothing_from_the_host() -> None:
    """It cannot be captured, since the number of rows that are left is read on the host."""
    features = {"audio": torch.randn(6, 2, 5), "visual": torch.randn(6, 3)}
    logits = {name: torch.randn(6, 4) for name in features}
    labels = torch.randint(0, 4, (6,))
    opm = OPM.official(stream=NoiseStream(3), starts=0)
    opm(features, logits, labels)
    Captured(lambda: opm(features, logits, labels), "cpu")


@pytest.mark.parametrize("op", sorted(OPS))
@torch.no_grad()
def test_the_reference_can_be_captured(op: str) -> None:
    """The recording does not see into an op; here it looks at the reference itself."""
    module = importlib.import_module(f"mmfuse.reference.{OPS[op].module}")
    for arguments in samples.arguments("cpu")[op]:
        with no_host_sync("cpu"):
            Captured(lambda given=arguments: getattr(module, op)(*given), "cpu")


class TestTheRecording:
    """The stand-in finds what a CUDA graph would not replay."""

    def test_a_new_tensor_as_state(self) -> None:
        state = {"sum": torch.zeros(())}

        def step() -> Tensor:
            state["sum"] = state["sum"] + 1.0
            return state["sum"]

        captured = Captured(step, "cpu")
        captured.replay()
        captured.replay()
        assert captured.result == 1.0

    def test_in_place(self) -> None:
        total = torch.zeros(())

        def step() -> Tensor:
            return total.add_(1.0) * 2.0

        captured = Captured(step, "cpu")
        captured.replay()
        assert (total, captured.result) == (2.0, 4.0)

    def test_values_of_the_host(self) -> None:
        with pytest.raises(AssertionError, match="values of the host"):
            Captured(lambda: torch.tensor([1.0, 2.0]), "cpu")
