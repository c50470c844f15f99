"""PMR, prototypical modal rebalance (CVPR 2023): fanyunfeng-bit/Modal-Imbalance-PMR at 3615e48.

Distances are taken one by one, in a loop over samples and prototypes, and scores sample by sample.
A modality behind is drawn towards its prototypes with a constant weight; the paper's clip and
entropies are missing. Losses are read on the host in every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .networks import Network, halves

#: The first and the last epoch that is rebalanced.
STARTS, ENDS = 0, 100
#: The share of the old prototypes that the command line has by default.
MOMENTUM = 0.2


class Step(NamedTuple):
    """Results of a step; pairs are audio, visual."""

    loss: Tensor
    #: The losses of each modality alone, which are only looked at.
    losses: tuple[Tensor, Tensor]
    prototype_losses: tuple[Tensor, Tensor]
    prototype_logits: tuple[Tensor, Tensor]
    scores: tuple[Tensor, Tensor]
    ratio: Tensor
    coefficients: tuple[float, float]


def distances(x: Tensor, prototypes: Tensor) -> Tensor:
    """Euclidean distances [B, C]."""
    found = torch.zeros(len(x), len(prototypes), dtype=x.dtype).to(x.device)
    for i in range(len(x)):
        for j in range(len(prototypes)):
            found[i, j] = torch.sqrt(torch.dot(x[i] - prototypes[j], x[i] - prototypes[j]))
    return found


def score(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the true class's probability; the softmax is taken anew for every sample."""
    softmax = nn.Softmax(dim=1)
    return sum(softmax(logits)[i][labels[i]] for i in range(logits.size(0)))


@torch.no_grad()
def prototypes(
    model: Network,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    classes: int,
    width: int,
    *,
    epoch: int,
    old: Sequence[Tensor] | None = None,
    momentum: float = MOMENTUM,
) -> list[Tensor]:
    """Class means [C, D] of both modalities, of all batches that are given.

    Args:
        model: The network.
        batches: Audio, visual and labels; a tenth of the loader's, at least one.
        classes: How many.
        width: Of the features.
        epoch: Counted from 0, where the old ones have no part.
        old: Those of the epoch before.
        momentum: Their share.
    """
    model.eval()
    sums, counts = None, [0] * classes
    for audio, visual, labels in batches:
        features = model.features(audio, visual)
        if sums is None:
            sums = [f.new_zeros(classes, width) for f in features]
        for row, label in enumerate(labels):
            counts[label.long()] += 1
            for total, feature in zip(sums, features, strict=True):
                total[label, :] += feature[row, :]
    assert sums is not None
    for total in sums:
        for c in range(classes):
            total[c, :] /= counts[c]
    if epoch <= 0 or old is None:
        return sums
    return [(1 - momentum) * new + momentum * before for new, before in zip(sums, old, strict=True)]


def step(
    model: Network,
    optimizer: torch.optim.Optimizer,
    audio: Tensor,
    visual: Tensor,
    labels: Tensor,
    *,
    prototypes: Sequence[Tensor],
    alpha: float = 1.0,
    epoch: int = STARTS,
    ends: int = ENDS,
) -> Step:
    """A training step.

    Args:
        model: The network.
        optimizer: Of its parameters.
        audio: Input of the first encoder.
        visual: Input of the second one.
        labels: Class indices [B].
        prototypes: Of audio and of visual, [C, D].
        alpha: The weight of the modality that is behind.
        epoch: Counted from 0.
        ends: The last epoch that is rebalanced.
    """
    optimizer.zero_grad()
    a, v, out = model(audio, visual)
    out_a, out_v = halves(model, a, v)
    sim_a, sim_v = -distances(a, prototypes[0]), -distances(v, prototypes[1])
    score_a, score_v = score(sim_a, labels), score(sim_v, labels)
    ratio = score_a / score_v
    score(out_v, labels), score(out_a, labels)  # for a ratio that only a log shows
    pce_a, pce_v = F.cross_entropy(sim_a, labels), F.cross_entropy(sim_v, labels)
    loss, weights = F.cross_entropy(out, labels), (0.0, 0.0)
    if STARTS <= epoch <= ends:
        if ratio > 1:
            weights = (0.0, alpha)
        elif ratio < 1:
            weights = (alpha, 0.0)
        loss = loss + weights[0] * pce_a + weights[1] * pce_v
    loss_v, loss_a = F.cross_entropy(out_v, labels), F.cross_entropy(out_a, labels)
    loss.backward()
    shown = (loss, pce_v, pce_a, loss_v, loss_a)
    str([x.data for x in shown])  # printed
    optimizer.step()
    [x.item() for x in (loss, loss_a, loss_v, pce_a, pce_v)]
    return Step(
        loss, (loss_a, loss_v), (pce_a, pce_v), (sim_a, sim_v), (score_a, score_v), ratio, weights
    )
