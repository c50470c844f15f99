"""Values for histograms, and NumPy's counts of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

# Before NumPy 2, a float32 histogram has float64 edges.
NUMPY_BINS_IN_FLOAT32 = int(numpy.__version__.split(".")[0]) >= 2


def counted_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_numpy(x: Tensor) -> numpy.ndarray:
    return x.detach().cpu().to(counted_dtype(x.dtype)).numpy()


def related(shape: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Three variables that share something, of very different ranges and centres."""
    common = torch.randn(*shape, dtype=torch.float64)
    out = [
        10.0**power * (common + torch.randn(*shape, dtype=torch.float64) + centre)
        for power, centre in ((0, 0), (-3, 5), (3, -3))
    ]
    return [x.to(dtype).to(device) for x in out]
