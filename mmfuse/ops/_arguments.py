"""Errors for arguments of a wrong type, which name the argument.

The ops look at the type themselves, without a call, and come here with all but the usual one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, ValuesView

import torch
from torch import Tensor

from .._numbers import whole
from ..noise import NoiseStream


def check_sequence(name: str, value: object, of: str = "tensors") -> None:
    """Raises a TypeError for what has no length, or is a tensor, a text or a mapping."""
    listed = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    listed = listed and getattr(value, "ndim", 1) != 0  # NumPy's single numbers have both
    listed = listed or isinstance(value, ValuesView)
    if not listed or isinstance(value, (str, bytes, Mapping, Tensor, type)):
        raise TypeError(f"{name} must be a list of {of}, got {type(value).__name__}")


def check_stream(stream: object, on_meta: bool = False) -> NoiseStream:
    """The stream; a TypeError for what is no stream, and an error for one without a fit state.

    Gradients on the meta device, which get no numbers, may have a stream that has none.
    """
    if not isinstance(stream, NoiseStream):
        raise TypeError(f"stream must be a mmfuse.NoiseStream, got {type(stream).__name__}")
    if stream.state.is_meta and not on_meta:
        raise ValueError("stream is on the meta device, where it holds no numbers")
    if stream.state.numel() != 2:
        shape = list(stream.state.shape)
        raise ValueError(f"stream has a state of shape {shape} in place of [2]: key and step")
    if stream.state.dtype is not torch.int64:
        raise TypeError(f"stream has a state of {stream.state.dtype} in place of torch.int64")
    return stream


def is_single(value: Tensor) -> bool:
    """True for a dense 0-d floating tensor."""
    return value.dim() == 0 and value.is_floating_point() and value.layout is torch.strided


def check_near(name: str, value: Tensor, device: torch.device) -> None:
    """Raises a ValueError for a tensor on the meta device whose value is needed elsewhere."""
    if value.is_meta and device.type != "meta":
        raise ValueError(f"{name} is on the meta device, where it holds no numbers")


def check_instance(name: str, value: object) -> None:
    """Raises a TypeError for a class where an object of it is meant, which can be called, too."""
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be a module or a function, got the class {value.__name__}: make one"
        )


def check_owner(owner: Sequence[int], modalities: int) -> None:
    """Checks the modality of each tensor.

    Raises:
        TypeError: it is no list of integers.
        ValueError: one of them is none of the modalities.
    """
    if type(owner) is not tuple:
        check_sequence("owner", owner, "integers")
    if not owner:
        return
    if {*map(type, owner)} == {int} and 0 <= min(owner) <= max(owner) < modalities:
        return
    for t, m in enumerate(owner):
        if not 0 <= whole(f"owner[{t}]", m) < modalities:
            raise ValueError(f"owner[{t}] = {m} is none of the {modalities} modalities")
