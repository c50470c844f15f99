"""`redundancy_ratio`: how far an encoder's output moves with its input."""

from __future__ import annotations

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import STATS_TOLERANCE, close
from engine.inputs import Inputs, wide_of
from engine.workloads import Workload
from torch import Tensor
from torch.nn import functional as F

from mmfuse import ops
from mmfuse.reference import redundancy_ratio as reference

from .noisy_views import SIGMA


class MapInputs(Inputs):
    """Representations of two views, and the mean square of the views' difference."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        self.z1 = self._randn(workload.shape, 1.0)
        self.z2 = self.z1 + self._randn(workload.shape, 0.1)
        self.input_sq = torch.tensor(2 * SIGMA**2, dtype=wide_of(dtype), device=device)
        self.nbytes = self.z1.nbytes + self.z2.nbytes


@compiled(dynamic=False)
def _redundancy(z1: Tensor, z2: Tensor, input_sq: Tensor) -> Tensor:
    return reference.redundancy_ratio(z1, z2, input_sq)


@register
class Redundancy(Case):
    """The ratio."""

    name = "redundancy_ratio"
    title = "RedReg: redundancy_ratio"
    kind = "representations"
    ops = ("redundancy_ratio",)
    passes = 1
    workloads = (Workload("maps", "maps 64×512×8×8", "representations", shape=(64, 512, 8, 8)),)
    make = staticmethod(MapInputs)

    def check(self, provider: str, i: MapInputs, result: Tensor | float) -> None:
        """Compares the ratio."""
        want = reference.redundancy_ratio(*(t.double() for t in (i.z1, i.z2, i.input_sq)))
        tolerance = STATS_TOLERANCE + 2 * torch.finfo(i.dtype).eps
        close("redundancy", torch.as_tensor(result, device=i.device), want, tolerance)

    def official(self, i: MapInputs) -> float:
        return sequences.redreg.ratio((i.z1, i.z2), i.input_sq)

    def foreach(self, i: MapInputs) -> Tensor:
        return F.mse_loss(i.z1, i.z2) / (i.input_sq + 1e-12)

    def compile(self, i: MapInputs) -> Tensor:
        return _redundancy(i.z1, i.z2, i.input_sq)

    def mmfuse(self, i: MapInputs, backend: str) -> Tensor:
        return ops.redundancy_ratio(i.z1, i.z2, i.input_sq, backend=backend)
