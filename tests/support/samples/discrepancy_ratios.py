"""discrepancy_ratios: scores of both dtypes, more modalities than a warp has lanes."""

from __future__ import annotations

from collections.abc import Sequence

import tolerances
import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import WIDE, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    return {"discrepancy_ratios": [(torch.rand(2, device=device),)]}


def _bound(arguments: Sequence[Tensor], ratios: Sequence[Tensor]) -> list[Tensor]:
    return [tolerances.ratios(arguments[0].dtype, ratios[0])]


bounds = {"discrepancy_ratios": _bound}


def small(device: str) -> Small:
    scores = torch.rand(3, device=device)
    return lambda: ops.discrepancy_ratios(scores)


short = small  # No part of it is ever shared out.


def case(inputs: Inputs) -> list[Tensor]:
    return [ops.discrepancy_ratios((inputs.normal(37).abs() + 0.1).to(dtype)) for dtype in WIDE]
