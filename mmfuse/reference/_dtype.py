"""The precision in which the reference accumulates."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(*tensors: Tensor) -> torch.dtype:
    """float64 as soon as one tensor is; everything else accumulates in float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
