"""Small models and loaders for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batches = list[tuple[dict[str, Tensor], Tensor]]


class Added(nn.Module):
    """Logits that are a weighted sum of the inputs [B, C]: known in every coalition."""

    def __init__(self, **weights: float) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, **inputs: Tensor) -> Tensor:
        return torch.stack([self.weights[n] * x for n, x in inputs.items()]).sum(0)


class Fused(nn.Module):
    """Encoders with batch norm and dropout, and a head on the concatenation."""

    def __init__(self, widths: Mapping[str, int], classes: int = 3) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(d, 6), nn.BatchNorm1d(6)) for n, d in widths.items()}
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6 * len(widths), classes)

    def forward(self, **inputs: Tensor) -> Tensor:
        features = [net(inputs[n]) for n, net in self.encoders.items()]
        return self.head(self.dropout(torch.cat(features, 1)))


def samples(
    names: Sequence[str], rows: int = 200, classes: int = 3, strength: float = 1.5
) -> tuple[dict[str, Tensor], Tensor]:
    """Noisy one-hot inputs [N, C], of which each says something of the label."""
    labels = torch.arange(rows) % classes
    hot = nn.functional.one_hot(labels, classes).float()
    return {n: strength * hot + torch.randn(rows, classes) for n in names}, labels


def batched(inputs: Mapping[str, Tensor], labels: Tensor, size: int = 64) -> Batches:
    """Batches in the order of the samples."""
    return [
        ({n: x[i : i + size] for n, x in inputs.items()}, labels[i : i + size])
        for i in range(0, len(labels), size)
    ]


def state_of(model: nn.Module) -> list[Any]:
    """All of a module that a pass could change."""
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [m.training for m in model.modules()],
        [(id(x), x.detach().clone(), x.requires_grad, x.device) for x in tensors],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    ]


def same(a: Any, b: Any) -> bool:
    """True if two of `state_of` are equal to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
