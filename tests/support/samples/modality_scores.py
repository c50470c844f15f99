"""modality_scores and its kin: every kind of target, and logits in every layout and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import DTYPES, Inputs, Samples, Small

#: The operators' last arguments in a call without keywords.
PLAIN = (None, None, -100, False)


def _kinds(device: str) -> list[tuple[Any, ...]]:
    """Arguments of each kind of target, in each order of memory."""
    pair = [torch.randn(4, c, device=device) for c in (3, 5)]
    indices = torch.tensor([0, 1, -100, 2], device=device)
    weight = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64, device=device)
    along_rows = [torch.randn(2, 3, 5, device=device).to(d) for d in (torch.float32, torch.float64)]
    along_classes = [z.transpose(1, 2).contiguous().transpose(1, 2) for z in along_rows]
    places = torch.tensor([[0, 1, 2, 7, 1], [2, 2, 7, 0, 1]], device=device)
    shares = torch.rand(2, 3, 5, device=device)
    shares = shares / shares.sum(1, keepdim=True)
    yes = (torch.rand(2, 3, 5, device=device) > 0.5).float()
    return [
        (pair, indices, *PLAIN),
        (along_rows, places, weight, None, 7, False),
        (along_classes, places, None, None, 7, False),
        ([pair[0]], torch.rand(4, 3, device=device), *PLAIN),
        (along_rows, shares, weight, None, -100, False),
        (along_classes, shares, None, None, -100, False),
        ([pair[1].half()], pair[1].sigmoid().half(), None, None, -100, True),
        ([pair[0][:, :1].contiguous()], yes[0, 0, :4].unsqueeze(1), None, None, -100, True),
        (along_rows, yes, weight, weight + 1, -100, True),
        (along_classes, yes, weight, None, -100, True),
    ]


def arguments(device: str) -> Samples:
    kinds = _kinds(device)
    tracked = [([z.clone().requires_grad_() for z in zs], *others) for zs, *others in kinds]
    count = torch.tensor(3.0, dtype=torch.float64, device=device)
    slopes = [torch.rand(len(kind[0]), device=device) for kind in kinds]
    indices = [kind for kind in kinds if kind[1].dtype == torch.int64]
    return {
        "modality_accuracies": indices,
        "modality_scores": [*kinds, *tracked],
        "modality_scores_backward": [
            (slope, slope.flip(0) - 1, count, *kind)
            for slope, kind in zip(slopes, kinds, strict=True)
        ],
        "sample_scores": kinds,
        "sample_statistics": indices,
    }


def _gradients(leaves: Sequence[Tensor], scores: ops.ModalityScores) -> list[Tensor]:
    loss = scores.prob.sum() + scores.log_prob.sum()
    return [*scores, *torch.autograd.grad(loss, leaves)]


def _scores(inputs: Inputs, logits: Sequence[Tensor], rows: int) -> list[Tensor]:
    leaves = [z.requires_grad_() for z in logits]
    labels = torch.arange(rows, device=inputs.device) % 3
    labels[1] = -100
    accurate = ops.modality_accuracies(leaves, labels)
    return [*accurate, *_gradients(leaves, ops.modality_scores(leaves, labels))]


def _every_kind(
    inputs: Inputs, shape: tuple[int, int, int], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """All targets, with weights, for logits along the rows and along the classes."""
    n, classes, d = shape
    written = []
    weight = inputs.normal(classes).abs() + 0.5
    places = (torch.arange(n * d, device=inputs.device) % (classes + 1)).view(n, d)
    shares = inputs.normal(*shape).softmax(1)
    targets: list[tuple[Tensor, dict[str, Any]]] = [
        (places, {"ignore_index": classes}),
        (places, {"ignore_index": classes, "weight": weight}),
        (shares.to(dtypes[0]), {"weight": weight}),
        (shares.to(dtypes[-1]), {"multilabel": True, "weight": weight, "pos_weight": 1 + weight}),
    ]
    turn: list[Callable[[Tensor], Tensor]] = [
        lambda z: z,
        lambda z: z.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    for turned in turn:
        for labels, keywords in targets:
            logits = [inputs.normal(*shape, dtype=dtype, offset=1) for dtype in dtypes]
            leaves = [turned(z).requires_grad_() for z in logits]
            written += _gradients(leaves, ops.modality_scores(leaves, labels, **keywords))
            indices = labels.dtype == torch.int64
            found = ops.sample_scores(leaves, labels, **keywords, statistics=indices)
            written += [x for x in found if x is not None]
            if indices:
                written += ops.sample_scores(leaves, labels, **keywords)[:3]
                written += ops.modality_accuracies(leaves, labels, **keywords)
    return written


def small(device: str) -> Small:
    logits = list(torch.randn(2, 9, 5, device=device))
    labels = torch.arange(9, device=device) % 5
    return lambda: ops.modality_scores(logits, labels)


def short(device: str) -> Small:
    logits = [z.requires_grad_() for z in torch.randn(2, 32, 800, device=device)]
    labels = torch.arange(32, device=device)

    def call() -> object:
        for statistics in (False, True):
            ops.sample_scores(logits, labels, statistics=statistics)
        ops.modality_accuracies(logits, labels)
        return torch.autograd.grad(ops.modality_scores(logits, labels).log_prob.sum(), logits)

    return call


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
    if inputs.interpreted:
        written += _every_kind(inputs, (2, 3, 5), DTYPES)
        return written + _every_kind(inputs, (1, 37, 3), (torch.float32,))
    for shape in ((3, 5, 47), (2, 47, 3), (1, 309, 143)):
        written += _every_kind(inputs, shape, DTYPES)
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
    for shape, dtypes in (
        ((2, 21, 600), (f32, bf16)),
        ((2, 1000, 12), (bf16,)),
        ((2, 5, 9), (f64,)),
    ):
        _every_kind(inputs, shape, dtypes)
    # Sizes and strides of 1, which are constants: a single label, and a single row of stride 1.
    single = inputs.normal(4, 1).t()
    label = torch.zeros(1, dtype=torch.int64, device=inputs.device)
    ops.modality_accuracies([single], label)
    ops.modality_scores([single.requires_grad_()], label).prob.sum().backward()
    for statistics in (False, True):
        ops.sample_scores([single.detach()], label, statistics=statistics)
    z, yes = inputs.normal(37, 1).requires_grad_(), inputs.normal(37, 1) > 0
    ops.modality_scores([z], yes.float(), multilabel=True).prob.sum().backward()
    ops.sample_scores([z], yes.float(), multilabel=True)
