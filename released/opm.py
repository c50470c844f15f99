"""OPM (TPAMI 2024), alone and with OGM-GE: GeWu-Lab/BML_TPAMI2024 at 4b3aa4f.

Features are dropped with the probability of the same step, in a share of the steps. The rest,
and its gradient, is divided by 1 − θ, in an autograd function whose second gradient is θ itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ogm
from .networks import Network, detached_halves

#: The first epoch in which features are dropped.
STARTS = 6
#: OGM-GE on top ends with this one.
OGM_ENDS = 60
#: A modality that is just ahead, and how much its probability rises; the share of the steps.
Q_BASE, LAMBDA, P_EXECUTE = 0.5, 0.5, 0.7


class Drop(NamedTuple):
    """Results of `drop`: features, the samples left [B, 1], who kept what [2, B, 1], and θ."""

    features: tuple[Tensor, ...]
    left: Tensor
    mask: Tensor
    theta: Tensor


class Step(NamedTuple):
    """Results of a step; pairs are audio, visual."""

    #: The joint head's output, for the samples that are left.
    out: Tensor
    features: Sequence[Tensor]
    #: The logits of all samples, undropped.
    logits: tuple[Tensor, Tensor]
    scores: list[Tensor]
    q: Tensor
    coefficients: list[Tensor | float]
    #: None in a step that does not drop.
    dropped: Drop | None


def drop_rates(
    score_a: Tensor, score_v: Tensor, q_base: float = Q_BASE, lam: float = LAMBDA
) -> Tensor:
    """Probabilities [2], of the modality that is ahead and of the other, which keeps all."""
    q = torch.zeros(2, dtype=score_a.dtype, device=score_a.device)
    for m, ratio in enumerate(ogm.two_ratios(score_a, score_v)):
        excess = torch.tanh(torch.relu(ratio - 1))
        q[m] = q_base * (1 + lam * excess) if excess > 0 else 0
    return torch.clip(q, 0, 1)


def executes(uniform: float) -> bool:
    """True if a step drops, by a number that is drawn for it."""
    return uniform >= 1 - P_EXECUTE


class _Rescale(torch.autograd.Function):
    """Division by 1 − θ in both directions, with θ read on the host."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor) -> Tensor:
        ctx.left, ctx.theta = 1 - theta.item(), theta.detach()
        return x / ctx.left

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad / ctx.left, ctx.theta


def drop(
    features: Sequence[Tensor], q: Tensor, draw: Callable[[Tensor], Tensor] = torch.bernoulli
) -> Drop:
    """Samples lose modalities; what has lost both is removed, and the rest is made larger.

    `draw` gets the probabilities [B, 1] with which a modality is kept, and says where it is.
    """
    batch, width = features[0].shape
    widths = torch.tensor([feature.shape[1] for feature in features], device=q.device)
    theta = sum(widths * q) / sum(widths)
    stacked = torch.stack(list(features))
    masks = [draw((1 - q_m).expand(batch, 1)) for q_m in q]
    mask = torch.stack(masks).to(stacked.dtype)
    rescaled = _Rescale.apply(stacked * mask, theta)
    left = mask.sum(dim=0) > 0
    kept = torch.masked_select(rescaled, left).reshape(len(features), -1, width).unbind()
    return Drop(kept, left, mask, theta)


def step(
    model: Network,
    optimizer: torch.optim.Optimizer,
    audio: Tensor,
    visual: Tensor,
    labels: Tensor,
    *,
    epoch: int = STARTS,
    execute: bool = True,
    draw: Callable[[Tensor], Tensor] = torch.bernoulli,
    theta_gradient: bool = True,
    alpha: float | None = None,
    noise: ogm.Draw | None = ogm.gaussian,
    ogm_ends: int = OGM_ENDS,
) -> Step:
    """A training step.

    Args:
        model: The network.
        optimizer: Of its parameters.
        audio: Input of the first encoder.
        visual: Input of the second one.
        labels: Class indices [B].
        epoch: Counted from 0.
        execute: The result of `executes` for this step.
        draw: As in `drop`.
        theta_gradient: True if features get θ's gradient through their scores. They do in the
            release; mmfuse leaves it out unless it is asked for, and is measured without.
        alpha: OGM-GE's; None for OPM alone.
        noise: OGM-GE's.
        ogm_ends: The last epoch with OGM-GE.
    """
    optimizer.zero_grad()
    a, v = model.features(audio, visual)
    with torch.set_grad_enabled(theta_gradient):
        out_a, out_v = detached_halves(model, a, v)
        score_v, score_a = ogm.batch_scores([out_v, out_a], labels)
        q = drop_rates(score_a, score_v) if epoch >= STARTS else a.new_zeros(2)
    features, dropped = (a, v), None
    if epoch >= STARTS and execute:
        dropped = drop(features, q, draw)
        features, labels = dropped.features, labels[dropped.left.squeeze(1)]
    out = model.fc(torch.cat(features, dim=1))
    F.cross_entropy(out, labels).backward()
    coefficients: list[Tensor | float] = [1, 1]
    if alpha is not None and epoch >= STARTS:
        coefficients = ogm.decide(*ogm.two_ratios(score_a, score_v), alpha)
        if epoch <= ogm_ends:
            ogm.modulate(model, coefficients, noise)
    optimizer.step()
    scores = [score_a, score_v]
    return Step(out, features, (out_a, out_v), scores, q, coefficients, dropped)
