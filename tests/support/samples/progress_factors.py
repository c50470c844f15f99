"""progress_factors: scores and tables of both dtypes, against last ones of both, with a bound."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import WIDE, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    two = torch.tensor([0.5, 0.2], device=device)
    table = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.3, 0.6], [0.9, 0.1, 0.7]], device=device)
    last, shares = torch.rand(3, 3, device=device), torch.rand(3, device=device)
    owner = torch.tensor([1, 0, 1, 1], device=device)
    return {
        "progress_factors": [
            (two, last[:2, :2].contiguous(), shares[:2], owner, 1.3, math.inf, False),
            (two.double(), torch.zeros_like(last[:2, :2]), shares[:2], owner[:0], 1.0, 2.0, True),
            (table, last.double(), shares.double(), owner, 1.3, 1.0, False),
            (table.double(), last.double(), shares.double(), owner, 1.3, 2.0, True),
        ]
    }


def small(device: str) -> Small:
    scores, last, shares = (torch.rand(n, device=device) for n in ((2,), (2, 2), (2,)))
    return lambda: ops.progress_factors(scores, last, shares, 1.3, 2.0, owner=[0, 1, 1])


short = small  # No part of it is ever shared out.


def case(inputs: Inputs) -> list[Tensor]:
    """A block has 128 modalities or tensors."""
    written: list[Tensor] = []
    owner = [0, 36] * (2 if inputs.interpreted else 67)
    for dtype, last in itertools.product(WIDE, WIDE):
        # They all rise, so that no sum of progress is near 0.
        before = inputs.normal(37, 37, dtype=last).sigmoid() / 4
        shares = inputs.normal(37, dtype=last)
        for shape in ((37,), (37, 37)):
            scores = 0.5 + inputs.normal(*shape, dtype=dtype).sigmoid() / 2
            if len(shape) == 2:
                scores[0, 5] = scores[36, 7] = torch.nan  # of a whole row results are NaN
            for bound, scale in ((None, torch.float32), (1.0, torch.float64)):
                written += ops.progress_factors(
                    scores, before, shares, 1.3, bound, owner=owner, scale_dtype=scale
                )
    return written


def compiled(inputs: Inputs) -> None:
    for dtype, last in itertools.product(WIDE, WIDE):
        before = inputs.vector(0.1, 0.2, 0.3, 0.4, dtype=last).view(2, 2)
        shares = inputs.vector(1.0, 0.5, dtype=last)
        two = inputs.vector(0.6, 0.7, dtype=dtype)
        table = inputs.vector(0.6, 0.7, 0.8, 0.9, dtype=dtype).view(2, 2)
        for scores, scale in itertools.product((two, table), WIDE):
            ops.progress_factors(scores, before, shares, 1.3, owner=[0, 1, 1], scale_dtype=scale)
