"""shared_information: what variables share with a target, alone and given each other one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._devices import WIDE
from ._arguments import check_sequence
from ._registry import Op
from .joint_entropies import MAX_BINS, are_usual, check_bins, paired_rows


class SharedInformation(NamedTuple):
    """Information of M variables m and a target c, in P problems; float64 if the device has it.

    Attributes:
        nmi: [M, P], 2·I(m; c) / (H(m) + H(c)), in [0, 1]; 0 if both entropies are.
        ncmi: [M, M, P], 2·I(m; c | j) / (H(m | j) + H(c | j)) at [m, j], in [0, 1]; 0 if j
            determines both, as it is on the diagonal.
    """

    nmi: Tensor
    ncmi: Tensor


def _fake(data: Sequence[Tensor], bins: int, conditional_bins: int) -> tuple[Tensor, Tensor]:
    first, count = data[0], len(data) - 1
    wide = WIDE[first.device.type]
    nmi = torch.empty(count, first.shape[0], dtype=wide, device=first.device)
    return nmi, torch.empty(count, count, first.shape[0], dtype=wide, device=first.device)


_op = Op(
    "shared_information",
    "(Tensor[] data, int bins, int conditional_bins) -> (Tensor, Tensor)",
    _fake,
)


def shared_information(
    data: Sequence[Tensor],
    target: Tensor,
    bins: int,
    conditional_bins: int,
    *,
    names: Sequence[str] | None = None,
    backend: str | None = None,
) -> SharedInformation:
    """Normalised mutual information of each variable with a target, alone and given each other one.

    All of it from exact histograms with NumPy's bins, as in `joint_entropies`: one call, in which
    the range of each variable is looked for once (ARM: Gao et al., AAAI 2025). Nothing is
    differentiable.

    Equivalent to, for each m, and each other j::

        nmi[m] = mutual_information(data[m], target, bins).nmi
        given = conditional_mutual_information(data[m], target, data[j], conditional_bins)
        ncmi[m, j] = given.ncmi

    Args:
        data: M ≥ 1 variables [P, N]: P problems with N values each, on one device; float16,
            bfloat16, float32 or float64. Half precision counts as the float32 numbers it holds;
            mixed dtypes are promoted.
        target: Like a variable.
        bins: Of nmi, for each variable: at most 256.
        conditional_bins: Of ncmi: at most 32.
        names: Names of the variables and the target in errors; by default ``data[m]`` and "target".
        backend: Name of a backend; None for the best one.

    Returns:
        `SharedInformation`. NaN for a problem in which a variable that the number is made of holds
        a NaN or an infinite value.

    Raises:
        TypeError: a variable is sparse, integer or complex, or a number of bins no integer.
        ValueError: there is no variable, they differ in shape or device or hold no values, or a
            number of bins is out of range.
    """
    if not isinstance(data, (list, tuple)):
        check_sequence("data", data)
    if not data:
        raise ValueError("data must hold at least one variable")
    bins = check_bins(bins, MAX_BINS[2])
    conditional_bins = check_bins(conditional_bins, MAX_BINS[3], name="conditional_bins")
    rows = [*data, target]
    if not are_usual(rows):
        names = names or [*(f"data[{m}]" for m in range(len(data))), "target"]
        rows = paired_rows(names, rows)
    return SharedInformation(*_op(backend, rows[0].device, rows, bins, conditional_bins))
