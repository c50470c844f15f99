"""OGM and OGM-GE (CVPR 2022): GeWu-Lab/OGM-GE_CVPR2022 at 343dc1d.

Autograd stays on in the update, and the scores are not detached. Convolutions alone are modulated,
and with OGM-GE those of the modality that is behind get noise as well. Outside of the epochs
`STARTS` to `ENDS` the coefficients are computed and not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .networks import Network, halves

#: The first and the last epoch that is modulated.
STARTS, ENDS = 0, 50

Draw = Callable[[Tensor, float], Tensor]
Logits = Callable[[Network, Tensor, Tensor], tuple[Tensor, Tensor]]


class Step(NamedTuple):
    """Results of a step; pairs are audio, visual."""

    logits: tuple[Tensor, Tensor, Tensor]
    scores: list[Tensor]
    ratios: list[Tensor]
    coefficients: list[Tensor | float]
    modulated: bool


def batch_scores(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """Sums of the true class's probability; the softmax is taken anew for every sample."""
    rows = range(len(labels))
    return [sum(torch.softmax(z, dim=1)[i][labels[i]] for i in rows) for z in logits]


def two_ratios(score_a: Tensor, score_v: Tensor) -> tuple[Tensor, Tensor]:
    """Discrepancy ratio of each of the two modalities."""
    ratio_v = score_v / score_a
    return 1 / ratio_v, ratio_v


def decide(ratio_a: Tensor, ratio_v: Tensor, alpha: float) -> list[Tensor | float]:
    """Coefficients (Eq. 10); audio is held back where the scores are equal."""
    if ratio_v > 1:
        return [1, 1 - torch.tanh(alpha * torch.relu(ratio_v))]
    return [1 - torch.tanh(alpha * torch.relu(ratio_a)), 1]


def gaussian(grad: Tensor, std: float) -> Tensor:
    """The release's noise."""
    return torch.zeros_like(grad).normal_(0, std)


def scale(params: Iterable[Tensor], coefficient: Tensor | float) -> None:
    """OGM."""
    for p in params:
        p.grad *= coefficient


def scale_with_noise(
    params: Iterable[Tensor], coefficient: Tensor | float, draw: Draw = gaussian
) -> None:
    """OGM-GE: noise as wide as each gradient, which is read on the host."""
    for p in params:
        p.grad = p.grad * coefficient + draw(p.grad, p.grad.std().item() + 1e-8)


def modulate(
    model: nn.Module, coefficients: Sequence[Tensor | float], draw: Draw | None = gaussian
) -> None:
    """All convolutions, found by their names in every step; OGM without a `draw`."""
    for name, p in model.named_parameters():
        layer = name.split(".")[0]
        for modality, k in zip(("audio", "visual"), coefficients, strict=True):
            if modality in layer and len(p.grad.size()) == 4:
                if draw is None:
                    scale([p], k)
                else:
                    scale_with_noise([p], k, draw)


def step(
    model: Network,
    optimizer: torch.optim.Optimizer,
    audio: Tensor,
    visual: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    epoch: int = STARTS,
    draw: Draw | None = gaussian,
    own_logits: Logits = halves,
) -> Step:
    """A training step.

    Args:
        model: The network.
        optimizer: Of its parameters.
        audio: Input of the first encoder.
        visual: Input of the second one.
        labels: Class indices [B].
        alpha: How strong the modulation is.
        epoch: Counted from 0.
        draw: Makes the noise, or None: OGM without it.
        own_logits: `halves` of the joint head, or `own_heads` for logits that are added up.
    """
    optimizer.zero_grad()
    a, v, out = model(audio, visual)
    out_a, out_v = own_logits(model, a, v)
    F.cross_entropy(out, labels).backward()
    score_v, score_a = batch_scores([out_v, out_a], labels)
    ratios = two_ratios(score_a, score_v)
    coefficients = decide(*ratios, alpha)
    modulated = STARTS <= epoch <= ENDS
    if modulated:
        modulate(model, coefficients, draw)
    optimizer.step()
    return Step((out, out_a, out_v), [score_a, score_v], list(ratios), coefficients, modulated)
