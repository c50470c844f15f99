"""Mutual, conditional mutual and co-information of paired values, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..reference.shared_information import normalised
from ._tensors import promoted
from .joint_entropies import (
    MAX_BINS,
    PAIRED,
    check_bins,
    check_mask,
    check_not_empty,
    joint_entropies,
)
from .soft_entropies import soft_entropies

Estimator = Literal["histogram", "soft"]


class MutualInformation(NamedTuple):
    """Fields are 0-d for values [N], [P] for values [P, N]; in nats.

    Attributes:
        mi: I(x; y) = H(x) + H(y) − H(x, y), at least 0.
        h_x: H(x).
        h_y: H(y).
        nmi: 2·I/(H(x) + H(y)), in [0, 1]; 0 if both entropies are.
    """

    mi: Tensor
    h_x: Tensor
    h_y: Tensor
    nmi: Tensor


class ConditionalMutualInformation(NamedTuple):
    """Fields are 0-d for values [N], [P] for values [P, N]; in nats.

    Attributes:
        cmi: I(x; y | z) = H(x, z) + H(y, z) − H(x, y, z) − H(z), at least 0.
        h_x_given_z: H(x | z) = H(x, z) − H(z).
        h_y_given_z: H(y | z).
        ncmi: 2·I/(H(x | z) + H(y | z)), in [0, 1]; 0 if z determines both.
    """

    cmi: Tensor
    h_x_given_z: Tensor
    h_y_given_z: Tensor
    ncmi: Tensor


def mutual_information(
    x: Tensor,
    y: Tensor,
    bins: int,
    estimator: Estimator = "histogram",
    *,
    present: Tensor | None = None,
    backend: str | None = None,
) -> MutualInformation:
    """Plug-in estimate of the mutual information of two variables, from their joint histogram.

    I(x; y) = Σ p(x, y) log (p(x, y) / (p(x) p(y))) over the cells of a bins × bins histogram. With
    N samples the plug-in estimate is too large by about (bins − 1)²/(2N), as far as all cells are
    occupied (Miller 1955), and too small by what happens within a bin.

    Equivalent to, for "histogram" and values [N]::

        p = numpy.histogram2d(x, y, bins)[0] / N
        (p * numpy.log(p / (p.sum(1, keepdims=True) * p.sum(0)))) summed over p > 0

    Args:
        x: [N] values, or [P, N] for P problems in one call; float16, bfloat16, float32 or float64.
        y: Like x.
        bins: Number of bins for each variable, at most 256.
        estimator: "histogram" has NumPy's bins and no gradient. "soft" shares each sample out
            between two neighbouring bins in each dimension (see `soft_histogram`), is
            differentiable once, needs at least 2 bins, and is smaller, since sharing out blurs the
            joint distribution.
        present: [N] or [P, N] bool, which pairs count, for samples that lack one of the variables:
            the estimate is that of the pairs that are there, NaN if there are none. The values
            of the others do not matter, and their gradients are 0.
        backend: Name of a backend; None for the best one.

    Returns:
        `MutualInformation`; float64 for float64, otherwise float32. NaN for a problem in which a
        value is NaN or infinite.

    Raises:
        TypeError: x or y is sparse, integer or complex, bins is no integer, or `present` not bool.
        ValueError: their shapes or devices differ, they are empty, or `bins` or `estimator` is out
            of range.
    """
    rows = _rows("xy", (x, y))
    if estimator == "histogram":
        found = joint_entropies(
            rows, [(0, 1)], bins, names="xy", present=_mask(present, x), backend=backend
        )
        h_x, h_y, h_xy = found.entropies[0].unbind(-1)
    elif estimator == "soft":
        bins = check_bins(bins, MAX_BINS[2], 2)
        soft = soft_entropies(rows[0], rows[1], bins, backend, _mask(present, x))
        h_x, h_y, h_xy = soft.unbind(-1)
    else:
        raise ValueError(f"estimator must be 'histogram' or 'soft', got {estimator!r}")
    mi = (h_x + h_y - h_xy).clamp(min=0)
    return MutualInformation(*_finish(x, rows, mi, h_x, h_y, normalised(2 * mi, h_x + h_y)))


def conditional_mutual_information(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    bins: int,
    *,
    present: Tensor | None = None,
    backend: str | None = None,
) -> ConditionalMutualInformation:
    """Plug-in estimate of I(x; y | z), from the joint histogram of three variables.

    Args:
        x: [N] values, or [P, N] for P problems in one call; float16, bfloat16, float32 or float64.
        y: Like x.
        z: Like x.
        bins: Number of bins for each variable, at most 32; the bins are those of NumPy.
        present: As in `mutual_information`.
        backend: Name of a backend; None for the best one.

    Returns:
        `ConditionalMutualInformation`; float64 for float64, otherwise float32. NaN for a problem in
        which a value is NaN or infinite. Nothing is differentiable.

    Raises:
        TypeError: as `mutual_information`.
        ValueError: as `mutual_information`.
    """
    rows = _rows("xyz", (x, y, z))
    h_xz, h_yz, h_xyz, h_z = _triple(rows, bins, _mask(present, x), backend)[3:]
    cmi = (h_xz + h_yz - h_xyz - h_z).clamp(min=0)
    h_x, h_y = (h_xz - h_z).clamp(min=0), (h_yz - h_z).clamp(min=0)
    ncmi = normalised(2 * cmi, h_x + h_y)
    return ConditionalMutualInformation(*_finish(x, rows, cmi, h_x, h_y, ncmi))


def co_information(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    bins: int,
    *,
    present: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """I(x; y) − I(x; y | z): what z explains of I(x; y), redundancy, minus synergy, what it adds.

    Symmetric in its three variables (McGill 1954, up to the sign). Positive for three copies of one
    variable, negative for z = x XOR y.

    Args:
        x: [N] values, or [P, N] for P problems in one call; float16, bfloat16, float32 or float64.
        y: Like x.
        z: Like x.
        bins: Number of bins for each variable, at most 32; the bins are those of NumPy.
        present: As in `mutual_information`.
        backend: Name of a backend; None for the best one.

    Returns:
        0-d, or [P], in nats; float64 for float64, otherwise float32. NaN for a problem in which a
        value is NaN or infinite. Not differentiable.

    Raises:
        TypeError: as `mutual_information`.
        ValueError: as `mutual_information`.
    """
    rows = _rows("xyz", (x, y, z))
    h_x, h_y, h_xy, h_xz, h_yz, h_xyz, h_z = _triple(rows, bins, _mask(present, x), backend)
    (shared,) = _finish(x, rows, (h_x + h_y - h_xy) - (h_xz + h_yz - h_xyz - h_z))
    return shared


def _triple(
    rows: Sequence[Tensor], bins: int, present: Tensor | None, backend: str | None
) -> tuple[Tensor, ...]:
    """H(x), H(y), H(x,y), H(x,z), H(y,z), H(x,y,z), H(z), each [P] float64."""
    found = joint_entropies(rows, [(0, 1, 2)], bins, names="xyz", present=present, backend=backend)
    h_x, h_y, h_xy, h_z, h_xz, h_yz, h_xyz = found.entropies[0].unbind(-1)
    return h_x, h_y, h_xy, h_xz, h_yz, h_xyz, h_z


def _rows(names: Sequence[str], values: Sequence[Tensor]) -> list[Tensor]:
    """The values as [P, N] of one dtype, checked."""
    rows = promoted(names, values, PAIRED, "[N] or [P, N]", 1, 2)
    check_not_empty(names[0], rows[0])
    return [x if x.dim() == 2 else x.unsqueeze(0) for x in rows]


def _mask(present: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask as [P, N], checked against values that are as the user has given them."""
    if present is None:
        return None
    check_mask(present, x)
    return present if present.dim() == 2 else present.unsqueeze(0)


def _finish(like: Tensor, rows: Sequence[Tensor], *values: Tensor) -> tuple[Tensor, ...]:
    """The values in the shape of the input, and in the library's dtype of results."""
    dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    return tuple((v if like.dim() == 2 else v.squeeze(0)).to(dtype) for v in values)
