"""LFM's two weights: the authors' schedule, and the number that a step of the learning follows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..loop.shards import is_dtensor

#: The length of the released schedule.
EPOCHS = 200
# Coefficients of its polynomial, as in the released script, lowest power first.
_SCHEDULE = (
    0.204623704,
    3.35472727e-3,
    1.22989557e-4,
    -2.92947416e-6,
    2.23835486e-8,
    -5.39717505e-11,
)


def label_weight(epoch: float) -> float:
    """lambda_0 at an epoch of 200, a fitted polynomial; above 1 in epochs 177 to 188."""
    return sum(c * epoch**power for power, c in enumerate(_SCHEDULE))


def mean_along(
    cross_entropy: Tensor, alignment: Tensor, weights: Tensor, parameters: list[Tensor]
) -> Tensor:
    """Mean over the first parameter of h: the Hessian of the loss times the gradient of CE.

    Args:
        cross_entropy: 0-d CE of the joint logits, with a graph.
        alignment: 0-d A, likewise, and with second derivatives.
        weights: [2] lambda_0 and lambda_1; the loss is lambda_0 CE + lambda_1 A.
        parameters: The model's. 0 if the first has no part in the loss, as where its modality is
            missing.

    Raises:
        TypeError: a parameter is sharded: the loss has no gradient of the shards.
    """
    if any(map(is_dtensor, parameters)):
        raise TypeError(
            "LFM.learn: parameters are sharded (DTensors); the loss has a gradient of what is "
            "gathered from them. Give logits and parameters of a copy that is not sharded, or "
            'take weighting="schedule"'
        )
    weights = weights.to(cross_entropy.dtype)
    total = weights[0] * cross_entropy + weights[1] * alignment
    direction = torch.autograd.grad(cross_entropy, parameters, retain_graph=True, allow_unused=True)
    gradient = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True)
    along = [
        (g * d.detach()).sum()
        for g, d in zip(gradient, direction, strict=True)
        if g is not None and d is not None and g.requires_grad
    ]
    if not along:
        return torch.zeros_like(cross_entropy)
    (h,) = torch.autograd.grad(torch.stack(along).sum(), parameters[:1], materialize_grads=True)
    return h.mean()
