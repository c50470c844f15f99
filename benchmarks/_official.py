"""Provider `official`: what the authors' released code asks of PyTorch.

The sequences of calls are those of `released/`; here is one function per case, named like the case.
"""

from __future__ import annotations

import torch
from _inputs import (
    AGREEMENT,
    ALPHA,
    BETA,
    PULL,
    DropInputs,
    GradientInputs,
    LogitsInputs,
    MapInputs,
    PairInputs,
    ScoresInputs,
    ViewInputs,
)
from _released import released
from torch import Tensor


def modality_scores(i: LogitsInputs) -> list[Tensor]:
    return released.ogm.batch_scores(i.logits, i.labels)


def decision(i: LogitsInputs) -> tuple[list[Tensor | float], tuple[Tensor, Tensor]]:
    ratios = released.ogm.two_ratios(*released.ogm.batch_scores(i.logits, i.labels))
    return released.ogm.decide(*ratios, ALPHA), ratios


def discrepancy_ratios(i: ScoresInputs) -> tuple[Tensor, Tensor]:
    return released.ogm.two_ratios(*i.scores.unbind())


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
        released.ogm.scale(params, k)


def update_noise(i: GradientInputs) -> None:
    coefficients = i.coefficients.unbind()
    for p, m, std in zip(i.params, i.modality, i.noise_std_host, strict=True):
        p.grad = p.grad * coefficients[m] + released.ogm.gaussian(p.grad, std)


def update_pull(i: GradientInputs) -> None:
    for p, anchor in zip(i.params, i.anchors, strict=True):
        released.inforeg.pull(p, anchor, PULL)


def update_all(i: GradientInputs) -> None:
    update_noise(i)
    update_pull(i)


def ogm_ge(i: GradientInputs) -> None:
    for params, k in zip(i.encoder_params, i.coefficients.unbind(), strict=True):
        released.ogm.scale_with_noise(params, k)


def inforeg(i: GradientInputs) -> list[Tensor | None]:
    update_pull(i)
    # By their shapes these are the weights of convolutional and linear layers.
    weights = [p for p in i.params if p.dim() in (2, 4)]
    whole, encoder = i.cached(
        "Fisher", lambda: [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    )
    for sums in (whole, encoder):
        for total, w in zip(sums, weights, strict=True):
            released.inforeg.accumulate_squares(total, w.grad)
    own = iter(encoder)
    return [next(own) if p.dim() in (2, 4) else None for p in i.params]


def redreg(i: GradientInputs) -> None:
    for p, anchor in zip(i.params, i.anchors, strict=True):
        released.redreg.pull(p, released.redreg.orthogonal(p - anchor, p.grad), BETA)


def ogm_step(i: GradientInputs) -> None:
    coefficients, _ = decision(i.head)
    for params, k in zip(i.encoder_params, coefficients, strict=True):
        released.ogm.scale(params, k)


def ogm_ge_step(i: GradientInputs) -> None:
    coefficients, _ = decision(i.head)
    for params, k in zip(i.encoder_params, coefficients, strict=True):
        released.ogm.scale_with_noise(params, k)


def paired_cosine(i: PairInputs) -> Tensor:
    return released.redreg.all_pairs_cosine(*i.features)


def paired_cosine_grad(i: PairInputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(paired_cosine(i), i.features)


def gate(i: PairInputs) -> float:
    return released.redreg.agreement_gate(*i.features, AGREEMENT)


def noisy_views(i: ViewInputs) -> tuple[Tensor, Tensor, Tensor]:
    first, second = (released.redreg.noisy_view(i.x) for _ in range(2))
    return first, second, released.redreg.mean_square(first, second)


def redundancy_ratio(i: MapInputs) -> float:
    return released.redreg.ratio((i.z1, i.z2), i.input_sq)


def drop_modalities(i: DropInputs) -> tuple[Tensor, ...]:
    return released.opm.drop(i.features, i.q).features


def drop_modalities_grad(i: DropInputs) -> tuple[Tensor, ...]:
    out = released.opm.drop(i.features, i.q).features
    return *out, *torch.autograd.grad(out, i.features, i.grad_outputs)
