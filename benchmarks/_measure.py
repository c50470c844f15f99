"""How long a call takes, what it launches, how often it waits for the device, what it allocates."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from mmfuse.ops._registry import OPS

Call = Callable[[], Any]

MIN_SAMPLES = 3
MAX_SAMPLES = 200
_ROW_SECONDS = 1e-3
COPY_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}
_FLUSH_BYTES = 2**28
_SYNC_WARNING = "synchronizing CUDA operation"
_MEASURED = "measured call"
_INDUCTOR_KERNEL = "_cpp_fused_"
# `.item()`, `if tensor`, indexing by a 0-d tensor; and operators that size their result.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
_DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Prepared:
    """A provider's call on its inputs.

    Attributes:
        call: What is timed.
        restore: Undoes what the call has changed; not timed.
        compiled: Whether it runs code of torch.compile.
        queued: Whether the device's time alone is wanted: the clock then starts when the whole call
            is in the device's queue.
    """

    call: Call
    restore: Call = lambda: None
    compiled: bool = False
    queued: bool = False


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: on the device, and until the call returned to the host."""

    device: float
    host: float


@dataclass(frozen=True)
class Cost:
    """What one call does besides taking time."""

    launches: int
    host_syncs: int
    extra_bytes: int


class Clock:
    """Times a call: once, as a training step makes it, or a short one many times in a row.

    On a GPU by events. What was written before, to empty the caches, keeps the device busy while
    the host prepares the first launches, as a backward pass would.

    Args:
        device: Where the calls run.
        shrink: By how much the data is smaller than it should be, in a rehearsal.
    """

    def __init__(self, device: torch.device, shrink: int = 1) -> None:
        self._cuda = device.type == "cuda"
        # Larger than any last-level cache.
        self._flush = torch.empty(_FLUSH_BYTES // shrink, dtype=torch.uint8, device=device)
        if self._cuda:
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            self._flush_seconds = self(self._flush.zero_, cold=True).device

    def __call__(self, call: Call, *, cold: bool, repeats: int = 1, lead: float = 0.0) -> Sample:
        """Mean time of `repeats` calls, with nothing of their data in the caches if `cold`.

        If so, a GPU is kept busy for at least `lead` seconds before the clock starts.
        """
        if self._cuda:
            torch.cuda.synchronize()
        if cold:
            for _ in range(flushes(lead, self._flush_seconds) if self._cuda and lead else 1):
                self._flush.zero_()
        if self._cuda:
            self._start.record()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        host = (time.perf_counter() - start) / repeats
        if not self._cuda:
            return Sample(host, host)
        self._end.record()
        self._end.synchronize()
        return Sample(self._start.elapsed_time(self._end) / 1e3 / repeats, host)


def flushes(lead: float, seconds: float) -> int:
    """How many flushes of so many seconds take as long as the host needs, and one more."""
    return 1 + math.ceil(lead / seconds)


@contextlib.contextmanager
def convolutions(*, tf32: bool) -> Iterator[None]:
    """For a while cuDNN tries its algorithms and keeps the fastest, and rounds to TF32 or not."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32 = True, tf32
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


def interleaved(
    providers: Mapping[str, Prepared],
    clock: Clock,
    seconds: float,
    *,
    cold: bool,
    in_rows: bool = False,
    most: int = MAX_SAMPLES,
) -> dict[str, list[Sample]]:
    """Samples of all calls in turns, so that a slow spell of the machine hits all of them.

    Args:
        providers: Name → what to time.
        clock: Times one call.
        seconds: For all calls together, in equal shares; each gets `MIN_SAMPLES` at least.
        cold: Whether to empty the caches before each call.
        in_rows: Whether to time rows of calls that take about a millisecond together. A short call
            on its own mostly shows what the provider before it has left in the caches.
        most: Samples of each call.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in providers}
    repeats, leads = dict.fromkeys(providers, 1), dict.fromkeys(providers, 0.0)
    for name, prepared in providers.items():
        if not (in_rows or prepared.queued):
            continue
        warm = []
        for _ in range(3):
            prepared.restore()
            warm.append(clock(prepared.call, cold=False))
        # The first of them warms up: by its time alone rows would be of one call.
        if in_rows:
            once = min(max(sample.host, sample.device) for sample in warm)
            repeats[name] = max(1, round(_ROW_SECONDS / max(once, 1e-9)))
        if prepared.queued:
            # The host is now and then slower than it was in the best of three calls.
            leads[name] = 2 * min(sample.host for sample in warm)
    spent = dict.fromkeys(providers, 0.0)
    share = seconds / max(1, len(providers))
    active = list(providers)
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        while active:
            for name in active:
                began = time.perf_counter()
                providers[name].restore()
                samples[name].append(
                    clock(providers[name].call, cold=cold, repeats=repeats[name], lead=leads[name])
                )
                spent[name] += time.perf_counter() - began
            active = [n for n in active if not _enough(len(samples[n]), spent[n], share, most)]
            # Nobody always runs after the same neighbour.
            order.shuffle(active)
    finally:
        gc.enable()
    return samples


def _enough(count: int, spent: float, share: float, most: int) -> bool:
    return count >= MIN_SAMPLES and (spent >= share or count >= most)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


class BigCopy:
    """A copy far beyond the caches: the yardstick of the machine.

    Attributes:
        prepared: What to time.
        nbytes: Bytes read plus bytes written.
    """

    def __init__(self, device: torch.device, shrink: int = 1) -> None:
        source = torch.randn(COPY_ELEMENTS[device.type] // shrink, device=device)
        target = torch.empty_like(source)
        self.nbytes = 2 * source.nbytes
        self.prepared = Prepared(lambda: target.copy_(source))
        self.prepared.call()


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
