"""Numbers of each modality go by its name: in any order of a later call, also after resuming."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from balancing import IN_FORWARD, NAMED, make
from states import differences
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mmfuse
from mmfuse.loop.epochs import EpochWindowModule

NAMES = ("visual", "audio", "text")
#: Every other order that three names can have, of which one is its own inverse and one is not.
OTHERS = [("audio", "visual", "text"), ("text", "visual", "audio"), ("audio", "text", "visual")]
ROWS, WIDTH, CLASSES = 16, 6, 4
RENAMED = {"visual": "image", "audio": "audio", "text": "text"}

MADE: dict[str, Callable[..., Any]] = {
    **{kind: lambda kind=kind: make(kind, {}, num_modalities=3) for kind in NAMED},
    "OPM.official": lambda: mmfuse.OPM.official(num_modalities=3, starts=0),
    "AGM.official": lambda: mmfuse.AGM.official(num_modalities=3),
    "ARL.official": lambda: mmfuse.ARL.official(num_modalities=3, starts=0),
    "ARM.official": lambda: mmfuse.ARM.official(num_modalities=3),
    "PMR.official": lambda: mmfuse.PMR.official(num_modalities=3),
}


def made(kind: str) -> EpochWindowModule:
    torch.manual_seed(0)
    method: EpochWindowModule = MADE[kind]()
    method.set_epoch(0)
    return method


def call(
    method: Any, number: int, order: Sequence[str] = NAMES, way: str = "", labelled: bool = True
) -> Any:
    """A call with the batch of this number, whose dicts have this order."""
    torch.manual_seed(number)
    fused, labels = torch.randn(ROWS, WIDTH), torch.arange(ROWS) % CLASSES
    features = {name: 2.0**m * torch.randn(ROWS, WIDTH) for m, name in enumerate(NAMES)}
    logits = {name: torch.randn(ROWS, CLASSES) for name in NAMES}
    for m, z in enumerate(logits.values()):  # the later, the further
        z[torch.arange(ROWS), labels] += m
    masks = {name: torch.rand(ROWS) > 0.2 for name in NAMES}
    numbers = {"visual": 0.2, "audio": 0.5, "text": 0.7, "fused": 0.6}

    def turned(given: dict[str, Any], *last: str) -> dict[str, Any]:
        names = [next((n for n in given if n in (name, RENAMED.get(name))), name) for name in order]
        return {name: given[name] for name in (*names, *last)}

    more: dict[str, Any] = {}
    if way == "present":
        more["present"] = turned(masks)
    elif way == "scores":
        more["scores"] = turned(numbers, *["fused"] * isinstance(method, mmfuse.ARM))
    features, logits = turned(features), turned(logits)
    if isinstance(method, mmfuse.PMR):
        if method.training and not method._ready:
            method.update_prototypes([(features, labels)])
        return method(features, labels, **more)
    if isinstance(method, mmfuse.ARM):
        labelled = labelled or not method.rule.averages  # the release wants the test set's
    kept = {} if way == "scores" or not labelled else {"labels": labels}
    if isinstance(method, mmfuse.AGM):
        return method(logits, **kept, **more)
    shown = {} if way == "scores" or not labelled else {"logits": logits}
    if isinstance(method, mmfuse.ARM):
        joint = {"fused_logits": fused[:, :CLASSES]} if kept else {}
        return method(features, fused, **shown, **joint, **kept, **more)
    return method(features, **shown, **kept, **more)


def by_name(value: Any, names: Sequence[str]) -> Any:
    """A result without its order."""
    if isinstance(value, dict):
        return {name: value[name] for name in sorted(value)}
    if isinstance(value, Tensor) and value.dim() and len(value) == len(names):
        return dict(sorted(zip(names, value, strict=True)))
    return value


def results(out: Any) -> dict[str, Any]:
    rest = [f.name for f in fields(out) if f.name != "modalities"]
    return {name: by_name(getattr(out, name), out.modalities) for name in rest}


WAYS = [
    (kind, way)
    for kind in MADE
    for way in ("", "present", *["scores"] * (kind.split(".")[0] in ("OPM", "AGM", "ARM")))
]


@pytest.mark.parametrize("order", OTHERS, ids="-".join)
@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_a_later_call_may_have_any_order(kind: str, way: str, order: tuple[str, ...]) -> None:
    method, same = made(kind), made(kind)
    for number in range(4):
        turned = order if number in (1, 2) else NAMES
        out, expected = call(method, number, turned, way), call(same, number, NAMES, way)
        assert out.modalities == expected.modalities == NAMES
        assert differences(results(out), results(expected)) == []
        if hasattr(out, "features"):
            assert list(out.features) == list(NAMES)
    assert differences(dict(method.state_dict()), dict(same.state_dict())) == []
    for each in (method, same):
        each.eval()
    out, expected = (call(m, 9, o, labelled=False) for m, o in ((method, order), (same, NAMES)))
    assert out.modalities == NAMES
    assert differences(results(out), results(expected)) == []


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("kind", MADE)
def test_other_names_are_refused(
    kind: str, resumed: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind.startswith("PMR") and not training:
        pytest.skip("PMR looks at nothing in evaluation")
    method = made(kind)
    call(method, 0)
    if resumed:
        state, method = method.state_dict(), made(kind)
        method.load_state_dict(state)
    method.train(training)
    before = copy.deepcopy(dict(method.state_dict()))
    error = r"names \['image', .* but the state of this \w+ is of others: .*reset_parameters"
    if not resumed:
        error = r"and (the prototypes|earlier batches .*) name different modalities: missing \['vis"
    monkeypatch.setattr("test_name_order.NAMES", tuple(RENAMED.values()))
    for given in (tuple(RENAMED.values()), ("audio", "text", "image")):
        with pytest.raises(ValueError, match=error if given[0] == "image" else "image"):
            call(method, 1, given, labelled=training)
    assert differences(dict(method.state_dict()), before) == []


@pytest.mark.parametrize("order", OTHERS, ids="-".join)
@pytest.mark.parametrize("kind", MADE)
def test_a_resumed_run_may_have_any_order(
    kind: str, order: tuple[str, ...], tmp_path: Path
) -> None:
    method, resumed, evaluated = made(kind), made(kind), made(kind)
    for number in range(2):
        call(method, number)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    for each in (resumed, evaluated):
        each.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    out, expected = (
        call(m.eval(), 9, o, labelled=False) for m, o in ((evaluated, order), (method, NAMES))
    )
    assert differences(results(out), results(expected)) == []
    method.train()
    for number, turned in ((2, order), (3, NAMES), (4, order)):
        out, expected = call(resumed, number, turned), call(method, number)
        assert out.modalities == NAMES
        assert differences(results(out), results(expected)) == []
    assert differences(dict(resumed.state_dict()), dict(method.state_dict())) == []
    if isinstance(method, mmfuse.PMR):  # an update is the first that names them
        again = made(kind)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        before = [each.clone() for each in again.prototypes]
        torch.manual_seed(0)
        alike = {name: torch.randn(ROWS, WIDTH) for name in NAMES}
        turned_batch = {name: alike[name] for name in order}
        labels = torch.arange(ROWS) % CLASSES
        again.update_prototypes([(turned_batch, labels), (alike, labels)])
        method = made(kind)
        method.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        method.update_prototypes([(alike, labels), (alike, labels)])
        assert again.names == NAMES and differences(before, again.prototypes)
        assert differences(again.prototypes, method.prototypes) == []


@pytest.mark.parametrize("kind", MADE)
def test_a_state_without_names_is_read(kind: str) -> None:
    """As mmfuse saved it before: the next call's order counts as that of the state."""
    method, resumed = made(kind), made(kind)
    call(method, 0)
    call(resumed, 5, OTHERS[0])
    old = method.state_dict()
    del old["names_state"]
    resumed.load_state_dict(old)
    assert resumed.names is None and not resumed.names_state.any()
    out, expected = call(resumed, 1), call(method, 1)
    assert differences(results(out), results(expected)) == []
    assert differences(dict(resumed.state_dict()), dict(method.state_dict())) == []


