"""information_pull: scores and tables of both dtypes, with counts and multipliers and without."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import WIDE, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    two = torch.tensor([-0.4, -1.2], device=device)
    table = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.3, 0.6], [0.9, 0.1, 0.7]], device=device)
    is_open = torch.tensor([True, True, False], device=device)
    steps, owner = torch.arange(3, device=device), torch.tensor([1, 0, 1, 1], device=device)
    eight = torch.full((), 8.0, dtype=torch.float64, device=device)
    factors = torch.tensor([0.95, 0.1, 0.5], dtype=torch.float64, device=device)
    return {
        "information_pull": [
            (two, None, is_open[:2], steps[:2], owner, 0.9, None),
            (two.double(), eight, is_open[:2], steps[:2], owner[:0], 1.0, factors[:2]),
            (table, None, is_open, steps, owner, 0.0, None),
            (table.double(), 8 * table.double(), is_open, steps, owner, 0.9, factors),
        ]
    }


def small(device: str) -> Small:
    scores, steps = torch.rand(2, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    is_open = torch.ones(2, dtype=torch.bool, device=device)
    return lambda: ops.information_pull(scores, is_open, steps, 0.9, owner=[0, 1, 1])


short = small  # No part of it is ever shared out.


def case(inputs: Inputs) -> list[Tensor]:
    """A block has 128 modalities or tensors."""
    written: list[Tensor] = []
    owner = [0, 36] * (2 if inputs.interpreted else 67)
    is_open, steps = inputs.normal(37) > -1, inputs.normal(37).mul(9).long()
    for dtype in WIDE:
        for shape in ((37,), (37, 37)):
            scores = inputs.normal(*shape, dtype=dtype)
            if len(shape) == 2:
                scores[3, :] = scores[0, 5] = torch.nan
            for count in (None, inputs.vector(3.0)[0], scores.new_full(shape, 2.0)):
                for factors in ((), [0.5] * 37):
                    found = ops.information_pull(
                        scores, is_open, steps, 0.9, owner=owner, count=count, multipliers=factors
                    )
                    written += found
    return written


def compiled(inputs: Inputs) -> None:
    is_open, steps = inputs.vector(1.0, 1.0) > 0, inputs.vector(1.0, 2.0).long()
    for dtype in WIDE:
        two = inputs.vector(0.2, 0.7, dtype=dtype)
        table = inputs.vector(0.2, 0.3, 0.4, 0.5, dtype=dtype).view(2, 2)
        count = inputs.vector(3.0, dtype=torch.float64)[0]
        for scores, counts, factors in (
            (two, None, ()),
            (two, count, (0.95, 0.1)),
            (table, None, ()),
            (table, table, (0.95, 0.1)),
        ):
            ops.information_pull(
                scores,
                is_open,
                steps,
                0.9,
                owner=[0, 1, 1],
                count=counts,
                multipliers=factors,
            )
