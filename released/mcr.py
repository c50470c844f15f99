"""MCR, the multimodal competition regularizer (NeurIPS 2025): kkontras/MCR at 338d370.

Joint logits are a sum of one matrix product for each modality and a bias. The features, computed a
second time in evaluation mode, are permuted within the batch, 32 times, and each modality's
exchange is scored by the Jensen–Shannon divergence from the joint prediction: once with the other
modality cut off from the gradient, once with itself cut off, and once whole, for the log. A
contrastive loss of both modalities' features by labels comes on top.

As released, the function that computes the sum of the terms returns the loss without it. It is
added here, and the features are those of the training pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .networks import Network, halves

#: The number in each training step on CREMA-D.
PERMUTATIONS = 32


class Step(NamedTuple):
    """Results of a step: the divergences with gradients in both encoders, and the losses."""

    divergences: list[Tensor]
    contrast: Tensor
    loss: Tensor


def js_divergence(first: Tensor, second: Tensor) -> Tensor:
    """The divergence of two batches of logits, through clamped probabilities."""
    p, q = (torch.softmax(torch.clamp(z, -1e7, 1e7), dim=1) for z in (first, second))
    mean = torch.clamp((p + q) / 2, 1e-20, 1).log()
    p, q = (torch.clamp(x, 1e-20, 1) for x in (p, q))
    found = F.kl_div(mean, p, reduction="batchmean") + F.kl_div(mean, q, reduction="batchmean")
    if torch.isnan(found):
        raise ValueError("a divergence is NaN")
    return found / 2


def nt_xent(a: Tensor, v: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Over all pairs of rows of one class, each against the rows of other classes."""
    rows = torch.cat([F.normalize(a, dim=1), F.normalize(v, dim=1)])
    classes = torch.cat([labels, labels])
    similar = rows @ rows.T / temperature
    alike = classes.unsqueeze(1) == classes.unsqueeze(0)
    positive = (alike & ~torch.eye(len(rows), dtype=torch.bool)).nonzero()
    losses = []
    for i, j in positive.tolist():
        against = similar[i][~alike[i]]
        row = torch.cat([similar[i, j].view(1), against])
        losses.append(torch.logsumexp(row, 0) - similar[i, j])
    return torch.stack(losses).mean()


def permutations(rows: int) -> list[list[Tensor]]:
    """The permutations of a step, for audio and for visual, which have the same."""
    drawn = [torch.randperm(rows) for _ in range(PERMUTATIONS)]
    return [drawn, drawn]


def play(
    z_a: Tensor, z_v: Tensor, orders: Sequence[Sequence[Tensor]], strategy: str
) -> tuple[list[Tensor], Tensor]:
    """Both divergences with gradients in their own encoder, and the sum of all terms."""
    count = len(orders[0])
    joint = torch.cat([z_a + z_v] * count)
    moved_a = torch.cat([z_a[order] for order in orders[0]])
    moved_v = torch.cat([z_v[order] for order in orders[1]])
    still_a, still_v = torch.cat([z_a] * count), torch.cat([z_v] * count)
    of_audio = js_divergence(moved_a + still_v.detach(), joint)
    of_audio_in_visual = js_divergence(moved_a.detach() + still_v, joint)
    of_visual = js_divergence(moved_v + still_a.detach(), joint)
    of_visual_in_audio = js_divergence(moved_v.detach() + still_a, joint)
    for pair in ((moved_a, still_v), (still_a, moved_v)):  # for the log
        js_divergence(sum(z.detach() for z in pair), joint)
    total = -of_audio - of_visual
    if strategy == "greedy":
        total = total + of_audio_in_visual + of_visual_in_audio
    return [of_audio, of_visual], total


def step(
    model: Network,
    optimizer: torch.optim.Optimizer,
    audio: Tensor,
    visual: Tensor,
    labels: Tensor,
    *,
    orders: Sequence[Sequence[Tensor]] | None = None,
    strength: float = 0.01,
    strategy: str = "greedy",
    contrast: float = 1.0,
    temperature: float = 0.5,
) -> Step:
    """A training step.

    Args:
        model: The network; each modality's logits are its columns of the joint head.
        optimizer: Of its parameters.
        audio: Input of the first encoder.
        visual: Input of the second one.
        labels: Class indices [B].
        orders: Permutations for audio and for visual; None draws one for both, 32 times.
        strength: Weight of the divergences.
        strategy: "greedy" or "independent".
        contrast: Weight of the contrastive loss.
        temperature: Of it.
    """
    optimizer.zero_grad()
    a, v, out = model(audio, visual)
    z_a, z_v = halves(model, a, v)
    divergences, total = play(z_a, z_v, orders or permutations(len(labels)), strategy)
    pull = nt_xent(a, v, labels, temperature) if contrast else torch.zeros_like(total)
    losses = [F.cross_entropy(z, labels) for z in (out, z_a, z_v)]
    loss = sum(losses) + strength * total + contrast * pull
    loss.backward()
    optimizer.step()
    return Step(divergences, pull, loss)
