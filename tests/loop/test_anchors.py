"""Anchors: what is kept of the parameters, and in which parts it is worked with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfuse.loop import anchors
from mmfuse.loop.modalities import Active, Modalities
from mmfuse.ops import GradStats


def test_statistics_of_parts_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors kept on the CPU are taken in parts, the first of which says where the result is."""
    home = torch.device("meta")

    def on(device: torch.device) -> GradStats:
        return GradStats(*(torch.ones(2, device=device) for _ in range(5)))

    kept = anchors.Anchors()
    parts: list[tuple[slice, list[Any]]] = [(slice(0, 2), []), (slice(2, 4), [])]
    monkeypatch.setattr(kept, "parts", lambda active: iter(parts))
    found = iter([on(home), on(torch.device("cpu"))])
    monkeypatch.setattr(anchors, "grad_stats", lambda *args, **kwargs: next(found))
    stats = kept.stats(Active([], [], [], (), []), None)
    assert all(field.device == home and field.shape == (4,) for field in stats)


def test_a_copy_stays_where_it_was_taken() -> None:
    net = nn.Linear(3, 2)
    kept = anchors.Anchors(torch.bfloat16)
    kept.take(list(net.parameters()))
    addresses = [a.data_ptr() for a in kept.tensors]
    assert [a.dtype for a in kept.tensors] == [torch.bfloat16] * 2
    with torch.no_grad():
        net.weight += 1
    assert torch.equal(kept.tensors[0], (net.weight - 1).to(torch.bfloat16))
    kept.take(list(net.parameters()))
    assert torch.equal(kept.tensors[0], net.weight.to(torch.bfloat16))
    assert [a.data_ptr() for a in kept.tensors] == addresses


def test_what_does_not_fit_is_named() -> None:
    net = nn.Linear(3, 2)
    modalities = Modalities({"audio": net, "visual": nn.Linear(3, 2)}, "all")
    kept = anchors.Anchors()
    kept.take(modalities.parameters)
    nn.init.ones_(net.weight)
    for p in modalities.parameters:
        p.grad = torch.ones_like(p)
    kept.check(modalities.active(), modalities.parameter_names)
    state = kept.state_dict(modalities)
    with pytest.raises(ValueError, match="the state holds 3 anchors, the encoders have 4"):
        kept.load_state_dict({"tensors": state["tensors"][:3]}, modalities)
    kept.tensors[0] = torch.zeros(5, 5)
    with pytest.raises(ValueError, match=r"had shape \[5, 5\] at set_epoch and now has \[2, 3\]"):
        kept.check(modalities.active(), modalities.parameter_names)


def test_anything_but_a_floating_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="anchor_dtype must be a floating dtype"):
        anchors.Anchors(torch.int8)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "contiguous": (lambda t: t, True),
    "a transposed parameter": (lambda t: t.t().contiguous().t(), False),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_tensors_give_the_numbers_of_checked_ones(
    layout: str, dtype: torch.dtype | None
) -> None:
    torch.manual_seed(1)
    made, plain = LAYOUTS[layout]
    nets = {name: [nn.Parameter(made(torch.randn(9, 7)))] for name in ("audio", "visual")}
    modalities = Modalities(nets)
    kept = anchors.Anchors(dtype)
    kept.take(modalities.parameters)
    results = []
    for checked in (False, True):
        torch.manual_seed(2)
        for p in modalities.parameters:
            p.grad = torch.randn(9, 7)
            p.data.copy_(made(torch.randn(9, 7)))
        active = modalities.active()
        assert active.device is not None
        assert (kept._plain(active) is not None) == plain
        if checked:
            active = active._replace(device=None)
        stats = kept.stats(active, None)
        finite = torch.ones((), dtype=torch.bool)
        squares = torch.full((2,), torch.nan, dtype=torch.float64)
        scale, pull = torch.tensor([0.5, 1.0]), torch.tensor([2.0, 0.0])
        kept.update_(active, scale, pull, finite, None, squares)
        results.append([*stats, squares, finite, *(p.grad for p in modalities.parameters)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_anchors_of_a_dtype_that_kernels_lack_are_refused() -> None:
    modalities = Modalities({name: [nn.Parameter(torch.randn(3))] for name in "ab"})
    for p in modalities.parameters:
        p.grad = torch.ones(3)
    kept = anchors.Anchors(torch.float8_e4m3fn)
    kept.take(modalities.parameters)
    with pytest.raises(TypeError, match=r"anchors\[0\] has dtype torch.float8_e4m3fn"):
        kept.stats(modalities.active(), None)


def test_a_parameter_that_became_strided_is_not_plain() -> None:
    modalities = Modalities({name: [nn.Parameter(torch.randn(9, 7))] for name in "ab"})
    kept = anchors.Anchors()
    kept.take(modalities.parameters)
    for p in modalities.parameters:
        p.grad = torch.ones(9, 7)
    active = modalities.active()
    assert kept._plain(active) is not None
    modalities.parameters[1].data = torch.randn(7, 9).t()
    assert kept._plain(active) is None
