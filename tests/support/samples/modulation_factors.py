"""modulation_factors: all formulas, with and without an owner's statistics."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mmfuse import ops
from mmfuse.ops._eager import Eager
from mmfuse.ops.modulation_factors import before_update, factors_before_update
from mmfuse.reference.modulation_factors import CVPR, MLB, TPAMI

from ._inputs import WIDE, Inputs, Samples, Small, table_of

FORMULAS = ("tpami", "cvpr", "mlb")


def arguments(device: str) -> Samples:
    two, three = torch.rand(2, device=device), torch.rand(3, device=device)
    index = torch.tensor([1, 0, 1], device=device)
    return {
        "modulation_factors": [
            (two, index, None, None, 0.8, 2.0, TPAMI, 0.0),
            (two.double(), index, index + 1, three, 0.8, 2.0, CVPR, 1e-8),
            (two, index[:0], index[:0], three[:0].double(), 0.0, 2.0, TPAMI, 1e-8),
            (three, index, index + 1, three, 0.8, 10.0, MLB, 1e-8),
        ]
    }


def small(device: str) -> Small:
    scores = torch.rand(2, device=device)
    stats = ops.grad_stats([torch.randn(9, device=device) for _ in range(3)])
    return lambda: ops.modulation_factors(scores, 0.8, owner=[0, 1, 1], stats=stats)


short = small  # No part of it is ever shared out.


def case(inputs: Inputs) -> list[Tensor]:
    """A block has 128 modalities or tensors."""
    written: list[Tensor] = []
    owner = [0, 36] * (2 if inputs.interpreted else 67)
    for dtype in WIDE:
        scores = (inputs.normal(37).abs() + 0.1).to(dtype)
        stats = ops.grad_stats([inputs.normal(5, dtype=dtype)] * len(owner))
        for formula, given in itertools.product(FORMULAS, (stats, None)):
            found = ops.modulation_factors(scores, 0.5, formula, owner=owner, stats=given)
            written += [x for x in found if x is not None]
    return written + _before_update(inputs)


def _before_update(inputs: Inputs) -> list[Tensor]:
    """The statistics on the way, of short and long lists; as single ops where none takes tables."""
    written: list[Tensor] = []
    scores = inputs.normal(2).abs() + 0.1
    flag = torch.ones((), dtype=torch.bool, device=inputs.device)
    # A chunk of statistics has 16,384 elements.
    lists = [inputs.many(2), [inputs.normal(5), inputs.normal(5, dtype=torch.float64)]]
    if not inputs.interpreted:
        lists += [inputs.many(129), [inputs.normal(2 * 16384 + 37), *inputs.many(2)]]
    for grads in lists:
        owner = tuple(i % 2 for i in range(len(grads)))
        rule = scores, 0.5, "tpami", owner
        kernel = before_update(Eager(""), scores.device)
        if kernel is not None:
            found, started = factors_before_update(kernel, *rule, table_of(grads), 1e-8)
            written += [*found, started.finite]
        else:
            stats = ops.grad_stats(grads)
            written += ops.modulation_factors(
                scores, 0.5, "tpami", owner=owner, stats=stats, eps=1e-8
            )
            written.append(flag)
    return written


def compiled(inputs: Inputs) -> None:
    f32, f64 = WIDE
    owner = [0, 1, 1]
    for scores, stats, formula in (
        (f32, None, "tpami"),
        (f32, None, "cvpr"),
        (f32, f32, "tpami"),
        (f32, f32, "cvpr"),
        (f64, f32, "tpami"),
        (f32, f64, "cvpr"),
        (f64, f64, "tpami"),
        (f32, None, "mlb"),
        (f64, f32, "mlb"),
    ):
        given = stats and ops.grad_stats([inputs.normal(5, dtype=stats)] * len(owner))
        score = inputs.vector(0.2, 0.7, dtype=scores)
        ops.modulation_factors(score, 0.5, formula, owner=owner, stats=given)
