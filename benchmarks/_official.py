"""Provider `official`: what the authors' released code asks of PyTorch, in our own words.

The sequence of calls is kept, with its Python loops, its reads of device values on the host and its
new tensors, because that is what is to be measured. Two modalities only, as there. Below the
transcription there is one function per case, named like the case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from _inputs import (
    AGREEMENT,
    ALPHA,
    BETA,
    PULL,
    SIGMA,
    DropInputs,
    GradientInputs,
    LogitsInputs,
    MapInputs,
    PairInputs,
    ScoresInputs,
    ViewInputs,
)
from torch import Tensor
from torch.nn import functional as F

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
        p.grad += alpha * (p - anchor)


def pull_orthogonally(params: Sequence[Tensor], anchors: Sequence[Tensor], beta: float) -> None:
    """RedReg: adds the part of the displacement that is orthogonal to the gradient."""
    for p, anchor in zip(params, anchors, strict=True):
        p.grad = p.grad + beta * orthogonal(p - anchor, p.grad)


def orthogonal(displacement: Tensor, grad: Tensor) -> Tensor:
    """What is left of the displacement without its part along the gradient."""
    if grad.abs().sum() == 0:
        return displacement
    dot = (displacement * grad).sum()
    square = (grad * grad).sum() + 1e-12
    return displacement - (dot / square) * grad


def accumulate_squares(sums: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """The Fisher information's diagonal, as large as the weights."""
    for total, grad in zip(sums, grads, strict=True):
        total += grad * grad


def all_pairs_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine of the pairs, from the product of all rows with all rows."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    return (a @ b.t()).diag().mean()


def agreement_gate(a: Tensor, b: Tensor, threshold: float) -> float:
    """Whether the modalities agree, decided on the host."""
    return 1.0 if all_pairs_cosine(a, b).item() > threshold else 0.0


def noisy_view(x: Tensor) -> Tensor:
    """An input with noise."""
    noise = torch.randn_like(x) * SIGMA
    return x + noise


def mean_square(x: Tensor, y: Tensor) -> Tensor:
    """How far two tensors are apart."""
    return (x - y).pow(2).mean()


class _Rescale(torch.autograd.Function):
    """Division by 1 − θ in both directions, with θ read on the host."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor) -> Tensor:
        ctx.left = 1 - theta.item()
        return x / ctx.left

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.left, None


def drop(features: Sequence[Tensor], q: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """OPM: samples lose modalities; what has lost both is removed, and the rest is made larger.

    Also says which samples are left, [B, 1].
    """
    batch, width = features[0].shape
    widths = torch.tensor([feature.shape[1] for feature in features], device=q.device)
    theta = sum(widths * q) / sum(widths)
    stacked = torch.stack(list(features))
    masks = [torch.bernoulli((1 - q_m).expand(batch, 1)) for q_m in q]
    mask = torch.stack(masks).to(stacked.dtype)
    rescaled = _Rescale.apply(stacked * mask, theta)
    left = mask.sum(dim=0) > 0
    return torch.masked_select(rescaled, left).reshape(len(features), -1, width).unbind(), left


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


def inforeg(i: GradientInputs) -> list[Tensor | None]:
    pull(i.params, i.anchors, PULL)
    # By their shapes these are the weights of convolutional and linear layers.
    weights = [p for p in i.params if p.dim() in (2, 4)]
    whole, encoder = i.cached(
        "Fisher", lambda: [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    )
    grads = [w.grad for w in weights]
    accumulate_squares(whole, grads)
    accumulate_squares(encoder, grads)
    own = iter(encoder)
    return [next(own) if p.dim() in (2, 4) else None for p in i.params]


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


def paired_cosine(i: PairInputs) -> Tensor:
    return all_pairs_cosine(*i.features)


def paired_cosine_grad(i: PairInputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(paired_cosine(i), i.features)


def gate(i: PairInputs) -> float:
    return agreement_gate(*i.features, AGREEMENT)


def noisy_views(i: ViewInputs) -> tuple[Tensor, Tensor, Tensor]:
    first, second = noisy_view(i.x), noisy_view(i.x)
    return first, second, mean_square(first, second)


def redundancy_ratio(i: MapInputs) -> float:
    return (mean_square(i.z1, i.z2) / (i.input_sq + 1e-12)).item()


def drop_modalities(i: DropInputs) -> tuple[Tensor, ...]:
    return drop(i.features, i.q)[0]


def drop_modalities_grad(i: DropInputs) -> tuple[Tensor, ...]:
    out, _ = drop(i.features, i.q)
    return *out, *torch.autograd.grad(out, i.features, i.grad_outputs)
