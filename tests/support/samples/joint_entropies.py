"""joint_entropies: pairs and triples of variables, few bins and many."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import DTYPES, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    a, b = torch.randn(2, 4, 3, device=device).unbind()
    return {
        "joint_entropies": [
            ([a, b], [0, 1], 2, 5),
            ([a, b, a], [2, 1, 0, 2], 2, 1),
            ([a.half(), b.half(), a.half()], [0, 1, 2, 2, 2, 0], 3, 4),
        ]
    }


def undefined(device: str) -> Samples:
    unknown = torch.full((2, 3), torch.nan, device=device)
    return {"joint_entropies": [([unknown, unknown], [0, 1], 2, 4)]}


def small(device: str) -> Small:
    data = list(torch.randn(2, 1, 33, device=device))
    return lambda: ops.joint_entropies(data, [(0, 1)], 5)


def short(device: str) -> Small:
    data = list(torch.randn(2, 1, 32768, device=device))
    return lambda: (ops.joint_entropies(data, [(0, 1)], 30), ops.joint_entropies(data, [(0, 1)], 2))


def case(inputs: Inputs) -> list[Tensor]:
    """Up to 8,192 columns a block has a whole problem; ranges are found in parts of 16,384."""
    shapes = [(3, 309, 0), (3, 320, 0), (3, 320, 1), (1, 47, 0)]
    shapes += [(2, 1033, 0)] if inputs.interpreted else [(2, 8209, 0), (1, 16384 + 43, 0)]
    written: list[Tensor] = []
    for dtype in DTYPES:
        for problems, columns, offset in shapes:
            data = [inputs.normal(problems, columns, dtype=dtype, offset=offset) for _ in range(3)]
            written += ops.joint_entropies(data, [(0, 1), (2, 0), (1, 1)], 5)
            written += ops.joint_entropies(data, [(0, 1, 2), (2, 2, 0)], 4)
            if not inputs.interpreted:  # so few counts that a block has several copies of them
                written += ops.joint_entropies(data, [(2, 1)], 2)
    short = [inputs.normal(3, 309) for _ in range(9)]
    # All pairs of 9 variables take two launches, because a block knows 8 variables.
    every_pair = [(i, j) for i in range(9) for j in range(i)]
    written += ops.joint_entropies(short, every_pair, 6)
    if inputs.interpreted:
        return written
    # More than 48 KiB of shared memory; more than a block can have; more than 64 rows of data.
    written += ops.joint_entropies(short, [(0, 1, 2), (3, 4, 5)], 24)
    long = [inputs.normal(2, 8209) for _ in range(3)]
    written += ops.joint_entropies(long, [(0, 1)], 120)
    written += ops.joint_entropies(long, [(0, 1)], 256)
    written += ops.joint_entropies(long, [(0, 1, 2)], 32)
    written += ops.joint_entropies([*long] * 22, [(0, 65), (64, 1)], 7)
    return written


def compiled(inputs: Inputs) -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for dtype, shape, bins, tuples in (
        (f32, (1, 100_000), 100, [(0, 1)]),
        (bf16, (1, 100_000), 100, [(0, 1)]),
        (f64, (64, 309), 16, [(0, 1, 2)]),
        (f16, (4096, 10), 8, [(0, 1)]),
    ):
        ops.joint_entropies([inputs.normal(*shape, dtype=dtype) for _ in tuples[0]], tuples, bins)
