"""How long a call takes, in turns with others."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

MIN_SAMPLES = 3
#: Of what the documents show: of fewer, p20 and p80 are hardly more than the extremes.
SHOWN_SAMPLES = 10
MAX_SAMPLES = 200
_ROW_SECONDS = 1e-3
COPY_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}
_FLUSH_BYTES = 2**28


@dataclass(frozen=True)
class Prepared:
    """A provider's call on its inputs.

    Attributes:
        call: The call that is timed.
        restore: Undoes what the call has changed; not timed.
        compiled: True if it runs code of torch.compile.
        queued: True if the device's time alone is wanted: the clock then starts when the whole call
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


class Clock:
    """Times a call: once, as a training step makes it, or a short one many times in a row.

    On a GPU by events. The write before it, which empties the caches, keeps the device busy while
    the host prepares the first launches, as a backward pass would.

    Args:
        device: The device of the calls.
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
    """Lets cuDNN try its algorithms for a while and keep the fastest, and round to TF32 or not."""
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
    least: Mapping[str, int] | None = None,
) -> dict[str, list[Sample]]:
    """Samples of all calls in turns, so that a slow spell of the machine hits all of them.

    A slow call's few samples are spread over the whole time, as a quick one's many are: medians
    over all samples can then be compared.

    Args:
        providers: Name → what to time.
        clock: Times one call.
        seconds: For all calls together, in equal shares.
        cold: True to empty the caches before each call.
        in_rows: True to time rows of calls that take about a millisecond together. A short call
            on its own mostly shows what the provider before it has left in the caches.
        most: Samples of each call.
        least: Samples of each call, however long they take; `MIN_SAMPLES` of one without.
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
    done = dict.fromkeys(providers, 0.0)
    fewest = {name: (least or {}).get(name, MIN_SAMPLES) for name in providers}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        while done and min(done.values()) < 1:
            due = [name for name in done if done[name] == min(done.values())]
            # No call always runs after the same neighbour.
            order.shuffle(due)
            for name in due:
                began = time.perf_counter()
                providers[name].restore()
                samples[name].append(
                    clock(providers[name].call, cold=cold, repeats=repeats[name], lead=leads[name])
                )
                spent[name] += time.perf_counter() - began
                taken = len(samples[name])
                fitting = math.ceil(share / max(spent[name], 1e-9) * taken)
                done[name] = taken / max(fewest[name], min(most, fitting))
    finally:
        gc.enable()
    return samples


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


class BigCopy:
    """A copy far beyond the caches: the yardstick of the machine.

    Attributes:
        prepared: The calls to time.
        nbytes: Bytes read plus bytes written.
    """

    def __init__(self, device: torch.device, shrink: int = 1) -> None:
        source = torch.randn(COPY_ELEMENTS[device.type] // shrink, device=device)
        target = torch.empty_like(source)
        self.nbytes = 2 * source.nbytes
        self.prepared = Prepared(lambda: target.copy_(source))
        self.prepared.call()
