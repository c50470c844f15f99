"""`modality_scores`: batch means of the true class's probability."""

from __future__ import annotations

from typing import Any

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import as_vector, close
from engine.inputs import LogitsInputs, wide_of
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import modality_scores as reference


def rounding_of_released_sums(provider: str, i: LogitsInputs) -> float:
    """A Python sum over the batch rounds to the dtype of the logits at every step."""
    return len(i.labels) * torch.finfo(i.dtype).eps / 8 if provider == "official" else 0.0


def stacked_scores(i: LogitsInputs) -> Tensor:
    """[M], in eager PyTorch."""
    stacked = torch.stack(i.logits)
    index = i.labels.view(1, -1, 1).expand(len(stacked), -1, 1)
    return stacked.softmax(dim=2, dtype=wide_of(i.dtype)).gather(2, index).mean(dim=(1, 2))


@compiled(dynamic=False)
def _scores(logits: list[Tensor], labels: Tensor) -> Tensor:
    return reference.modality_scores(logits, labels)[0]


@register
class Scores(Case):
    """Scores alone."""

    name = "modality_scores"
    title = "modality_scores"
    kind = "logits"
    ops = ("modality_scores",)
    passes = 1
    make = staticmethod(LogitsInputs)

    def check(self, provider: str, i: LogitsInputs, result: Any) -> None:
        """Compares each modality's score, be it the batch's sum or its mean."""
        scores = as_vector(result, i.device)
        if provider == "official":
            scores = scores / len(i.labels)
        exact, _, _ = reference.modality_scores([z.double() for z in i.logits], i.labels)
        close("scores", scores, exact, 1e-4 + rounding_of_released_sums(provider, i))

    def official(self, i: LogitsInputs) -> list[Tensor]:
        return sequences.ogm.batch_scores(i.logits, i.labels)

    def foreach(self, i: LogitsInputs) -> Tensor:
        return stacked_scores(i)

    def compile(self, i: LogitsInputs) -> Tensor:
        return _scores(i.logits, i.labels)

    def mmfuse(self, i: LogitsInputs, backend: str) -> Tensor:
        return ops.modality_scores(i.logits, i.labels, backend=backend).prob