@pytest.mark.parametrize("kind", MADE)
def test_a_first_state_names_nobody(kind: str) -> None:
    method, other = made(kind), made(kind)
    call(other, 0, OTHERS[2])
    other.load_state_dict(method.state_dict())
    assert call(other, 1).modalities == NAMES


@pytest.mark.parametrize("kind", MADE)
def test_a_reset_forgets_the_names(kind: str) -> None:
    method = made(kind)
    call(method, 0)
    method.reset_parameters()
    assert method.names is None and not method.names_state.any()
    assert call(method, 1, OTHERS[1]).modalities == OTHERS[1]


@pytest.mark.parametrize("kind", MADE)
def test_a_call_that_fails_names_nobody(kind: str) -> None:
    method = made(kind)
    given, wrong = {name: torch.randn(2, 3) for name in OTHERS[0]}, torch.zeros(3).long()
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        method(given, wrong if kind.startswith(("AGM", "PMR")) else None)
    assert call(method, 1).modalities == NAMES


def through_pickle(method: Any) -> Any:
    return pickle.loads(pickle.dumps(method))


def through_half(method: Any) -> Any:
    """Casts do not touch the names; the state is that of the cast module."""
    state, other = method.half().state_dict(), type(method)(num_modalities=3).half()
    other.load_state_dict(state)
    return other.float()


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_half])
@pytest.mark.parametrize("kind", NAMED)
def test_a_copy_has_the_names(kind: str, through: Callable[[Any], Any]) -> None:
    method = made(kind)
    call(method, 0)
    other = through(method)
    assert call(other, 1, OTHERS[2]).modalities == NAMES


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9999])
@pytest.mark.parametrize("kind", NAMED)
def test_an_average_has_the_names(kind: str, decay: float) -> None:
    """Also one that begins before the first step, when the state names nobody."""
    method = made(kind)
    if kind == "PMR":  # buffers of one shape
        method = mmfuse.PMR(num_classes=CLASSES, widths=[WIDTH] * 3, num_modalities=3)
    averaged = AveragedModel(method, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    ema = copy.deepcopy(method.state_dict())
    averaged.update_parameters(method)
    for number in range(8):
        call(method, number)
        averaged.update_parameters(method)
        for mean, value in zip(ema.values(), method.state_dict().values(), strict=True):
            mean.copy_(decay * mean + (1 - decay) * value)
    for state in (ema, averaged.module.state_dict(), {k: v.half() for k, v in ema.items()}):
        state["epoch_state"] = method.epoch_state  # a format of another number is refused
        other = copy.deepcopy(method)
        other.load_state_dict(state)
        assert other.names is None
        assert call(other, 9, OTHERS[2]).modalities == NAMES
    # The copy itself, which no step has told the names.
    inner: Any = averaged.module
    assert inner.names is None
    if kind != "PMR":
        assert call(inner.eval(), 9, OTHERS[1], labelled=False).modalities == NAMES


@pytest.mark.parametrize("kind", ["OPM", "AGM"])
def test_a_compiled_call_may_have_any_order(kind: str) -> None:
    method, same = made(kind), made(kind)
    for each in (method, same):
        each.load_state_dict(state_after(kind))
    torch._dynamo.reset()
    fast = torch.compile(method, fullgraph=True, backend="aot_eager")
    for number, order in enumerate((OTHERS[2], NAMES, OTHERS[2])):
        out, expected = call_with(fast, method, number, order), call(same, number)
        assert out.modalities == NAMES
        assert differences(results(out), results(expected)) == []
    assert differences(dict(method.state_dict()), dict(same.state_dict())) == []
    torch._dynamo.reset()


def state_after(kind: str) -> dict[str, Any]:
    method = made(kind)
    call(method, 7)
    return dict(method.state_dict())


def call_with(fast: Any, method: Any, number: int, order: Sequence[str]) -> Any:
    """`call` through the compiled module."""
    method.forward, kept = (lambda *given, **more: (given, more)), method.forward
    try:
        given, more = call(method, number, order)
    finally:
        method.forward = kept
        del method.forward
    return fast(*given, **more)


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_all_that_have_numbers_of_each_modality_are_here(kind: str) -> None:
    """Five modalities, a size that nothing else has here."""
    method = make(kind, {}, num_modalities=5)
    sized = [name for name, buffer in method.named_buffers() if 5 in buffer.shape]
    assert bool(sized) == (kind in NAMED)
    assert hasattr(method, "names_state") == (kind in NAMED)
