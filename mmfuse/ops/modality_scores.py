"""modality_scores: how sure each modality is of the true class, in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.modality_scores import IGNORED_LABEL
from ._eager import Eager
from ._registry import Op
from ._tensors import FLOATING, why_unsupported


class ModalityScores(NamedTuple):
    """Scores of M modalities, each field [M].

    Attributes:
        prob: Mean over the batch of the true class's softmax probability.
        log_prob: Mean over the batch of its logarithm, in nats.
    """

    prob: Tensor
    log_prob: Tensor


def _fake(logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    wide = any(z.dtype == torch.float64 for z in logits)
    dtype = torch.float64 if wide else torch.float32
    prob = torch.empty(len(logits), dtype=dtype, device=labels.device)
    return prob, torch.empty_like(prob)


def _fake_backward(
    grad_prob: Tensor, grad_log_prob: Tensor, logits: Sequence[Tensor], labels: Tensor
) -> list[Tensor]:
    return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in logits]


_op = Op("modality_scores", "(Tensor[] logits, Tensor labels) -> (Tensor, Tensor)", _fake)
_backward_op = Op(
    "modality_scores_backward",
    "(Tensor grad_prob, Tensor grad_log_prob, Tensor[] logits, Tensor labels) -> Tensor[]",
    _fake_backward,
    module="modality_scores",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, labels = inputs
    ctx.save_for_backward(labels, *logits)


def _backward(backend: str, ctx: Any, grad_prob: Tensor, grad_log_prob: Tensor) -> Any:
    labels, *logits = ctx.saved_tensors
    both = grad_prob.contiguous(), grad_log_prob.contiguous()
    return _backward_op(backend, labels.device, *both, logits, labels), None


_op.register_autograd(_backward, _setup_context)
_backward_op.register_no_second_derivative()


def modality_scores(
    logits: Sequence[Tensor], labels: Tensor, *, backend: str | None = None
) -> ModalityScores:
    """Batch means of the true class's softmax probability and of its logarithm, per modality.

    Equivalent to, for each modality's logits z::

        p = z.softmax(1)[torch.arange(len(labels)), labels]
        p.mean(), p.log().mean()

    prob is the score S_m of OGM-GE (Peng et al., CVPR 2022, Eq. 8) divided by the batch size, which
    leaves every ratio as it is; log_prob is the performance of InfoReg (CVPR 2025, Eq. 8).
    Differentiable in the logits, once.

    Args:
        logits: M tensors [B, C]; float16, bfloat16, float32 or float64. C may differ.
        labels: [B] integer class indices; rows labelled −100 do not count.
        backend: Name of a backend; None for the best one.

    Returns:
        `ModalityScores`, float64 if some logits are, otherwise float32. NaN where no row counts.

    Raises:
        TypeError: logits or labels have an unsupported dtype or layout.
        ValueError: shapes do not match, or, on the CPU, a label is out of range. On other devices
            looking would cost a synchronisation; the scores of that modality are NaN there.
    """
    return named_scores([f"logits[{m}]" for m in range(len(logits))], logits, labels, backend)


def named_scores(
    names: Sequence[str], logits: Sequence[Tensor], labels: Tensor, backend: str | None
) -> ModalityScores:
    """`modality_scores`, with errors that call the logits by these names."""
    if not logits:
        raise ValueError("logits must hold at least one modality")
    for name, z in zip(names, logits, strict=True):
        if not isinstance(z, Tensor) or z.layout is not torch.strided or z.dtype not in FLOATING:
            raise TypeError(f"{name} {why_unsupported(z)}")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"labels must be an integer tensor of class indices, got {kind}{_hint(labels)}"
        )
    if labels.dim() != 1:
        raise ValueError(
            f"labels must be class indices [B], got shape {list(labels.shape)}{_hint(labels)}"
        )
    dense = []
    for name, z in zip(names, logits, strict=True):
        if z.dim() != 2 or z.shape[1] < 2:
            raise ValueError(
                f"{name} must have shape [B, C] with C of at least 2, got {list(z.shape)}"
                + ("; one logit z for two classes is F.pad(z, (1, 0))" * (z.shape[1:] == (1,)))
            )
        if z.shape[0] != labels.shape[0]:
            raise ValueError(f"{name} has {z.shape[0]} rows, labels {labels.shape[0]}")
        if z.device != labels.device:
            raise ValueError(f"{name} is on {z.device}, labels on {labels.device}")
        # Calls into PyTorch that are not needed are left out: together they cost what the op does.
        dense.append(z if z.is_contiguous() else z.contiguous())
    labels = labels if labels.dtype is torch.int64 else class_indices(labels)
    labels = labels if labels.is_contiguous() else labels.contiguous()
    prob, log_prob = _op(backend, labels.device, dense, labels)
    on_cpu = labels.device.type == "cpu"
    compiled = type(backend) is not Eager and torch.compiler.is_compiling()
    # An impossible label has given NaN; to look at every label first would cost more.
    if on_cpu and not compiled and any(map(math.isnan, prob.tolist())):
        _check_range(names, logits, labels)
    return ModalityScores(prob, log_prob)


def _hint(labels: object) -> str:
    """The way out for labels that are one-hot, or look so."""
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return ""
    way = "of one-hot labels take labels.argmax(1)" if labels.shape[1] > 1 else "use squeeze(1)"
    return f"; {way}"


def class_indices(labels: Tensor) -> Tensor:
    """The labels as int64: in uint8, class 156 would equal −100, which marks a row to ignore."""
    return labels.to(torch.int64)


def _check_range(names: Sequence[str], logits: Sequence[Tensor], labels: Tensor) -> None:
    for name, z in zip(names, logits, strict=True):
        wrong = ((labels < 0) | (labels >= z.shape[1])) & (labels != IGNORED_LABEL)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"labels[{i}] = {int(labels[i])} is out of range for {name} "
                f"with {z.shape[1]} classes ({IGNORED_LABEL} marks a row to ignore)"
            )
