"""The abilities of a kind of device, by the name that PyTorch gives it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class _Wide(dict[str, torch.dtype]):
    """Device type → dtype; a lookup of a known one runs no Python, and a compiler can follow it."""

    def __missing__(self, device_type: str) -> torch.dtype:
        found = self[device_type] = torch.float64 if _computes(device_type) else torch.float32
        return found


#: Device type → the dtype of sums and of formulas on small tensors there: float64, or float32 where
#: the device has no float64, as Apple's GPUs and some of Intel's.
WIDE = _Wide(cpu=torch.float64, cuda=torch.float64, meta=torch.float64, mps=torch.float32)


def has_float64(device: torch.device | str) -> bool:
    """True if tensors there can be float64. Of a kind of device not met before, it tries."""
    return WIDE[torch.device(device).type] == torch.float64


def narrowed(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype itself, but float32 for float64 where the device does not have that."""
    return WIDE[device.type] if dtype == torch.float64 else dtype


def readable(value: Tensor) -> bool:
    """False where a tensor has no value, or reading it would end the capture of a CUDA graph."""
    if isinstance(value, FakeTensor) or value.is_meta:
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def known(value: Tensor) -> bool:
    """True if a tensor's values can be looked at: it is dense, and not on the meta device."""
    return value.layout is torch.strided and not value.is_meta


def _computes(device_type: str) -> bool:
    try:
        return bool(torch.ones(2, dtype=torch.float64, device=device_type).sum() == 2)
    except (RuntimeError, TypeError, NotImplementedError, AssertionError):
        return False
