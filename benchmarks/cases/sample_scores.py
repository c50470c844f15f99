"""`sample_scores`: the target's probability and its logarithm, of each sample."""

from __future__ import annotations

from typing import Any

import torch
from engine.case import Case, register
from engine.gate import close
from engine.inputs import LogitsInputs, wide_of
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import modality_scores as reference


@register
class SampleScores(Case):
    """Of the head's logits."""

    name = "sample_scores"
    title = "sample_scores"
    kind = "logits"
    ops = ("sample_scores",)
    passes = 1
    make = staticmethod(LogitsInputs)

    def check(self, provider: str, i: LogitsInputs, result: Any) -> None:
        """Compares both scores of each modality and row."""
        exact = reference.sample_scores([z.double() for z in i.logits], i.labels)
        for name, found, wanted in zip(("prob", "log_prob"), result, exact, strict=False):
            close(name, found.double().flatten(), wanted.flatten(), 1e-4)

    def foreach(self, i: LogitsInputs) -> list[Tensor]:
        stacked = torch.stack(i.logits).to(wide_of(i.dtype))
        index = i.labels.view(1, -1, 1).expand(len(stacked), -1, 1)
        log_p = stacked.log_softmax(2).gather(2, index).squeeze(2)
        return [log_p.exp(), log_p]

    def mmfuse(self, i: LogitsInputs, backend: str) -> list[Tensor]:
        return list(ops.sample_scores(i.logits, i.labels, backend=backend)[:2])
