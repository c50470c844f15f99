"""Provider `official`: what the authors' released code asks of PyTorch, in our own words.

The sequence of calls is kept, with its Python loops, its reads of device values on the host and its
new tensors, because that is what is to be measured. Two modalities only, as there. Below the
transcription there is one function per case, named like the case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from _inputs import ALPHA, BETA, PULL, GradientInputs, LogitsInputs, ScoresInputs
from torch import Tensor

Draw = Callable[[Tensor, float], Tensor]


def gaussian(grad: Tensor, std: float) -> Tensor:
    """Noise as the released code draws it."""
    return torch.zeros_like(grad).normal_(0, std)


def two_ratios(score_a: Tensor, score_v: Tensor) -> tuple[Tensor, Tensor]:
    """Discrepancy ratio of each of the two modalities."""
    ratio_v = score_v / score_a
    return 1 / ratio_v, ratio_v


def batch_scores(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """Sums of the true class's probability; the softmax is taken anew for every sample."""
    rows = range(len(labels))
    return [sum(torch.softmax(z, dim=1)[i][labels[i]] for i in rows) for z in logits]


def decide(
    logits_a: Tensor, logits_v: Tensor, labels: Tensor, alpha: float
) -> tuple[list[Tensor | float], list[Tensor]]:
    """Coefficients (CVPR Eq. 10) and ratios."""
    score_v, score_a = batch_scores([logits_v, logits_a], labels)
    ratio_a, ratio_v = two_ratios(score_a, score_v)
    if ratio_v > 1:
        return [1, 1 - torch.tanh(alpha * torch.relu(ratio_v))], [ratio_a, ratio_v]
    return [1 - torch.tanh(alpha * torch.relu(ratio_a)), 1], [ratio_a, ratio_v]


def scale(params: Sequence[Tensor], coefficient: Tensor | float) -> None:
    """OGM, for one encoder."""
    for p in params:
        p.grad *= coefficient


def scale_with_noise(
    params: Sequence[Tensor], coefficient: Tensor | float, draw: Draw = gaussian
) -> None:
    """OGM-GE, for one encoder: noise as wide as each gradient, which is read on the host."""
    for p in params:
        p.grad = p.grad * coefficient + draw(p.grad, p.grad.std().item() + 1e-8)


def pull(params: Sequence[Tensor], anchors: Sequence[Tensor], alpha: float) -> None:
    """InfoReg: adds the displacement from the anchors."""
    for p, anchor in zip(params, anchors, strict=True):
        p.grad = p.grad + alpha * (p - anchor)


def pull_orthogonally(params: Sequence[Tensor], anchors: Sequence[Tensor], beta: float) -> None:
    """RedReg: adds the part of the displacement that is orthogonal to the gradient."""
    for p, anchor in zip(params, anchors, strict=True):
        displacement = p - anchor
        square = (p.grad * p.grad).sum()
        share = 0.0
        if square > 0:
            share = (displacement * p.grad).sum() / (square + 1e-12)
        p.grad = p.grad + beta * (displacement - share * p.grad)


def modality_scores(i: LogitsInputs) -> list[Tensor]:
    return batch_scores(i.logits, i.labels)


def decision(i: LogitsInputs) -> tuple[list[Tensor | float], list[Tensor]]:
    return decide(*i.logits, i.labels, ALPHA)


def discrepancy_ratios(i: ScoresInputs) -> tuple[Tensor, Tensor]:
    return two_ratios(*i.scores.unbind())


def grad_stats(i: GradientInputs) -> list[float]:
    return [p.grad.std().item() for p in i.params]


def grad_stats_anchors(i: GradientInputs) -> tuple[list[Tensor], list[Tensor]]:
    dots, squares = [], []
    for p, anchor in zip(i.params, i.anchors, strict=True):
        dots.append(((p - anchor) * p.grad).sum())
        squares.append((p.grad * p.grad).sum())
    return dots, squares


def update_scale(i: GradientInputs) -> None:
    for params, k in zip(i.encoder_params, i.coefficients.unbind(), strict=True):
        scale(params, k)


def update_noise(i: GradientInputs) -> None:
    coefficients = i.coefficients.unbind()
    for p, m, std in zip(i.params, i.modality, i.noise_std_host, strict=True):
        p.grad = p.grad * coefficients[m] + gaussian(p.grad, std)


def update_pull(i: GradientInputs) -> None:
    pull(i.params, i.anchors, PULL)


def update_all(i: GradientInputs) -> None:
    update_noise(i)
    update_pull(i)


def ogm_ge(i: GradientInputs) -> None:
    for params, k in zip(i.encoder_params, i.coefficients.unbind(), strict=True):
        scale_with_noise(params, k)


def redreg(i: GradientInputs) -> None:
    pull_orthogonally(i.params, i.anchors, BETA)


def ogm_step(i: GradientInputs) -> None:
    coefficients, _ = decision(i.head)
    for params, k in zip(i.encoder_params, coefficients, strict=True):
        scale(params, k)


def ogm_ge_step(i: GradientInputs) -> None:
    coefficients, _ = decision(i.head)
    for params, k in zip(i.encoder_params, coefficients, strict=True):
        scale_with_noise(params, k)
