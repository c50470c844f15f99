"""`co_information_gate`: RedReg's decision that two modalities agree."""

from __future__ import annotations

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import close
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import co_information_gate as reference

from .paired_cosine import AGREEMENT, PairInputs, eager_cosine, exact_cosine


@compiled(dynamic=False)
def _gate(a: Tensor, b: Tensor, threshold: Tensor) -> Tensor:
    return reference.co_information_gate([a, b], threshold)


@register
class Gate(Case):
    """Open or shut."""

    name = "gate"
    title = "RedReg: co_information_gate"
    kind = "features"
    ops = ("co_information_gate",)
    passes = 1
    make = staticmethod(PairInputs)

    def check(self, provider: str, i: PairInputs, result: Tensor | float) -> None:
        """Compares the decision, which is far from its threshold."""
        opens = (exact_cosine(i) > i.threshold).double()
        close("gate", torch.as_tensor(result, device=i.device), opens, 0.0)

    def official(self, i: PairInputs) -> float:
        return sequences.redreg.agreement_gate(*i.features, AGREEMENT)

    def foreach(self, i: PairInputs) -> Tensor:
        return (eager_cosine(i) > i.threshold).to(i.threshold)

    def compile(self, i: PairInputs) -> Tensor:
        return _gate(*i.features, i.threshold)

    def mmfuse(self, i: PairInputs, backend: str) -> Tensor:
        return ops.co_information_gate(i.features, i.threshold, backend=backend)
