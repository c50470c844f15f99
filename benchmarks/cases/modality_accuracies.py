"""`modality_accuracies`: how many samples each modality gets right, for CGGM."""

from __future__ import annotations

from typing import Any

import torch
from engine.case import Case, register
from engine.gate import as_vector, close
from engine.inputs import LogitsInputs
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import modality_scores as reference


def rates(logits: list[Tensor], labels: Tensor) -> Tensor:
    """[M] float64 top-1 rates."""
    return torch.stack([(z.argmax(1) == labels).double().mean() for z in logits])


@register
class Accuracies(Case):
    """Top-1 rates of the head's logits; mmfuse has prob from the same read of them."""

    name = "modality_accuracies"
    title = "modality_accuracies"
    kind = "logits"
    ops = ("modality_accuracies",)
    passes = 1
    named_only = True
    make = staticmethod(LogitsInputs)

    def check(self, provider: str, i: LogitsInputs, result: Any) -> None:
        """Compares the rates; the argmax of rounded logits is theirs."""
        wanted, _, _ = reference.modality_accuracies(i.logits, i.labels)
        close("accuracy", as_vector(result, i.device), wanted, 1e-12)

    def foreach(self, i: LogitsInputs) -> Tensor:
        return rates(i.logits, i.labels)

    def mmfuse(self, i: LogitsInputs, backend: str) -> Tensor:
        return ops.modality_accuracies(i.logits, i.labels, backend=backend).accuracy
