"""co_information_gate: two features and many, and no rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import DTYPES, WIDE, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    a, b = torch.randn(2, 4, 3, device=device).unbind()
    k = torch.tensor(0.5, device=device)
    return {"co_information_gate": [([a, b], k), ([a, b, a], -k), ([a[:0], b[:0]], k)]}


def small(device: str) -> Small:
    features = list(torch.randn(3, 9, 33, device=device))
    return lambda: ops.co_information_gate(features, -0.9)


def short(device: str) -> Small:
    features = list(torch.randn(3, 80, 512, device=device))
    return lambda: ops.co_information_gate(features, -0.9)


def case(inputs: Inputs) -> list[Tensor]:
    """66 pairs; a launch has 64."""
    written = []
    for dtype in DTYPES:
        for modalities in (2, 3 if inputs.interpreted else 12):
            features = [inputs.normal(37, 40, dtype=dtype) for _ in range(modalities)]
            written.append(ops.co_information_gate(features, -0.9))
    return written


def compiled(inputs: Inputs) -> None:
    for dtype in WIDE:
        ops.co_information_gate([inputs.normal(3, 512, dtype=dtype) for _ in "ab"], 0.5)
