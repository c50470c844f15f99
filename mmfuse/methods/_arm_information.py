"""ARM's information, which each modality shares with the fused representation.

nmi_m = 2 I(m; c) / (H(m) + H(c)) and ncmi_m, the same given another modality j, mean over j != m;
and the released code's ncmi. `mmfuse.methods.arm` has the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from .._devices import WIDE
from ..ops._tensors import kept_tensor
from ..ops.joint_entropies import JointEntropies, joint_entropies
from ..ops.shared_information import shared_information
from ..reference.shared_information import normalised
from ._means import mean_where


class Complete(NamedTuple):
    """The modalities and values that count if samples miss some of them.

    Attributes:
        here: [M, P] bool, the modalities of each problem: in a batch those that some sample has, on
            any rank.
        values: [P, N] bool, those of samples that have all of these; None for all values.
    """

    here: Tensor
    values: Tensor | None = None


class Histograms(NamedTuple):
    """Joint entropies that the information is made of; M modalities m, j and c, the fused one.

    Attributes:
        pairs: Of (m, c).
        triples: Of (m, j, c), one for each of `others`.
        others: Pairs (m, j) with m < j.
    """

    pairs: JointEntropies
    triples: JointEntropies
    others: list[tuple[int, int]]


def histograms(
    rows: Sequence[Tensor],
    bins: int,
    conditional_bins: int,
    backend: str | None,
    complete: Complete | None = None,
) -> Histograms:
    """Two launches' worth; arguments and errors are those of `normalised_information`."""
    c = len(rows) - 1
    present = None
    if complete is not None:
        present = complete.values
        # Nothing is known about a modality that nobody has.
        each = zip(rows[:c], complete.here.unbind(), strict=True)
        rows = [*(torch.where(here.unsqueeze(1), x, torch.nan) for x, here in each), rows[c]]
    pairs = joint_entropies(
        rows, [(m, c) for m in range(c)], bins, present=present, backend=backend
    )
    others = list(combinations(range(c), 2))
    triples = joint_entropies(
        rows, [(m, j, c) for m, j in others], conditional_bins, present=present, backend=backend
    )
    return Histograms(pairs, triples, others)


def normalised_information(
    rows: Sequence[Tensor],
    bins: int = 30,
    conditional_bins: int = 2,
    *,
    complete: Complete | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """nmi_m and ncmi_m of all modalities, in one call of an op where all values count.

    Args:
        rows: M + 1 tensors [P, N]: the paired values of each modality, and last those of the fused
            representation; P problems in one call.
        bins: Of nmi.
        conditional_bins: Of ncmi.
        complete: The samples that count; None for all.
        backend: Name of a backend; None for the best one.

    Returns:
        Two tensors [M, P] float64.

    Raises:
        TypeError: as `mmfuse.ops.joint_entropies`.
        ValueError: as `mmfuse.ops.joint_entropies`.
    """
    if complete is None:
        found = shared_information(rows[:-1], rows[-1], bins, conditional_bins, backend=backend)
        if len(rows) == 3:  # [0, 1] and [1, 0] are all there is
            return found.nmi, found.ncmi.view(4, -1)[1:3]
        # The diagonal is 0.
        return found.nmi, found.ncmi.sum(1) / (len(rows) - 2)
    # The op knows no mask: from counts, out of which `joint_entropies` takes what does not count.
    pairs, triples, others = histograms(rows, bins, conditional_bins, backend, complete)
    of_triples = kept_tensor(_OF_TRIPLES, (7, 4), triples.entropies.dtype, triples.entropies.device)
    given = (triples.entropies @ of_triples).chunk(2, -1)
    all_of_them = normalised(*torch.cat([nmi_terms(pairs), *given]).unbind(-1))
    nmi, forth, back = all_of_them.split([len(rows) - 1, len(others), len(others)])
    return nmi, mean_over_others(others, forth, back, complete)


def nmi_terms(pairs: JointEntropies) -> Tensor:
    """[M, P, 2]: 2 I(m; c), and H(m) + H(c)."""
    of_pairs = kept_tensor(_OF_PAIRS, (3, 2), pairs.entropies.dtype, pairs.entropies.device)
    return pairs.entropies @ of_pairs


# Products of entropies with these are 2 I and the sum of both entropies: [3, 2] from H(m), H(c),
# H(m, c); [7, 4] from those of (m, j, c), once for (m; c | j) and once for (j; c | m). One product
# costs less than the sums one by one.
# fmt: off
_OF_PAIRS = (2, 1,  2, 1,  -2, 0)
_OF_TRIPLES = (
    0, 0, -2, -2,  # H(m)
    -2, -2, 0, 0,  # H(j)
    2, 1, 2, 1,  # H(m, j)
    0, 0, 0, 0,  # H(c)
    0, 0, 2, 1,  # H(m, c)
    2, 1, 0, 0,  # H(j, c)
    -2, 0, -2, 0,  # H(m, j, c)
)
# fmt: on


def mean_over_others(
    others: Sequence[tuple[int, int]],
    forth: Tensor,
    back: Tensor,
    complete: Complete | None = None,
) -> Tensor:
    """Means over j of what m shares with c given j: [M, P] from the pairs (m, j) and (j, m)."""
    if len(others) == 1 and complete is None:
        return torch.cat([forth, back])
    count = max(j for _, j in others) + 1
    given: list[list[Tensor]] = [[] for _ in range(count)]
    known: list[list[int]] = [[] for _ in range(count)]
    for q, (m, j) in enumerate(others):
        given[m].append(forth[q])
        given[j].append(back[q])
        known[m].append(j)
        known[j].append(m)
    if complete is None:
        return torch.stack([torch.stack(each).mean(0) for each in given])
    here = torch.stack([torch.stack([complete.here[j] for j in each]) for each in known])
    return mean_where(here, torch.stack([torch.stack(each) for each in given]), 1)


def released_ncmi(counts: Tensor) -> Tensor:
    """Ncmi as the released code of ARM computes it, in closed form.

    With p = counts / n, h(v) = −v ln v, and the margins of z, where a zero is taken as 1e-10::

        C3 = sum over x, y, z of h(p_xyz / p_z[x])           (the index of x, not of z)
        C2(q) = sum over k, i, j of h(q_ij / p_z[k])         (unweighted, for every k)
        ncmi = 1 - C3 / (C2(p_xz) + C2(p_yz))

    Args:
        counts: [..., bins, bins, bins] of (x, y, z) = (modality, fused, other modality).

    Returns:
        [...] float64; NaN for counts of zero. Close to 1 where most values lie in one bin, as they
        do after a ReLU, whatever x and y share; not bounded.
    """
    p = counts.to(WIDE[counts.device.type])
    p = p / p.sum((-3, -2, -1), keepdim=True)
    p_z = p.sum((-3, -2))
    p_z = torch.where(p_z == 0, 1e-10, p_z)
    joint = _h(p / p_z[..., :, None, None]).sum((-3, -2, -1))

    def pair(q: Tensor) -> Tensor:
        return _h(q[..., None, :, :] / p_z[..., :, None, None]).sum((-3, -2, -1))

    return 1 - joint / (pair(p.sum(-2)) + pair(p.sum(-3)))


def _h(v: Tensor) -> Tensor:
    minus_h: Tensor = torch.special.xlogy(v, v)
    return -minus_h
