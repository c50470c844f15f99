"""soft_entropies: rows of one part and of several, tables of several tiles, constants, masks."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import ops
from mmfuse.ops._registry import OPS

from ._inputs import WIDE, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    a, b = torch.randn(2, 4, 3, device=device).unbind()
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    weights = torch.rand(4, 5, 5, device=device)
    ends = torch.stack([a.amin(1), a.amax(1)], 1), torch.stack([b.amin(1), b.amax(1)], 1)
    present = torch.ones(4, 3, dtype=torch.bool, device=device)
    present[1, 2], present[3, 1:] = False, False
    backward = torch.randn(4, 3, device=device), a, b, weights, *ends
    return {
        "soft_entropies": [
            (a, b, 5),
            (*leaves, 2),
            (*leaves, 3, present),
            (a.double(), b.double(), 7),
        ],
        "soft_entropies_backward": [backward, (*backward, present)],
    }


def undefined(device: str) -> Samples:
    unknown = torch.full((2, 3), torch.nan, device=device)
    nobody = torch.zeros(1, 3, dtype=torch.bool, device=device)
    known = torch.arange(3.0, device=device).view(1, 3)
    return {"soft_entropies": [(unknown, unknown, 4), (known, known, 4, nobody)]}


def small(device: str) -> Small:
    x, y = torch.randn(2, 1, 33, device=device)
    return lambda: ops.mutual_information(x, y, 5, "soft")


def short(device: str) -> Small:
    x, y = torch.randn(2, 1, 20000, device=device)
    return lambda: ops.mutual_information(x, y, 30, "soft")


def case(inputs: Inputs) -> list[Tensor]:
    """Several blocks share a row of 4,136, and look for the ends of one beyond 32,768 columns."""
    forward = OPS["soft_entropies"].overloads[inputs.backend]
    backward = OPS["soft_entropies_backward"].overloads[inputs.backend]
    shapes = [(3, 319, 5), (2, 40, 70)]
    shapes += [] if inputs.interpreted else [(2, 4096 + 40, 6), (2, 32768 + 37, 6)]
    written: list[Tensor] = []
    for dtype in WIDE:
        for problems, columns, bins in shapes:
            x, y = (inputs.sixteenths(problems, columns, most=bins - 1, dtype=dtype) for _ in "xy")
            x[1] = 2.0
            entropies, *known = forward(x, y, bins)
            grad = inputs.normal(problems, 3, dtype=dtype)
            written += [entropies, *known, *backward(grad, x, y, *known)]
            # The values that do not count are NaN; one row has a single one that does.
            present = inputs.mask(problems, columns)
            present[0, 1:], present[0, 0] = False, True
            x, y = (v.masked_fill(~present, torch.nan) for v in (x, y))
            entropies, *known = forward(x, y, bins, present)
            written += [entropies, *known, *backward(grad, x, y, *known, present)]
    return written


def compiled(inputs: Inputs) -> None:
    for dtype in WIDE:
        for shape, bins in (((1, 100_000), 30), ((64, 309), 5)):
            x, y = (inputs.normal(*shape, dtype=dtype) for _ in "xy")
            present = inputs.mask(*shape)
            for mask in ((), (present,)):
                entropies, *known = OPS["soft_entropies"].overloads[inputs.backend](
                    x, y, bins, *mask
                )
                OPS["soft_entropies_backward"].overloads[inputs.backend](
                    entropies, x, y, *known, *mask
                )
