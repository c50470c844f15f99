"""The short way to the kernels: gradients that are whole, on one device, in an order they take.

It has fewer checks than the public ops, and a bound on the Python that it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from balancing import LOGITS_ONLY
from cells import Cell
from dispatched import launches_of
from torch import Tensor, nn

import mmfuse
from mmfuse import METHODS, _native
from mmfuse.loop.act import act_on
from mmfuse.loop.contract import Act
from mmfuse.loop.modalities import Active, Modalities
from mmfuse.ops import _registry
from mmfuse.ops._eager import Eager

SHAPES = [(16, 8), (5,), (4, 3, 3, 3), (1,)]
LABELS = torch.randint(0, 6, (8,))


def encoders(tensors: int = 1) -> dict[str, list[nn.Parameter]]:
    torch.manual_seed(3)
    made = {}
    for name in ("audio", "visual"):
        made[name] = [nn.Parameter(torch.randn(shape)) for shape in SHAPES * tensors]
        for p in made[name]:
            p.grad = torch.randn_like(p)
    return made


def logits() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(8, 6, generator=generator) for name in ("audio", "visual")}


def frames(call: Callable[[], Any]) -> list[str]:
    """The Python functions that a call runs, torch's own included."""
    found: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            found.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found[1:]  # the call itself is the test's


@pytest.mark.parametrize("tensors", [1, 30])
def test_a_step_of_ogm_ge_is_forty_python_frames_at_most(tensors: int) -> None:
    method = mmfuse.OGM(encoders(tensors))
    shown, labels = logits(), LABELS
    for _ in range(2):
        method.step(shown, labels)
        for p in method.modalities.parameters:
            p.grad = p.grad * 2.0
    found = frames(lambda: method.step(shown, labels))
    assert any("update_grads" in name for name in found), "the step has changed nothing"
    assert len(found) <= 40, "\n".join(found)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("skipped", [None, 0.0, 1.0], ids=str)
@pytest.mark.parametrize("broken", [False, True])
def test_the_stream_goes_on_where_the_step_counts(
    broken: bool, skipped: float | None, backend: str
) -> None:
    stream = mmfuse.NoiseStream(3)
    method = mmfuse.OGM(encoders(), stream=stream, backend=backend)
    if broken:
        method.modalities.parameters[2].grad[0, 0, 0, 0] = torch.nan
    found_inf = None if skipped is None else torch.tensor(skipped)
    method.step(logits(), LABELS, found_inf=found_inf)
    assert stream.state.tolist() == [3, int(not broken and not skipped)]


