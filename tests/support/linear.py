"""Linear encoders, a batch whose first modality is ahead, and masks of present ones."""

from __future__ import annotations

from typing import Any

import torch
from balancing import ANCHORED, make, start
from torch import Tensor, nn

CLASSES, ROWS = 4, 24
NAMES = ("audio", "visual", "text")


class Networks:
    """M linear encoders, a batch, and gradients as after a backward pass."""

    def __init__(self, modalities: int, seed: int = 0, rows: int = ROWS) -> None:
        torch.manual_seed(seed)
        self.names = NAMES[:modalities]
        self.encoders = {n: nn.Linear(3, 5, dtype=torch.float64) for n in self.names}
        self.inputs = {n: torch.randn(rows, 3, dtype=torch.float64) for n in self.names}
        self.logits = {n: torch.randn(rows, CLASSES, dtype=torch.float64) for n in self.names}
        self.labels = torch.randint(0, CLASSES, (rows,))
        with torch.no_grad():
            # The first is ahead, so that every method has something to do.
            self.logits["audio"][torch.arange(rows), self.labels] += 3

    def backward(self, without: tuple[str, ...] = ()) -> None:
        for name, encoder in self.encoders.items():
            for p in encoder.parameters():
                p.grad = None if name in without else torch.ones_like(p)

    def given(self, method: Any, rows: Tensor | slice = slice(None)) -> dict[str, Any]:
        features = {n: self.encoders[n](x[rows]).detach() for n, x in self.inputs.items()}
        more = {"features": features, "inputs": {n: x[rows] for n, x in self.inputs.items()}}
        return {
            "logits": {n: z[rows] for n, z in self.logits.items()},
            "labels": self.labels[rows],
            **{name: more[name] for name in method.rule.need.inputs},
        }

    def method(self, kind: str, **options: Any) -> Any:
        made = make(kind, self.encoders, **options)
        if kind in ANCHORED:
            start(made)
            with torch.no_grad():
                for encoder in self.encoders.values():
                    for p in encoder.parameters():
                        p.add_(torch.randn_like(p))
        return made


def masks(modalities: int, share: float, seed: int = 5, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(rows, generator=generator) >= share for n in NAMES[:modalities]}


def everyone(modalities: int, rows: int = ROWS) -> dict[str, Tensor]:
    return {n: torch.ones(rows, dtype=torch.bool) for n in NAMES[:modalities]}
