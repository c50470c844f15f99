"""ARM's information: what each modality shares with the fused representation.

nmi_m = 2 I(m; c) / (H(m) + H(c)) and ncmi_m, the same given another modality j, mean over j != m;
and the released code's ncmi. `mmfuse.methods.arm` has the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ..ops._tensors import kept_tensor
from ..ops.joint_entropies import joint_entropies
from ..ops.mutual_information import normalised


def normalised_information(
    rows: Sequence[Tensor],
    bins: int = 30,
    conditional_bins: int = 2,
    *,
    released: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """nmi_m and ncmi_m of all modalities, from two launches' worth of histograms.

    Args:
        rows: M + 1 tensors [P, N]: the paired values of each modality, and last those of the fused
            representation; P problems in one call.
        bins: Of nmi.
        conditional_bins: Of ncmi.
        released: Take the released code's ncmi (see `released_ncmi`).
        backend: Name of a backend; None for the best one.

    Returns:
        Two tensors [M, P] float64.

    Raises:
        TypeError: as `mmfuse.ops.joint_entropies`.
        ValueError: as `mmfuse.ops.joint_entropies`.
    """
    c = len(rows) - 1
    pairs = joint_entropies(rows, [(m, c) for m in range(c)], bins, backend=backend)
    others = list(combinations(range(c), 2))
    triples = joint_entropies(
        rows, [(m, j, c) for m, j in others], conditional_bins, backend=backend
    )
    of_pairs, of_triples = _combinations(pairs.entropies.device)
    shared = pairs.entropies @ of_pairs
    if released:
        n = triples.counts.unflatten(-1, [conditional_bins] * 3)
        nmi = normalised(*shared.unbind(-1))
        ncmi = [released_ncmi(n.permute(0, 1, 2, 4, 3)), released_ncmi(n.permute(0, 1, 3, 4, 2))]
    else:
        given = (triples.entropies @ of_triples).chunk(2, -1)
        all_of_them = normalised(*torch.cat([shared, *given]).unbind(-1))
        nmi, *ncmi = all_of_them.split([c, len(others), len(others)])
    return nmi, torch.cat(ncmi) if c == 2 else _mean_of_pairs(others, *ncmi)


def _combinations(device: torch.device) -> tuple[Tensor, Tensor]:
    """Products of entropies with these are 2 I and the sum of both entropies.

    [3, 2] from H(m), H(c), H(m,c); [7, 4] from those of (m, j, c), once for (m; c | j) and once for
    (j; c | m). One product costs less than the sums one by one.
    """
    return (
        kept_tensor(_OF_PAIRS, (3, 2), torch.float64, device),
        kept_tensor(_OF_TRIPLES, (7, 4), torch.float64, device),
    )


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


def _mean_of_pairs(others: Sequence[tuple[int, int]], forth: Tensor, back: Tensor) -> Tensor:
    """Means over j of what m shares with c given j: [M, P] from the pairs (m, j) and (j, m)."""
    count = max(j for _, j in others) + 1
    given: list[list[Tensor]] = [[] for _ in range(count)]
    for q, (m, j) in enumerate(others):
        given[m].append(forth[q])
        given[j].append(back[q])
    return torch.stack([torch.stack(each).mean(0) for each in given])


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
    p = counts.double()
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
