"""The released code of OPM and ARM, in our own words, plain PyTorch and NumPy, quirks included."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class _Rescale(torch.autograd.Function):
    """Division by 1 - theta, forwards and backwards."""

    @staticmethod
    def forward(ctx, x: Tensor, theta: Tensor) -> Tensor:
        ctx.left = 1 - theta.item()
        return x / ctx.left

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return 1 / ctx.left * grad, None


def opm_scores(logits: list[Tensor], labels: Tensor) -> list[Tensor]:
    return [
        sum(torch.softmax(z, dim=1)[i][int(labels[i])] for i in range(len(labels))) for z in logits
    ]


def opm_probabilities(
    score_1: Tensor, score_2: Tensor, q_base: float = 0.5, lam: float = 0.5
) -> Tensor:
    q = torch.zeros(2, dtype=score_1.dtype)
    for m, ratio in enumerate((score_1 / score_2, score_2 / score_1)):
        excess = torch.tanh(torch.relu(ratio - 1))
        q[m] = q_base * (1 + lam * excess) if excess > 0 else 0
    return q.clip(0, 1)


def opm_drop(
    features: list[Tensor], q: Tensor, execute: bool, uniform: Tensor
) -> tuple[list[Tensor], Tensor]:
    """`uniform` [2, B] stands for the Bernoulli draws: a sample is kept where it exceeds q."""
    batch, width = features[0].shape
    if not execute:
        return features, torch.ones(batch, dtype=torch.bool)
    widths = torch.tensor([f.shape[1] for f in features])
    theta = sum(widths * q) / sum(widths)
    mask = (uniform > q[:, None]).to(features[0].dtype).unsqueeze(-1)
    stacked = _Rescale.apply(torch.stack(features) * mask, theta)
    left = mask.transpose(0, 1).squeeze(-1).sum(dim=1) > 0
    chosen = torch.masked_select(stacked, left[:, None]).reshape(len(features), -1, width)
    return [part.squeeze(0) for part in chosen.chunk(len(features))], left


def _sum_of_h(table: np.ndarray) -> float:
    total = 0.0
    for value in np.asarray(table).flatten():
        if value > 0:
            total -= value * math.log(value)
    return total


def arm_nmi(x: np.ndarray, y: np.ndarray, bins: int = 30) -> float:
    def entropy(v: np.ndarray) -> float:
        counts = np.histogram(v, bins)[0]
        return _sum_of_h(counts / counts.sum())

    joint = np.histogram2d(x, y, bins)[0]
    p = joint / joint.sum()
    p_x, p_y = p.sum(axis=1), p.sum(axis=0)
    information = 0.0
    for i in range(bins):
        for j in range(bins):
            if p[i, j] > 0:
                information += p[i, j] * math.log(p[i, j] / (p_x[i] * p_y[j]))
    return 2 * information / (entropy(x) + entropy(y))


def arm_conditional_entropy(data: list[np.ndarray], z: np.ndarray, bins: int = 2) -> float:
    """Of one or two variables given z: p(z) divides along the wrong axis, and does not weight."""
    joint = np.histogramdd(np.stack([*data, z], axis=1), bins)[0]
    joint = joint / joint.sum()
    p_z = np.histogram(z, bins)[0] / len(z)
    p_z = np.where(p_z == 0, 1e-10, p_z)
    if len(data) == 2:
        return _sum_of_h(joint / p_z[:, None, None])
    return _sum_of_h(joint[None, :, :] / p_z[:, None, None])


def arm_ncmi(x: np.ndarray, y: np.ndarray, z: np.ndarray, bins: int = 2) -> float:
    h_x = arm_conditional_entropy([x], z, bins)
    h_y = arm_conditional_entropy([y], z, bins)
    return (h_x + h_y - arm_conditional_entropy([x, y], z, bins)) / (h_x + h_y)


def arm_weights(
    audio: Tensor, visual: Tensor, fused: Tensor, logits: list[Tensor], labels: Tensor
) -> tuple[float, float, float, float]:
    """(P_a, P_v, weight of audio, weight of visual); logits of audio, visual and fused."""
    a, v, c = (t.detach().cpu().numpy().flatten() for t in (audio, visual, fused))
    p_a, p_v, p_c = (
        float(np.mean([torch.softmax(z, 1)[i][int(labels[i])].item() for i in range(len(labels))]))
        for z in logits
    )
    nmi_a, nmi_v = arm_nmi(a, c), arm_nmi(v, c)
    ii_a, ii_v = nmi_a - arm_ncmi(a, c, v), nmi_v - arm_ncmi(v, c, a)
    contribution_a = p_c * nmi_a + p_v * ii_a
    contribution_v = p_c * nmi_v + p_a * ii_v
    return (
        contribution_a,
        contribution_v,
        contribution_v / contribution_a,
        contribution_a / contribution_v,
    )
