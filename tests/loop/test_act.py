"""The act stage against the formula, for every second list and every kind of noise."""

from __future__ import annotations

import pytest
import torch
from cells import Cell
from torch import Tensor

from mmfuse import NoiseStream
from mmfuse.loop.act import Second, act_on, carry_out, stats_of
from mmfuse.loop.anchors import Anchors
from mmfuse.loop.contract import Act, Need
from mmfuse.loop.modalities import Active

SHAPES = [(3, 5), (7,), (2, 3, 4)]


def active() -> Active:
    params = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    grads = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    return Active(params, grads, [4, 0, 2], (0, 0, 1), [])


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    ("second", "noise"),
    [
        *((second, None) for second in ("anchors", "displaced", "alone", None)),
        *((second, "stream") for second in ("displaced", "alone", None)),
        (None, "made"),
    ],
)
def test_the_formula(cell: Cell, scaled: bool, second: str | None, noise: str | None) -> None:
    cell.skip_slow(noise is None)
    parts = active()
    expected = [g.clone() for g in parts.grads]
    act = Act()
    if scaled:
        act = act._replace(scale=vector(0.5, 2.0, 0.0))
        expected = [k * g for k, g in zip((0.5, 2.0, 0.0), expected, strict=True)]
    given: Anchors | Second | None = None
    if second is not None:
        act = act._replace(pull=vector(1.0, 0.0, -3.0))
        origins = [torch.randn_like(p) for p in parts.params]
        if second == "anchors":
            given = Anchors()
            given.tensors = [torch.empty(0)] * 5
            for i, origin in zip(parts.ids, origins, strict=True):
                given.tensors[i] = origin
        else:
            given = Second(parts.params, origins if second == "displaced" else None)
        for t, pull in enumerate((1.0, 0.0, -3.0)):
            away = 0.0 if second == "alone" else origins[t]
            expected[t] = expected[t] + pull * (parts.params[t] - away)
    stream = NoiseStream(3)
    if noise is not None:
        act = act._replace(noise_std=vector(0.1, 0.0, 2.0))
        for t, std in enumerate((0.1, 0.0, 2.0)):
            drawn = stream.normal(expected[t].numel(), parts.ids[t], dtype=torch.float64)
            z = drawn.view(SHAPES[t]) if noise == "stream" else torch.ones(SHAPES[t])
            expected[t] = expected[t] + std * z
    finite = torch.ones((), dtype=torch.bool)
    source = stream if noise == "stream" else torch.ones_like
    act_on(parts, act, finite, second=given, noise=source, backend=cell.backend)
    for grad, value in zip(parts.grads, expected, strict=True):
        # The contract of the noise: 1e-5 (1 + |z|), times the largest std.
        torch.testing.assert_close(grad, value, rtol=1e-6, atol=1e-4 if noise == "stream" else 1e-6)
    assert finite
    assert stream.state.tolist() == [3, 0], "the stream is the caller's to advance"


def test_finite_says_what_has_become_of_them() -> None:
    parts = active()
    parts.grads[1][3] = torch.inf
    finite = torch.ones((), dtype=torch.bool)
    act_on(parts, Act(), finite)
    assert not finite


@pytest.mark.parametrize("when", ["before", "after"])
def test_squares_are_unscaled_and_of_the_time_that_is_asked_for(when: str) -> None:
    parts = active()
    before = [g.square().sum() for g in parts.grads]
    kept = Anchors()
    kept.tensors = [torch.zeros(0)] * 5
    for i, p in zip(parts.ids, parts.params, strict=True):
        kept.tensors[i] = p - 1.0
    squares = carry_out(
        parts,
        Act(pull=vector(1.0, 1.0, 1.0)),
        torch.ones((), dtype=torch.bool),
        need=Need(second="anchor", squares=when),
        second=kept,
        noise=NoiseStream(0),
        grad_scale=torch.tensor(4.0),
        backend=None,
    )
    after = [g.square().sum() for g in parts.grads]
    expected = torch.stack(before if when == "before" else after) / 16
    torch.testing.assert_close(squares, expected)
    assert not torch.stack(before).allclose(torch.stack(after)), "the pull, times the scale, is in"


def test_statistics_of_two_gradients_are_those_of_both_lists() -> None:
    parts = active()
    other = [torch.randn_like(g) for g in parts.grads]
    stats = stats_of(parts, Second(other), torch.tensor(2.0), None)
    for t, (g, h) in enumerate(zip(parts.grads, other, strict=True)):
        # Both are scaled alike: nothing is taken out.
        torch.testing.assert_close(stats.sq_norm[t], g.square().sum())
        torch.testing.assert_close(stats.dot[t], (g * h).sum())
        torch.testing.assert_close(stats.disp_sq[t], h.square().sum())
