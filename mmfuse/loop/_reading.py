"""Reads the gradients of many parameters one by one; `mmfuse._native` can in one call.

A step reads every gradient anew, since the step before tells nothing about it: another
tensor may be in its place, of another dtype or layout, also at the same address. The one call gives
what is here and a table, int64 [T, 8] on the CPU, of each gradient's address, number of elements,
dtype, place and order, and the addresses and dtypes of its parameter and anchor; or None where a
gradient has to be looked at more closely: it is not contiguous or in channels_last, floating, on
the device of the others and not empty, or no plain tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._tensors import FLOATING, channels_last, check_named


class Reading(NamedTuple):
    """The gradients that parameters have now, of those that require one and are not empty."""

    grads: list[Tensor]
    #: The place of each one's parameter.
    ids: list[int]
    #: The places of those that have no gradient.
    waiting: list[int]
    #: The device of all gradients, if they are contiguous or in channels_last, and there; or None.
    device: torch.device | None
    #: The dtype of the kernels' vectors for these gradients: float64 if one is, else float32.
    dtype: torch.dtype


def read_each(parameters: Sequence[Tensor], names: Sequence[str]) -> Reading:
    """Looks at one after the other.

    Raises:
        TypeError: a gradient is sparse or of an unsupported dtype; the message names it.
    """
    grads, ids, waiting, kinds = [], [], [], set()
    for i, parameter in enumerate(parameters):
        grad = parameter.grad
        if not parameter.requires_grad or parameter.numel() == 0:
            continue
        if grad is None:
            waiting.append(i)
            continue
        grads.append(grad)
        ids.append(i)
        dense = grad.layout is torch.strided and (grad.is_contiguous() or channels_last(grad))
        kinds.add((grad.layout, grad.dtype, grad.device, dense))
    device, dtype, plain = None, torch.float32, True
    for layout, of, where, dense in kinds:
        if layout is not torch.strided or of not in FLOATING:
            check_named(grads, lambda t: f"the gradient of {names[ids[t]]}")
        if of is torch.float64:
            dtype = of
        plain = plain and dense and device in (None, where)
        device = where
    return Reading(grads, ids, waiting, device if plain else None, dtype)
