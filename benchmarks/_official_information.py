"""Provider `official`: ARM's information, and what people write for the other estimators.

As `_official`. ARM copies features to the host, counts with NumPy and adds up in Python; the mutual
information of other values is taken in the same way. InfoNCE is two cross entropies. NumPy's memory
is not PyTorch's: it is missing from the report's extra memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from _information_inputs import (
    CONDITIONAL_BINS,
    TEMPERATURE,
    ContrastInputs,
    FusionInputs,
    ValueInputs,
)
from torch import Tensor
from torch.nn import functional as F


def host(x: Tensor) -> np.ndarray:
    """The values as one row in the host's memory; NumPy has no bfloat16."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.detach().cpu().numpy().flatten()


def entropy(probabilities: Iterable[float]) -> float:
    """Sum of −p log p over what is not zero."""
    return sum(-p * math.log(p) for p in probabilities if p > 0)


def shared(x: np.ndarray, y: np.ndarray, bins: int) -> tuple[float, float, float, float]:
    """Mutual information, both entropies, and the normalised mutual information."""
    counts = np.histogram2d(x, y, bins)[0]
    joint = counts / counts.sum()
    p_x, p_y = joint.sum(axis=1), joint.sum(axis=0)
    mi = 0.0
    for i in range(bins):
        for j in range(bins):
            if joint[i, j] > 0:
                mi += joint[i, j] * math.log(joint[i, j] / (p_x[i] * p_y[j]))
    h_x, h_y = entropy(p_x), entropy(p_y)
    return mi, h_x, h_y, 2 * mi / (h_x + h_y)


def nmi(x: Tensor, y: Tensor, bins: int) -> float:
    """ARM's normalised mutual information."""
    return shared(host(x), host(y), bins)[3]


def entropy_given(joint: np.ndarray) -> float:
    """ARM's H(· | z), z being the last axis: p(z) divides along another one, and is no weight."""
    joint = joint / joint.sum()
    p_z = joint.sum(axis=tuple(range(joint.ndim - 1)))
    p_z = np.where(p_z == 0, 1e-10, p_z)
    return entropy((joint / p_z[:, None, None]).flatten())


def ncmi(x: Tensor, y: Tensor, z: Tensor, bins: int) -> float:
    """ARM's normalised conditional mutual information."""
    rows = host(x), host(y), host(z)
    h_x = entropy_given(np.histogram2d(rows[0], rows[2], bins)[0])
    h_y = entropy_given(np.histogram2d(rows[1], rows[2], bins)[0])
    h_xy = entropy_given(np.histogramdd(rows, bins)[0])
    return (h_x + h_y - h_xy) / (h_x + h_y)


def contrast(a: Tensor, b: Tensor) -> Tensor:
    """InfoNCE as a bound."""
    similarity = a @ b.t() / TEMPERATURE
    partner = torch.arange(len(a), device=a.device)
    loss = F.cross_entropy(similarity, partner) + F.cross_entropy(similarity.t(), partner)
    return math.log(len(a)) - loss / 2


def mutual_information(i: ValueInputs) -> tuple[tuple[float, ...], ...]:
    # One problem after the other; the values are copied at once, which is kind.
    rows = (host(values).reshape(values.shape) for values in (i.x, i.y))
    return tuple(zip(*(shared(x, y, i.bins) for x, y in zip(*rows, strict=True)), strict=True))


def sample_information(i: ValueInputs) -> tuple[tuple[float, ...], ...]:
    return mutual_information(i)


def arm_information(i: FusionInputs) -> tuple[float, ...]:
    a, v, c = i.features
    return (
        nmi(a, c, i.bins),
        nmi(v, c, i.bins),
        ncmi(a, c, v, CONDITIONAL_BINS),
        ncmi(v, c, a, CONDITIONAL_BINS),
    )


def info_nce(i: ContrastInputs) -> tuple[Tensor, ...]:
    bound = contrast(*i.features)
    return bound, *torch.autograd.grad(bound, i.features)
