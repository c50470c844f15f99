"""Two states of a training run, bit by bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def differences(a: Any, b: Any, path: str = "state") -> list[str]:
    """The places at which two state dicts differ in a single bit; NaN equals NaN."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        return [d for key in a for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        pairs = zip(a, b, strict=True)
        return [d for i, (x, y) in enumerate(pairs) for d in differences(x, y, f"{path}[{i}]")]
    if isinstance(a, Tensor):
        same = torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
        return [] if same else [path]
    return [] if a == b else [path]
