"""Random paired values and features for the estimators of information, as `_inputs`."""

from __future__ import annotations

import torch
from _inputs import COSINE, Inputs
from _workloads import Workload
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.1
# ARM's, of the conditional mutual information.
CONDITIONAL_BINS = 2


class ValueInputs(Inputs):
    """Two variables [P, N], normal with the correlation `COSINE`."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        x, other = (self._randn(workload.shape, 1.0) for _ in range(2))
        y = x.mul(COSINE).add_(other, alpha=(1 - COSINE**2) ** 0.5)
        self.x, self.y = (values.requires_grad_() for values in (x, y))
        self.bins = workload.bins
        self.nbytes = x.nbytes + y.nbytes


class FusionInputs(Inputs):
    """Features of two modalities after a ReLU, and the fused representation."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.width)
        self.audio, self.visual = (self._randn(shape, 1.0).relu_() for _ in range(2))
        self.fused = 0.5 * self.audio - self.visual + self._randn(shape, 0.5)
        self.bins = workload.bins
        self.nbytes = 3 * self.fused.nbytes

    @property
    def features(self) -> tuple[Tensor, Tensor, Tensor]:
        """Audio, visual, fused."""
        return self.audio, self.visual, self.fused


class ContrastInputs(Inputs):
    """Rows of unit length, whose partners have `COSINE` with them."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.width)
        a, other = (F.normalize(self._randn(shape, 1.0), dim=1) for _ in range(2))
        b = F.normalize(COSINE * a + (1 - COSINE**2) ** 0.5 * other, dim=1)
        self.features = [feature.requires_grad_() for feature in (a, b)]
        self.nbytes = sum(feature.nbytes for feature in self.features)
