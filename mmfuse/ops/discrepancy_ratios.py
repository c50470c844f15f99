"""discrepancy_ratios: how far each modality is ahead of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from ._registry import Op
from ._tensors import check_dense


def _fake(scores: Tensor) -> Tensor:
    return torch.empty_like(scores)


_op = Op("discrepancy_ratios", "(Tensor scores) -> Tensor", _fake)


def discrepancy_ratios(scores: Tensor, *, backend: str | None = None) -> Tensor:
    """ρ_m, the mean over j ≠ m of S_m / S_j.

    For two modalities this is the ratio of OGM-GE (Peng et al., CVPR 2022, Eq. 8-9), for more the
    mean ratio of Wei et al. (TPAMI 2024, Eq. 7). Not differentiable: it decides, it is not trained.

    Equivalent to ``((s[:, None] / s).sum(1) - 1) / (len(s) - 1)``.

    Args:
        scores: [M] non-negative scores, float32 or float64, M ≥ 2.
        backend: Name of a backend; None for the best one.

    Returns:
        [M], like `scores`. A score of 0 makes the others' ratios infinite.

    Raises:
        TypeError: `scores` is not float32 or float64.
        ValueError: `scores` is not one-dimensional with at least two entries.
    """
    check_scores(scores)
    ratios: Tensor = _op(backend, scores.device, scores.detach().contiguous())
    return ratios


def check_scores(scores: Tensor) -> None:
    """Raises what `discrepancy_ratios` raises for scores that it cannot take."""
    if not isinstance(scores, Tensor) or scores.dtype not in (torch.float32, torch.float64):
        raise TypeError("scores must be a float32 or float64 tensor")
    check_dense("scores", scores)
    if scores.dim() != 1 or scores.shape[0] < 2:
        raise ValueError(f"scores must have shape [M] with M >= 2, got {list(scores.shape)}")
