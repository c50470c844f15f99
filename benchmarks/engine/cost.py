"""A call's launches, waits for the device, and allocations."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from mmfuse.ops._registry import OPS

from .measure import Prepared

_SYNC_WARNING = "synchronizing CUDA operation"
_MEASURED = "measured call"
_INDUCTOR_KERNEL = "_cpp_fused_"
# `.item()`, `if tensor`, indexing by a 0-d tensor; and operators that size their result.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
_DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Cost:
    """One call's doings besides taking time; None is not counted."""

    launches: int | None
    host_syncs: int | None
    extra_bytes: int | None


UNCOUNTED = Cost(None, None, None)


def cost_of(prepared: Prepared, device: torch.device) -> Cost:
    """Counts one call's launches, host syncs and extra memory; not the first call ever."""
    # Kineto reports every start and stop on stderr below this level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if device.type == "cuda":
        return _cost_on_cuda(prepared)
    counter = _Counter()
    # torch.compile refuses to run under a dispatch mode.
    mode = contextlib.nullcontext() if prepared.compiled else counter
    # The profiler sees every allocation of PyTorch's allocator, inside C++ operators too; and the
    # end of a tensor only if it has seen its beginning, so that it must see `restore`.
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        prepared.restore()
        with record_function(_MEASURED), mode:
            prepared.call()
    events = _trace(profiler)
    start = next(event["ts"] for event in events if event.get("name") == _MEASURED)
    kernels = sum(_INDUCTOR_KERNEL in event.get("name", "") for event in events)
    return Cost(counter.launches + kernels, counter.syncs, _peak_growth(events, start))


def _peak_growth(events: list[dict[str, Any]], start: float) -> int:
    """How far the allocated bytes rise, after `start`, over what they were then."""
    changes = [e for e in events if e.get("name") == "[memory]" and e["ts"] >= start]
    now = peak = 0
    for event in sorted(changes, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def _cost_on_cuda(prepared: Prepared) -> Cost:
    prepared.restore()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prepared.call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    prepared.restore()
    with sync_warnings() as caught:
        prepared.call()
    syncs = sum(_SYNC_WARNING in str(warning.message) for warning in caught)
    prepared.restore()
    torch.cuda.synchronize()
    # As PyTorch sets them where it uses graphs itself: a profiler that ends and starts again can
    # crash beside them.
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    # The host's operators would be most of the trace, and are not counted. Without the accumulation
    # PyTorch 2.11 warns that there is none.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        prepared.call()
        torch.cuda.synchronize()
    launches = sum(event.get("cat") in _DEVICE_EVENTS for event in _trace(profiler))
    return Cost(launches, syncs, extra)


@contextlib.contextmanager
def sync_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Collects PyTorch's warnings about waits of the host; the mode is then what it was."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # Warns, once in a process, that the mode is a prototype.
            torch.cuda.set_sync_debug_mode("warn")
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _trace(profiler: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


class _Counter(TorchDispatchMode):
    """Counts what would be a launch and what would be a host sync, were this a GPU.

    Views and allocations compute nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mmfuse" and func._overloadname == "reference":
            # The reference is many operators behind one name: look inside.
            name = func._opname
            module = importlib.import_module(f"mmfuse.reference.{OPS[name].module}")
            with self:
                return getattr(module, name)(*args, **kwargs)
        if func._opname in _WAITING:
            self.syncs += 1
        elif not func.is_view and "empty" not in func._opname:
            self.launches += 1
        return func(*args, **kwargs)
