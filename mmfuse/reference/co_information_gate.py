"""True if the modalities agree: mean pairwise cosine of their features above a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ._dtype import accumulator
from ._example import Normal
from .paired_cosine import paired_cosine


def co_information_gate(features: Sequence[Tensor], threshold: Tensor) -> Tensor:
    """See `mmfuse.ops.co_information_gate`."""
    dtype = accumulator(*features)
    cosines = torch.stack([paired_cosine(a, b) for a, b in combinations(features, 2)])
    return (cosines.mean() > threshold.to(dtype)).to(dtype)


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    return {"co_information_gate": ([normal(5, 7), normal(5, 7)], normal(1)[0])}
