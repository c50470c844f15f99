"""soft_histogram: tables that fit in shared memory, and that do not."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import ops
from mmfuse.ops._registry import OPS

from ._inputs import DTYPES, WIDE, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    a, b = torch.randn(2, 4, 3, device=device).unbind()
    ends = torch.tensor([[-9.0, 9.0]], device=device).repeat(4, 1)
    leaves = [t.clone().requires_grad_() for t in (a, b, ends, ends)]
    return {
        "soft_histogram": [
            (a, b, ends, ends, 5),
            (*leaves, 2),
            (a.half(), b.half(), ends, ends, 7),
        ],
        "soft_histogram_backward": [
            (torch.randn(4, 5, 5, device=device), a, b, ends, ends, 5),
            (torch.randn(4, 2, 2, device=device), a.bfloat16(), b.bfloat16(), ends, ends, 2),
        ],
    }


def undefined(device: str) -> Samples:
    unknown = torch.full((2, 3), torch.nan, device=device)
    ends = unknown[:, :2].contiguous()
    return {"soft_histogram": [(unknown, unknown, ends, ends, 4)]}


def small(device: str) -> Small:
    x, y = torch.randn(2, 1, 33, device=device)
    return lambda: ops.soft_histogram(x, y, 5)


def short(device: str) -> Small:
    x, y = torch.randn(2, 3, 9000, device=device)
    return lambda: ops.soft_histogram(x, y, 60)


def case(inputs: Inputs) -> list[Tensor]:
    """The public op widens half precision; the overload under it takes it as it is."""
    forward = OPS["soft_histogram"].overloads[inputs.backend]
    backward = OPS["soft_histogram_backward"].overloads[inputs.backend]
    # Five rows are more than a tile of Triton's has, and do not fill two.
    shapes = [(5, 319, 0), (3, 320, 0), (3, 320, 1)]
    # Beyond 4,096 columns several blocks share a problem.
    shapes += [] if inputs.interpreted else [(2, 4096 + 37, 0), (2, 4096 + 40, 0)]
    written: list[Tensor] = []
    for dtype in DTYPES:
        wide = torch.promote_types(dtype, torch.float32)
        for problems, columns, offset in shapes:
            x, y = (
                inputs.sixteenths(problems, columns, most=4, dtype=dtype, offset=offset)
                for _ in "xy"
            )
            ends = inputs.vector(*[0.0, 4.0] * problems, dtype=wide).view(problems, 2)
            weights = forward(x, y, ends, ends, 5)
            grad = inputs.normal(problems, 5, 5, dtype=wide)
            written += [weights, *backward(grad, x, y, ends, ends, 5)]
    # One table of 50 KiB; one that no block can have; slopes that are not kept in shared memory.
    for bins, columns in () if inputs.interpreted else ((80, 309), (256, 309), (256, 4133)):
        for dtype in WIDE:
            x, y = (
                inputs.sixteenths(2, columns, most=bins - 1, dtype=dtype).requires_grad_()
                for _ in "xy"
            )
            weights = ops.soft_histogram(x, y, bins)
            written += [weights, *torch.autograd.grad(weights.square().sum(), (x, y))]
    return written


def compiled(inputs: Inputs) -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for dtype, shape in (
        (f32, (1, 100_000)),
        (bf16, (64, 309)),
        (f16, (4096, 10)),
        (f64, (1, 100_000)),
    ):
        x, y = (inputs.normal(*shape, dtype=dtype) for _ in "xy")
        wide = torch.promote_types(dtype, f32)
        ends = torch.tensor([[-9.0, 9.0]], dtype=wide).repeat(len(x), 1)
        weights = OPS["soft_histogram"].overloads[inputs.backend](x, y, ends, ends, 5)
        OPS["soft_histogram_backward"].overloads[inputs.backend](weights, x, y, ends, ends, 5)
