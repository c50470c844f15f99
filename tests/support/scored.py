"""Outputs and targets of every kind and layout, and their scores in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tolerances
import torch
from torch import Tensor
from torch.nn import functional as F

#: Logits of a shape, given contiguous, as they lie in memory otherwise.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda z: z,
    "classes last": lambda z: z.movedim(1, -1).contiguous().movedim(-1, 1),
    "a token less": lambda z: F.pad(z.movedim(1, -1), [0, 0, 0, 1])[..., :-1, :].movedim(-1, 1),
    "of wider rows": lambda z: F.pad(z.movedim(1, -1), [0, 3])[..., :-3].movedim(-1, 1),
    "every other": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "rows first": lambda z: z.transpose(0, -1).contiguous().transpose(0, -1),
}


class Targets(NamedTuple):
    """Targets of some logits, with the keywords of the op."""

    labels: Tensor
    keywords: dict[str, Any]

    def on(self, device: str) -> Targets:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.keywords.items()}
        return Targets(self.labels.to(device), moved)


class Rows(NamedTuple):
    """Scores of rows in float64, each [N, d1, …]; `bound` is of prob and log_prob.

    `shares` is [N, C, d1, …]: how much of the row's score is the class's or label's.
    """

    prob: Tensor
    log_prob: Tensor
    weight: Tensor
    prob_bound: Tensor
    log_prob_bound: Tensor
    shares: Tensor


def _positive(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def _indices(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, shape[1], shape[:1] + shape[2:])


def _some_ignored(shape: tuple[int, ...], ignore_index: int) -> Tensor:
    labels = _indices(shape)
    return torch.where(torch.rand(labels.shape) < 0.3, ignore_index, labels)


def _probabilities(shape: tuple[int, ...]) -> Tensor:
    found = torch.rand(shape) * (torch.rand(shape) < 0.7)
    return found / found.sum(1, keepdim=True).clamp(min=1e-6)


#: Makers of targets by name, for logits of a shape, [N, C, d1, …].
KINDS: dict[str, Callable[[tuple[int, ...]], Targets]] = {
    "indices": lambda s: Targets(_some_ignored(s, -100), {}),
    "weighted indices": lambda s: Targets(
        _some_ignored(s, 255), {"ignore_index": 255, "weight": _positive(s[1])}
    ),
    "probabilities": lambda s: Targets(_probabilities(s), {}),
    "weighted probabilities": lambda s: Targets(_probabilities(s), {"weight": _positive(s[1])}),
    "many labels": lambda s: Targets((torch.rand(s) < 0.3).float(), {"multilabel": True}),
    "weighted labels": lambda s: Targets(
        torch.rand(s).round(decimals=1),
        {"multilabel": True, "weight": _positive(s[1]), "pos_weight": 3 * _positive(s[1])},
    ),
}


def along(values: Tensor, like: Tensor) -> Tensor:
    """[C] along dimension 1."""
    return values.double().view(1, -1, *[1] * (like.dim() - 2))


def expected(z: Tensor, targets: Targets) -> Rows:
    """The scores of contiguous copies in float64; differentiable in z."""
    labels, keywords = targets.on("cpu")
    dtype, z = z.dtype, z.cpu().double()
    weight = keywords.get("weight", torch.ones(z.shape[1]))
    if keywords.get("multilabel"):
        y = labels.double()
        against = torch.where(y < 1, (1 - y) * F.softplus(z), 0.0)
        log_p = -torch.where(y > 0, y * F.softplus(-z), 0.0) - against
        shares = along(weight, z) * (along(keywords.get("pos_weight", weight**0), z) * y + 1 - y)
        shares = shares / shares.sum(1, keepdim=True)
        rows = torch.ones_like(shares.sum(1))
    else:
        log_p = z.log_softmax(1)
        if labels.is_floating_point():
            shares = along(weight, z) * labels.double()
        else:
            used = labels != keywords.get("ignore_index", -100)
            index = torch.where(used, labels, 0).unsqueeze(1)
            onehot = torch.zeros_like(z).scatter(1, index, used.unsqueeze(1).double())
            shares = along(weight, z) * onehot
        rows = shares.sum(1)
        shares = shares / torch.where(rows == 0, 1.0, rows).unsqueeze(1)
    log_p = torch.where(shares == 0, 0.0, log_p)
    prob, log_prob = (shares * log_p.exp()).sum(1), (shares * log_p).sum(1)
    away = shares * (1 + log_p.detach().abs())
    bounds = [
        tolerances.shared_score(dtype, x.sum(1), z.shape[1])
        for x in (away * log_p.detach().exp(), away)
    ]
    return Rows(prob, log_prob, rows, *bounds, shares)
