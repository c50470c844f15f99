"""`modality_scores`: batch means of the true class's probability."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import as_vector, close
from engine.inputs import Inputs, LogitsInputs, wide_of
from engine.workloads import Workload
from torch import Tensor
from torch.nn import functional as F

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


class OutputInputs(Inputs):
    """Logits with places behind the classes, or of many labels, and their targets."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        n, classes, *places = workload.shape
        self.keywords = {"multilabel": True} if workload.name == "many_labels" else {}
        if workload.name == "tokens":
            self.logits = self._randn((n, *places, classes), 1.0).movedim(-1, 1)
        else:
            self.logits = self._randn(workload.shape, 1.0)
        random = {"generator": self._generator, "device": device}
        if self.keywords:
            self.labels = torch.rand(workload.shape, **random).lt(0.1).to(dtype)
        else:
            self.labels = torch.randint(classes, (n, *places), **random)
        self.nbytes = self.logits.nbytes


def eager_log_likelihoods(i: OutputInputs) -> Tensor:
    """The log-likelihood of each row, or with many labels of each label."""
    if i.keywords:
        return -F.binary_cross_entropy_with_logits(i.logits, i.labels, reduction="none")
    return i.logits.log_softmax(1).gather(1, i.labels.unsqueeze(1))


#: Outputs as segmentation, language modelling and multi-label classification have them.
OUTPUTS = (
    Workload("segmentation", "8 images of 256×256, 21 classes", "outputs", shape=(8, 21, 256, 256)),
    Workload(
        "tokens", "32×128 tokens of 32,000", "outputs", shape=(32, 32000, 128), named_only=True
    ),
    Workload("many_labels", "batch 64, 309 labels", "outputs", shape=(64, 309)),
)


@register
class ScoresOfOutputs(Case):
    """Probabilities and their logarithms, of outputs that are more than [B, C]."""

    name = "scores_of_outputs"
    title = "modality_scores of places, tokens and labels"
    kind = "outputs"
    ops = ("modality_scores",)
    passes = 1
    workloads = OUTPUTS
    make = staticmethod(OutputInputs)

    def check(self, provider: str, i: OutputInputs, result: Any) -> None:
        """Eager PyTorch rounds each row's logarithm to the logits' dtype."""
        log_p = eager_log_likelihoods(
            SimpleNamespace(
                logits=i.logits.double(),
                labels=i.labels.double() if i.keywords else i.labels,
                keywords=i.keywords,
            )
        )
        exact = torch.stack([log_p.exp().mean(), log_p.mean()])
        close("scores", as_vector(result, i.device), exact, 1e-4 + torch.finfo(i.dtype).eps)

    def foreach(self, i: OutputInputs) -> list[Tensor]:
        log_p = eager_log_likelihoods(i)
        return [log_p.exp().mean(dtype=wide_of(i.dtype)), log_p.mean(dtype=wide_of(i.dtype))]

    def mmfuse(self, i: OutputInputs, backend: str) -> list[Tensor]:
        found = ops.modality_scores([i.logits], i.labels, **i.keywords, backend=backend)
        return [found.prob[0], found.log_prob[0]]
