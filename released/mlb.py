"""MLB, multi-loss balanced (BMVC 2024): kkontras/MLB at 357b5ce.

A modality that is behind is made faster, one that is ahead slower, by a factor on all gradients of
its encoder and on the weight of its linear head. The heads share one bias, which is not scaled.
Three modalities have code of their own: with two, the second ratio is one over the first, and
factors stay on the device. The numbers of a log are read on the host, most of them twice.

As released, choosing the method stops at a class name that no longer exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .networks import Network

#: The third one where there are three.
MODALITIES = ("audio", "visual", "text")
#: The first and the last epoch that is balanced.
STARTS, ENDS = 0, 1500


class Step(NamedTuple):
    """Results of a step by modality; logits and losses begin with the joint ones."""

    logits: list[Tensor]
    losses: list[Tensor]
    scores: list[Tensor]
    ratios: list[Tensor]
    coefficients: list[Tensor | float]


def heads_with_one_bias(model: Network, features: Sequence[Tensor]) -> list[Tensor]:
    """Each modality's logits, from its own weight and its share of the first head's bias."""
    bias = model.head_audio.bias / len(features)
    heads = [getattr(model, f"head_{name}") for name in MODALITIES[: len(features)]]
    return [
        torch.mm(feature, torch.transpose(head.weight, 0, 1)) + bias
        for feature, head in zip(features, heads, strict=True)
    ]


def mean_score(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of the true class's probability; the softmax is taken anew for every sample."""
    rows = range(len(labels))
    return torch.stack([torch.softmax(logits, dim=1)[i][labels[i]] for i in rows]).mean().detach()


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """The score of a regression, which is also its loss."""
    return F.mse_loss(prediction.squeeze(), target)


def discrepancies(scores: Sequence[Tensor], regression: bool = False) -> list[Tensor]:
    """Ratios, above 1 for a modality that is behind; an error is higher there, a score lower."""
    if len(scores) == 2:
        first = scores[1] / scores[0]
        return [first, 1 / first]
    others = [
        sum(s for j, s in enumerate(scores) if j != i) / (len(scores) - 1)
        for i in range(len(scores))
    ]
    pairs = zip(scores, others, strict=True)
    return [mine / rest if regression else rest / mine for mine, rest in pairs]


def decide(
    ratios: Sequence[Tensor], alpha: float, beta: float | None = None
) -> list[Tensor | float]:
    """Factors below 2 or, with `beta`, below that, and above 1 − tanh α."""
    factors: list[Tensor | float] = [1 + torch.tanh(alpha * (ratio - 1)) for ratio in ratios]
    if len(ratios) > 2:
        factors = [factor.item() for factor in factors]
    if beta is not None:
        factors = [
            1 + (beta - 1 if ratio > 1 else 1) * torch.tanh(alpha * (ratio - 1)) for ratio in ratios
        ]
    return factors


def log(ratios: Sequence[Tensor], factors: Sequence[Tensor | float]) -> list[list[float]]:
    """The numbers for a list and a dashboard, read on the host for each of them."""

    def read(values: Iterable[Tensor | float]) -> list[float]:
        return [float(value) for value in values]

    if len(ratios) == 2:
        return [read([ratios[0], *factors]), read([*ratios, *factors])]
    return [read(ratios), read([*ratios, *factors])]


def belongs(name: str, modality: str) -> bool:
    """True if a parameter is scaled with this modality: its encoder's, and the head's weight."""
    layer = name.split(".")[0]
    return (modality in layer and "head" not in layer) or name == f"head_{modality}.weight"


def modulate(model: nn.Module, factors: Sequence[Tensor | float]) -> None:
    """Everything that belongs to a modality, found by its name in every step."""
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        for modality, k in zip(MODALITIES, factors, strict=False):
            if belongs(name, modality):
                p.grad *= k


def step(
    model: Network,
    optimizer: torch.optim.Optimizer,
    audio: Tensor,
    visual: Tensor,
    labels: Tensor,
    *,
    text: Tensor | None = None,
    alpha: float,
    beta: float | None = None,
    regression: bool = False,
    epoch: int = STARTS,
) -> Step:
    """A training step.

    Args:
        model: The network, with a linear head for each modality, of which the first has the bias.
        optimizer: Of its parameters.
        audio: Input of the first encoder.
        visual: Input of the second one.
        labels: Class indices [B], or what is to be predicted [B].
        text: Input of the third one, or None for two modalities.
        alpha: How steep the factors are.
        beta: The limit of the factor of a modality that is behind; None for 2.
        regression: True if the logits are predictions [B, 1]; of three modalities.
        epoch: Counted from 0.
    """
    optimizer.zero_grad()
    features = model.features(audio, visual, *(() if text is None else (text,)))
    own = heads_with_one_bias(model, features)
    logits = [sum(own), *own]
    criterion = mean_square if regression else F.cross_entropy
    losses = [criterion(z, labels) for z in logits]
    sum(losses).backward()
    score = mean_square if regression else mean_score
    scores = [score(z.detach(), labels) for z in own]
    ratios = discrepancies(scores, regression)
    factors = decide(ratios, alpha, beta)
    log(ratios, factors)
    if STARTS <= epoch <= ENDS:
        modulate(model, factors)
    optimizer.step()
    return Step(logits, losses, scores, ratios, factors)
