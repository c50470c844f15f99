"""Provider `official`: ARM's information, and what people write for the other estimators.

As `_official`. The mutual information of other values is taken as ARM takes it; InfoNCE is two
cross entropies. NumPy's memory is not PyTorch's: it is missing from the report's extra memory.
"""

from __future__ import annotations

import math

import torch
from _information_inputs import TEMPERATURE, ContrastInputs, FusionInputs, ValueInputs
from _released import released
from torch import Tensor
from torch.nn import functional as F


def contrast(a: Tensor, b: Tensor) -> Tensor:
    """InfoNCE as a bound."""
    similarity = a @ b.t() / TEMPERATURE
    partner = torch.arange(len(a), device=a.device)
    loss = F.cross_entropy(similarity, partner) + F.cross_entropy(similarity.t(), partner)
    return math.log(len(a)) - loss / 2


def mutual_information(i: ValueInputs) -> tuple[tuple[float, ...], ...]:
    # One problem after the other; the values are copied at once, which is kind.
    rows = (released.arm.host(values).reshape(values.shape) for values in (i.x, i.y))
    found = (released.arm.shared(x, y, i.bins) for x, y in zip(*rows, strict=True))
    return tuple(zip(*found, strict=True))


def sample_information(i: ValueInputs) -> tuple[tuple[float, ...], ...]:
    return mutual_information(i)


def arm_information(i: FusionInputs) -> tuple[float, ...]:
    return released.arm.information(*i.features, i.bins)


def info_nce(i: ContrastInputs) -> tuple[Tensor, ...]:
    bound = contrast(*i.features)
    return bound, *torch.autograd.grad(bound, i.features)
