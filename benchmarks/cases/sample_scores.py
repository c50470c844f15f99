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
    """Scores from the head's logits."""

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


@register
class SampleStatistics(SampleScores):
    """Scores with the argmax, the entropy, the log-sum-exp and the sum of magnitudes."""

    name = "sample_statistics"
    title = "sample_scores with statistics"
    ops = ("sample_statistics",)

    def check(self, provider: str, i: LogitsInputs, result: Any) -> None:
        """Compares all six; the argmax of rounded logits is theirs."""
        exact = reference.sample_statistics([z.double() for z in i.logits], i.labels)
        names = ("prob", "log_prob", "correct", "entropy", "log_sum_exp", "abs_sum")
        for name, found, wanted in zip(names, result, (*exact[:2], *exact[3:]), strict=True):
            close(name, found.double().flatten(), wanted.double().flatten(), 1e-4, 1e-5)

    def foreach(self, i: LogitsInputs) -> list[Tensor]:
        stacked = torch.stack(i.logits).to(wide_of(i.dtype))
        index = i.labels.view(1, -1, 1).expand(len(stacked), -1, 1)
        log_sum_exp = stacked.logsumexp(2)
        log_p = stacked - log_sum_exp.unsqueeze(2)
        own = log_p.gather(2, index).squeeze(2)
        entropy = -(log_p.exp() * log_p).sum(2)
        correct = stacked.argmax(2) == i.labels
        return [own.exp(), own, correct, entropy, log_sum_exp, stacked.abs().sum(2)]

    def mmfuse(self, i: LogitsInputs, backend: str) -> list[Tensor]:
        found = ops.sample_scores(i.logits, i.labels, statistics=True, backend=backend)
        return [found.prob, found.log_prob, *found[3:]]
