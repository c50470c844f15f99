"""ARM (AAAI 2025): Gao-xiyuan/ARM at a96d0ad.

Features are copied to the host for every estimate, counted with NumPy and added up in Python. The
weights are numbers; nothing reaches the neck. The conditional entropy divides by p(z) along the
wrong axis, and does not weight with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .networks import Network
from .ogm import batch_scores

#: The information shared with the fused feature, and the conditional one, have these bins.
BINS, CONDITIONAL_BINS = 30, 2


class Contributions(NamedTuple):
    """Pairs are audio, visual."""

    nmi: tuple[float, float]
    ncmi: tuple[float, float]
    gains: tuple[float, float]
    weights: tuple[float, float]


class Step(NamedTuple):
    """Results of a step."""

    #: Audio, visual, fused.
    features: tuple[Tensor, Tensor, Tensor]
    scores: tuple[float, float, float]
    found: Contributions
    logits: Tensor
    loss: Tensor


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


def nmi(x: Tensor, y: Tensor, bins: int = BINS) -> float:
    """Normalised mutual information."""
    return shared(host(x), host(y), bins)[3]


def entropy_given(joint: np.ndarray) -> float:
    """The release's H(· | z), z being the last axis."""
    joint = joint / joint.sum()
    p_z = joint.sum(axis=tuple(range(joint.ndim - 1)))
    p_z = np.where(p_z == 0, 1e-10, p_z)
    return entropy((joint / p_z[:, None, None]).flatten())


def ncmi(x: Tensor, y: Tensor, z: Tensor, bins: int = CONDITIONAL_BINS) -> float:
    """Normalised conditional mutual information."""
    rows = host(x), host(y), host(z)
    h_x = entropy_given(np.histogram2d(rows[0], rows[2], bins)[0])
    h_y = entropy_given(np.histogram2d(rows[1], rows[2], bins)[0])
    h_xy = entropy_given(np.histogramdd(rows, bins)[0])
    return (h_x + h_y - h_xy) / (h_x + h_y)


def information(a: Tensor, v: Tensor, c: Tensor, bins: int = BINS) -> tuple[float, ...]:
    """Nmi of audio and visual with the fused feature `c`, and both ncmi, given the other."""
    return nmi(a, c, bins), nmi(v, c, bins), ncmi(a, c, v), ncmi(v, c, a)


def contributions(
    a: Tensor, v: Tensor, c: Tensor, scores: tuple[float, float, float], bins: int = BINS
) -> Contributions:
    """The contributions from features and their scores; neither clamped nor bounded."""
    p_a, p_v, p_c = scores
    nmi_a, nmi_v, ncmi_a, ncmi_v = information(a, v, c, bins)
    gain_a = p_c * nmi_a + p_v * (nmi_a - ncmi_a)
    gain_v = p_c * nmi_v + p_a * (nmi_v - ncmi_v)
    weights = gain_v / gain_a, gain_a / gain_v
    return Contributions((nmi_a, nmi_v), (ncmi_a, ncmi_v), (gain_a, gain_v), weights)


def mean_scores(logits: Iterable[Tensor], labels: Tensor) -> tuple[float, ...]:
    """Means of the true class's probability, on the host."""
    return tuple(s.item() / len(labels) for s in batch_scores(list(logits), labels))


def step(
    model: Network,
    optimizer: torch.optim.Optimizer,
    audio: Tensor,
    visual: Tensor,
    labels: Tensor,
    *,
    bins: int = BINS,
) -> Step:
    """A training step; `fc` is the head of every feature."""
    optimizer.zero_grad()
    a, v = model.features(audio, visual)
    c = model.neck(torch.cat([v, a], dim=1))
    p_c, p_v, p_a = mean_scores([model.fc(feature) for feature in (c, v, a)], labels)
    found = contributions(a, v, c, (p_a, p_v, p_c), bins)
    weight_a, weight_v = found.weights
    logits = model.fc(model.fc_out(torch.cat([weight_v * v, weight_a * a], dim=1)))
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    return Step((a, v, c), (p_a, p_v, p_c), found, logits, loss)
