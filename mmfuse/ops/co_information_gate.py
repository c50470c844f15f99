"""co_information_gate: act only while the modalities say the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._numbers import real
from ._arguments import check_sequence, is_single
from ._registry import Op
from .paired_cosine import aligned


def _fake(features: Sequence[Tensor], threshold: Tensor) -> Tensor:
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    return torch.empty((), dtype=dtype, device=features[0].device)


_op = Op("co_information_gate", "(Tensor[] features, Tensor threshold) -> Tensor", _fake)


def co_information_gate(
    features: Sequence[Tensor], threshold: float | Tensor, *, backend: str | None = None
) -> Tensor:
    """1 where the features of M modalities agree, else 0: RedReg's gate.

    They agree when the mean over all pairs of modalities and over the batch of cos(φ_i^m, φ_i^j) is
    above the threshold. A step function: no gradient flows through it. If samples lack a
    modality, give the rows of those that have all: a row of zeros has the cosine 0, and counts.
    (`RedReg` with ``present`` takes each pair over the samples that have both.)

    Equivalent to, for two modalities, ``(paired_cosine(a, b) > threshold).float()``.

    Args:
        features: M ≥ 2 tensors [B, D] on one device; mixed dtypes are promoted.
        threshold: A number, or a 0-d floating tensor on the same device.
        backend: Name of a backend; None for the best one.

    Returns:
        0-d, 0 or 1, float64 for float64, otherwise float32. 0 for an empty batch and for NaN.

    Raises:
        TypeError: a feature is sparse, integer or complex, or the threshold no number.
        ValueError: fewer than two features, or they are not [B, D] of one shape on one device.
    """
    if not isinstance(features, (list, tuple)):
        check_sequence("features", features)
    names = [f"features[{m}]" for m in range(len(features))]
    return named_gate(names, features, threshold, backend)


def named_gate(
    names: Sequence[str],
    features: Sequence[Tensor],
    threshold: float | Tensor,
    backend: str | None,
) -> Tensor:
    """`co_information_gate`, with errors that call the features by these names."""
    if len(features) < 2:
        raise ValueError(
            f"a gate needs the features of at least two modalities, got {len(features)}"
        )
    with torch.no_grad():
        dense = aligned(names, features)
        if isinstance(threshold, Tensor):
            if not is_single(threshold):
                raise TypeError("threshold must be a number or a dense 0-d floating-point tensor")
            if threshold.is_meta != dense[0].is_meta:
                raise ValueError(f"threshold is on {threshold.device}, not on {dense[0].device}")
            limit = threshold
        else:
            wide = torch.float64 if dense[0].dtype == torch.float64 else torch.float32
            most = torch.finfo(torch.float32).max  # beyond which no cosine is anyway
            number = real("threshold", threshold)
            if abs(number) > most:  # NaN is not, and stays: it lets nothing pass
                number = math.copysign(most, number)
            limit = torch.full((), number, dtype=wide, device=dense[0].device)
        return gate_of_aligned(dense, limit, backend)


def gate_of_aligned(features: list[Tensor], threshold: Tensor, backend: str | None) -> Tensor:
    """`co_information_gate` of features that `aligned` has made, and a 0-d floating threshold."""
    first = features[0]
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    gate: Tensor = _op(backend, first.device, features, threshold.to(first.device, wide))
    return gate
