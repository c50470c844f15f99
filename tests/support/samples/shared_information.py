"""shared_information: one variable and more, few bins and many."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import DTYPES, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    a, b, c = torch.randn(3, 4, 5, device=device).unbind()
    return {
        "shared_information": [
            ([a, b, c], 5, 2),
            ([a, b], 1, 3),
            ([a.half(), b.half(), a.half(), c.half()], 3, 3),
        ]
    }


def undefined(device: str) -> Samples:
    unknown = torch.full((2, 3), torch.nan, device=device)
    return {"shared_information": [([unknown, unknown, unknown], 4, 2)]}


def small(device: str) -> Small:
    *data, target = torch.randn(3, 1, 33, device=device)
    return lambda: ops.shared_information(data, target, 5, 2)


def short(device: str) -> Small:
    *data, target = torch.randn(3, 1, 32768, device=device)
    return lambda: ops.shared_information(data, target, 2, 2)


def case(inputs: Inputs) -> list[Tensor]:
    """Up to 8,192 columns a block has a whole problem; both tables then do without ranges."""
    shapes = [(3, 309, 0), (3, 320, 1), (1, 47, 0)]
    shapes += [(2, 1033, 0)] if inputs.interpreted else [(2, 8209, 0), (1, 16384 + 43, 0)]
    written: list[Tensor] = []
    for dtype in DTYPES:
        for problems, columns, offset in shapes:
            data = [inputs.normal(problems, columns, dtype=dtype, offset=offset) for _ in range(4)]
            written += ops.shared_information(data[:2], data[3], 5, 2)
            written += ops.shared_information(data[:3], data[3], 3, 4)
    written += ops.shared_information(data[:1], data[1], 9, 2)
    if inputs.interpreted:
        return written
    # One of the two tables does not fit into a block's shared memory, the other does.
    short = [inputs.normal(3, 309) for _ in range(3)]
    written += ops.shared_information(short[:2], short[2], 256, 2)
    written += ops.shared_information(short[:2], short[2], 2, 32)
    return written


def compiled(inputs: Inputs) -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for dtype, shape in ((f32, (1, 32768)), (bf16, (1, 32768)), (f16, (64, 309)), (f64, (64, 309))):
        *data, target = (inputs.normal(*shape, dtype=dtype) for _ in range(3))
        ops.shared_information(data, target, 30, 2)
