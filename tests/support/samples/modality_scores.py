"""modality_scores: logits of several widths and dtypes, labels that are ignored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import DTYPES, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    logits = [torch.randn(4, c, device=device) for c in (3, 5)]
    tracked = [z.clone().requires_grad_() for z in logits]
    labels = torch.tensor([0, 1, -100, 2], device=device)
    two = torch.rand(2, device=device)
    return {
        "modality_scores": [(logits, labels), (tracked, labels)],
        "modality_scores_backward": [(two, two.flip(0), logits, labels)],
    }


def _scores(inputs: Inputs, logits: Sequence[Tensor], rows: int) -> list[Tensor]:
    leaves = [z.requires_grad_() for z in logits]
    labels = torch.arange(rows, device=inputs.device) % 3
    labels[1] = -100
    scores = ops.modality_scores(leaves, labels)
    return [*scores, *torch.autograd.grad(scores.prob.sum() + scores.log_prob.sum(), leaves)]


def small(device: str) -> Small:
    logits = list(torch.randn(2, 9, 5, device=device))
    labels = torch.arange(9, device=device) % 5
    return lambda: ops.modality_scores(logits, labels)


def case(inputs: Inputs) -> list[Tensor]:
    """A CUDA block has 128 rows, a launch 16 modalities; Triton splits from 9 tiles on."""
    rows, many, tall = (5, 2, 37) if inputs.interpreted else (37, 17, 137)
    mixed = [
        inputs.normal(rows, classes, dtype=dtype, offset=offset)
        for dtype in DTYPES
        for offset, classes in ((0, 3), (1, 33), (0, 47), (0, 309))
    ]
    narrow = [inputs.normal(rows, 5, offset=1) for _ in range(many)]
    written = [*_scores(inputs, mixed, rows), *_scores(inputs, narrow, rows)]
    for dtypes in ((torch.float32, torch.float16), (torch.float64,)):
        wide = [inputs.normal(tall, 600, dtype=dtype) for dtype in dtypes]
        written += _scores(inputs, wide, tall)
    return written


def compiled(inputs: Inputs) -> None:
    """A tile of 309 classes has 8 rows."""
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for dtypes, classes, rows in (
        ((f32, f32), 6, 37),
        ((f32, f32), 309, 37),
        ((f32, bf16), 309, 37),
        ((f16, f16, f16), 1000, 137),
        ((f64, f32), 309, 137),
        ((f64, bf16), 1000, 37),
    ):
        _scores(inputs, [inputs.normal(rows, classes, dtype=dtype) for dtype in dtypes], rows)
