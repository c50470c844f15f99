"""logit_divergence: each kind, for pairs of all dtypes and of more rows than a block has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import DTYPES, Inputs, Samples, Small

KINDS = ("kl", "mixture", "js")


def _pairs(device: str) -> list[tuple[list[Tensor], list[Tensor]]]:
    first = [torch.randn(4, c, device=device) for c in (3, 5)]
    second = [torch.randn(4, c, device=device) for c in (3, 5)]
    wide = [z.double() for z in first]
    spread = torch.randn(4, 9, device=device).half()
    return [
        (first, second),
        ([first[0], wide[1]], [second[0], wide[1] + 1]),
        ([spread[:, 2:7]], [spread[:, 1:6]]),
    ]


def arguments(device: str) -> Samples:
    pairs = _pairs(device)
    calls = [(*pair, kind, per_row) for pair in pairs for kind in range(3) for per_row in (0, 1)]
    calls = [(*rest, bool(per_row)) for *rest, per_row in calls]
    (a, b), *_ = pairs
    tracked = [([z.clone().requires_grad_() for z in a], b, kind, False) for kind in range(3)]
    nothing = ([a[0][:0]], [b[0][:0]], 1, True)
    backward = []
    for first, second, kind, per_row in [*calls, nothing]:
        value, rows = torch.ops.mmfuse.logit_divergence.reference(first, second, kind, per_row)
        grad = torch.rand_like(value)
        for to in (True, True), (True, False), (False, True):
            backward.append((grad, rows, first, second, kind, *to))
    return {
        "logit_divergence": [*calls, *tracked, nothing],
        "logit_divergence_backward": backward,
    }


def undefined(device: str) -> Samples:
    nothing = [torch.empty(0, 3, device=device)]
    return {"logit_divergence": [(nothing, nothing, kind, False) for kind in range(3)]}


def small(device: str) -> Small:
    logits = list(torch.randn(4, 9, 5, device=device))
    return lambda: ops.logit_divergence(logits[:2], logits[2:])


def short(device: str) -> Small:
    first, second = [list(torch.randn(2, 16, 800, device=device)) for _ in range(2)]
    leaves = [z.requires_grad_() for z in first]
    return lambda: torch.autograd.grad(ops.logit_divergence(leaves, second).sum(), leaves)


def _both(
    first: Sequence[Tensor], second: Sequence[Tensor], kind: str, per_row: bool
) -> list[Tensor]:
    leaves = [z.requires_grad_() for z in (*first, *second)]
    value = ops.logit_divergence(first, second, kind=kind, per_row=per_row)
    return [value, *torch.autograd.grad(value.sum(), leaves)]


def _made(
    inputs: Inputs, rows: int, classes: Sequence[int], dtype: torch.dtype, offset: int = 0
) -> list[Tensor]:
    return [inputs.normal(rows, c, dtype=dtype, offset=offset) for c in classes]


def case(inputs: Inputs) -> list[Tensor]:
    """A CUDA block has 128 rows, a launch 16 pairs; Triton splits from 9 tiles on."""
    rows, many, tall = (5, 2, 37) if inputs.interpreted else (37, 17, 137)
    written: list[Tensor] = []
    for kind in KINDS:
        first, second = (
            [
                z
                for dtype in DTYPES
                for offset, classes in ((0, (3, 47)), (1, (33, 309)))
                for z in _made(inputs, rows, classes, dtype, offset)
            ]
            for _ in "ab"
        )
        written += _both(first, second, kind, per_row=kind == "js")
        for dtype in (torch.float32, torch.float64):
            pair = (_made(inputs, tall, (600,), dtype) for _ in "ab")
            written += _both(*pair, kind, per_row=False)
    narrow = (_made(inputs, rows, (5,) * many, torch.float32, 1) for _ in "ab")
    return written + _both(*narrow, "mixture", per_row=True)


def compiled(inputs: Inputs) -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for dtype, classes, rows in ((f32, 6, 37), (f32, 309, 37), (bf16, 1000, 137), (f64, 309, 137)):
        for kind in KINDS:
            pair = (_made(inputs, rows, (classes,) * 2, dtype) for _ in "ab")
            _both(*pair, kind, per_row=rows == 37)
    a, b = (inputs.normal(37, 309, dtype=f16) for _ in "ab")
    ops.logit_divergence([a.requires_grad_()], [b]).sum().backward()
    ops.logit_divergence([b], [a]).sum().backward()
    # Rows that overlap: their stride of 1 is a constant.
    _both(*([inputs.normal(40).unfold(0, 4, 1)] for _ in "ab"), "js", per_row=True)
