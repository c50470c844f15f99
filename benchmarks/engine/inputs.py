"""Random tensors for a workload, the same for all providers of a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .workloads import Workload

#: Strength of OGM's modulation.
ALPHA = 0.8
#: The cosine of the two features, on average: above the gate's threshold, and below one.
COSINE = 0.5
SEED = 20220614


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32 for every dtype up to it, as AMP has coefficients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Inputs:
    """Handed by a case to its providers.

    Attributes:
        workload: The source of the sizes.
        dtype: Of the data.
        device: Of the data.
        nbytes: Bytes of one operand, e.g. of all gradients.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        self.workload = workload
        self.dtype = dtype
        self.device = device
        self.nbytes = 0
        self._cache: dict[object, Any] = {}
        self._generator = torch.Generator(device).manual_seed(SEED)

    def restore(self, *, replaced: bool = False) -> None:
        """Undoes what a call has changed; not timed.

        Args:
            replaced: The provider replaces gradients instead of updating them in place.
        """

    def cached(self, key: object, make: Callable[[], Any]) -> Any:
        """An object that a provider makes once for a training run, outside the timed region."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def _randn(self, shape: tuple[int, ...], std: float) -> Tensor:
        kwargs = {"generator": self._generator, "device": self.device}
        return torch.randn(shape, **kwargs).mul_(std).to(self.dtype)


class LogitsInputs(Inputs):
    """Logits in which the first modality is ahead, and labels."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.classes)
        self.labels = torch.randint(
            workload.classes, shape[:1], generator=self._generator, device=device
        )
        self.logits = [self._randn(shape, 1.0) for _ in range(workload.modalities)]
        self.logits[0] += 2 * torch.nn.functional.one_hot(self.labels, workload.classes).to(dtype)
        self.nbytes = sum(z.nbytes for z in self.logits)
