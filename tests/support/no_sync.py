"""Finds whatever would make the host wait for the device, also where there is only a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# .item(), bool(t), float(t), t.nonzero(), t[mask] and torch.equal end in these.
_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.name().split(".")[0]
        assert name not in _READS, f"{name} reads a device value on the host"
        return func(*args, **(kwargs or {}))


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        # The first call of a process warns after it has set the mode: as an error, the mode stays.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def sync_debug_mode(mode: int | str) -> Iterator[None]:
    """PyTorch's debug mode for waits, of the whole process; always put back to what it was."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_sync_debug_mode(mode)
        yield
    finally:
        _set_sync_debug_mode(before)


@contextmanager
def no_host_sync(device: str) -> Iterator[None]:
    """Fails on an operator that reads a value on the host; on a GPU also on any other wait."""
    if device != "cuda":
        with _NoReads():
            yield
        return
    torch.cuda.synchronize()
    with sync_debug_mode("error"), _NoReads():
        yield