@pytest.mark.skipif(_native.read_gradients is None, reason="mmfuse._C was not built")
def test_the_update_itself_takes_the_stream_on() -> None:
    stream = mmfuse.NoiseStream(3)
    method = mmfuse.OGM(encoders(), stream=stream, backend="cpu")
    version = stream.state._version
    found = launches_of(lambda: method.step(logits(), LABELS))
    assert found.operators["update_grads_"] == 1
    assert "add_" not in found.operators
    assert (stream.state.tolist(), stream.state._version) == ([3, 1], version + 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda g: g,
    "channels_last": lambda g: g.to(memory_format=torch.channels_last) if g.dim() == 4 else g,
    "transposed": lambda g: g.t().contiguous().t() if g.dim() == 2 else g,
    "strided": lambda g: torch.stack([g, g], dim=-1)[..., 0],
}


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64)], ids=str)
def test_it_gives_the_numbers_of_the_checked_way(
    dtypes: tuple[torch.dtype, ...], layout: str, noise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for plain in (True, False):
        nets = encoders()
        for ps in nets.values():
            for i, p in enumerate(ps):
                p.data = p.data.to(dtypes[i % len(dtypes)])
                p.grad = LAYOUTS[layout](torch.randn_like(p))
        nets["visual"][1].grad = None
        method = mmfuse.OGM(nets, noise=noise, stream=mmfuse.NoiseStream(7))
        if not plain:
            checked = method.modalities.active()._replace(device=None)
            monkeypatch.setattr(method.modalities, "active", lambda *_, found=checked: found)
        else:
            on_the_way = method.modalities.active().device is not None
            assert on_the_way == (layout in ("contiguous", "channels_last"))
        before = [p.grad.clone() for ps in nets.values() for p in ps if p.grad is not None]
        method.step(logits(), LABELS)
        after = [p.grad for ps in nets.values() for p in ps if p.grad is not None]
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
        results.append(after)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", LOGITS_ONLY)
def test_a_gradient_that_kernels_cannot_take_is_refused(name: str) -> None:
    """It may be one among many: the check looks at kinds of gradients, not at each."""
    nets = encoders()
    nets["visual"][0].grad = nets["visual"][0].grad.to_sparse()
    method = METHODS[name](nets)
    method.set_epoch(0)
    before = nets["audio"][0].grad.clone()
    with pytest.raises(TypeError, match=r"gradient of encoders\['visual'\]\[0\] has layout"):
        method.step(logits(), LABELS)
    assert torch.equal(nets["audio"][0].grad, before)


@pytest.mark.parametrize("which", ["scale", "noise_std"])
def test_a_rule_that_returns_too_few_numbers_is_refused(which: str) -> None:
    parts = Modalities(encoders()).active()
    assert parts.device is not None
    act = Act(scale=torch.ones(len(parts.grads)), noise_std=torch.ones(len(parts.grads)))
    act = act._replace(**{which: torch.ones(2)})
    before = [g.clone() for g in parts.grads]
    with pytest.raises(ValueError, match=rf"{which} must have shape \[8\], got \[2\]"):
        act_on(parts, act, torch.ones((), dtype=torch.bool), noise=mmfuse.NoiseStream(1))
    assert all(torch.equal(a, b) for a, b in zip(parts.grads, before, strict=True))


def test_what_is_active_says_how_it_can_be_read() -> None:
    nets = encoders()
    modalities = Modalities(nets)
    assert (modalities.active().device, modalities.active().dtype) == (CPU, torch.float32)
    nets["audio"][1].data = nets["audio"][1].data.double()
    nets["audio"][1].grad = torch.ones(5, dtype=torch.float64)
    assert (modalities.active().device, modalities.active().dtype) == (CPU, torch.float64)
    nets["audio"][0].grad = torch.randn(8, 16).t()
    assert modalities.active().device is None
    for ps in nets.values():
        for p in ps:
            p.requires_grad_(False)
    empty = modalities.active()
    assert empty == Active([], [], [], (), [])


CPU = torch.device("cpu")


class TestEager:
    """A backend's name which says that nothing is compiled and no gradient is wanted."""

    def test_it_runs_the_backend_of_its_name(self, cell: Cell) -> None:
        scores = torch.tensor([0.2, 0.7, 0.4], device=cell.device)
        expected = mmfuse.ops.discrepancy_ratios(scores, backend=cell.backend)
        found = mmfuse.ops.discrepancy_ratios(scores, backend=Eager(cell.backend))
        assert torch.equal(found, expected)

    def test_it_follows_use_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        op = _registry.OPS["discrepancy_ratios"]
        chosen = []
        real = type(op).resolve
        monkeypatch.setattr(op, "_kernels", {})
        monkeypatch.setattr(type(op), "resolve", lambda *a: chosen.append(real(*a)) or chosen[-1])
        scores = torch.tensor([0.2, 0.7])
        for name in ("reference", "cpu", "reference"):
            with mmfuse.use_backend(name):
                mmfuse.ops.discrepancy_ratios(scores, backend=Eager(""))
        assert chosen == ["reference", "cpu"], "each is looked up once"

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match="backend must be one of"):
            mmfuse.ops.discrepancy_ratios(torch.rand(2), backend=Eager("gpu"))

    def test_other_calls_do_not_become_eager_by_it(self, cell: Cell) -> None:
        """The choice of a backend is kept by its name, and the two are equal as texts."""
        op = _registry.OPS["modality_scores"]
        op._chosen.clear()
        op._kernels.clear()
        z = torch.randn(4, 3, device=cell.device)
        labels = torch.tensor([0, 1, 2, 0], device=cell.device)
        mmfuse.ops.modality_scores([z], labels, backend=Eager(cell.backend))
        assert type(op.resolve(cell.backend, torch.device(cell.device))) is str

    def test_no_gradient_is_recorded(self) -> None:
        z = torch.randn(4, 3, requires_grad=True)
        labels = torch.tensor([0, 1, 2, 0])
        assert mmfuse.ops.modality_scores([z], labels).prob.requires_grad
        assert not mmfuse.ops.modality_scores([z], labels, backend=Eager("")).prob.requires_grad


def test_a_step_leaves_the_gradient_mode_as_it_was() -> None:
    for mode in (True, False):
        method = mmfuse.OGM(encoders())
        with torch.set_grad_enabled(mode):
            method.step(logits(), LABELS)
            assert torch.is_grad_enabled() is mode
            with pytest.raises(ValueError, match="logits and encoders"):
                mmfuse.OGM(encoders()).step({"audio": logits()["audio"]}, LABELS)
            assert torch.is_grad_enabled() is mode
