"""Rows of results: what was measured of one provider in one case."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .cost import Cost
from .measure import Sample, quantile
from .replay import name_of as replay_of

# Below this many bytes a call's time is that of its launches; a bandwidth would mislead.
LATENCY_BYTES = 2**20
_MIB = 2**20
# Of the measurements' copies: above it are what a timer gets wrong, below it slow spells.
_COPY_QUANTILE = 0.9


@dataclass(frozen=True)
class Row:
    """One provider in one case; None where a number means nothing.

    Times are in milliseconds, but the host's and an adapter's own, which are in microseconds.
    Bandwidth, its share of the copy's and the multiple of the floor are a replay's where there is
    one. Ratios are of medians over all samples. `busy_p90` is the 90th percentile beside a busy
    neighbour over the quiet median, `reduced` how many numbers mmfuse sends to the other ranks.
    """

    case: str
    title: str
    workload: str
    dtype: str
    device: str
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    host_us: float | None
    busy_p90: float | None
    samples: int
    replay_ms: float | None
    replay_p80_ms: float | None
    vs_official: float | None
    vs_foreach: float | None
    replay_vs_foreach: float | None
    of_plain: float | None
    gb_per_s: float | None
    copy_gb_per_s: float | None
    copy_share: float | None
    times_floor: float | None
    floor_bytes: int
    launches: int | None
    host_syncs: int | None
    extra_mib: float | None
    own_us: float | None = None
    reduced: int | None = None
    vs_compile: float | None = None


#: Fewer samples beside a neighbour say nothing about the slowest tenth.
LEAST_BUSY = 5


@dataclass(frozen=True)
class Besides:
    """Measured beside the quiet calls.

    Attributes:
        host: Provider → seconds of the host in a call.
        busy: Provider → samples beside a busy neighbour.
        own: Provider → seconds of an adapter in a step.
        reduced: Provider → numbers that go to the other ranks in a step.
    """

    host: Mapping[str, float] = field(default_factory=dict)
    busy: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    own: Mapping[str, float] = field(default_factory=dict)
    reduced: Mapping[str, int] = field(default_factory=dict)


def make_rows(
    labels: Mapping[str, str],
    samples: Mapping[str, Sequence[Sample]],
    costs: Mapping[str, Cost],
    floor_bytes: int,
    copy_bytes: int,
    besides: Besides = Besides(),
) -> list[Row]:
    """Turns the samples of one case into rows.

    Args:
        labels: The fields case, title, workload, dtype and device.
        samples: Provider → samples; "copy", where bandwidth matters, is the yardstick; samples of
            replays are under `_replay.name_of`.
        costs: Provider → cost.
        floor_bytes: The fewest bytes that the case must move.
        copy_bytes: The bytes that the copy moves.
        besides: Other measurements.
    """
    copy_gb = None
    if "copy" in samples:
        copy_gb = copy_bytes / statistics.median(s.device for s in samples["copy"]) / 1e9
    rows = []
    for provider, cost in costs.items():
        times = [s.device for s in samples[provider]]
        median = statistics.median(times)
        replays = [s.device for s in samples.get(replay_of(provider), ())]
        replay = statistics.median(replays) if replays else None
        gb = floor_bytes / (replay or median) / 1e9 if copy_gb else None
        rows.append(
            Row(
                **labels,
                provider=provider,
                median_ms=median * 1e3,
                p20_ms=quantile(times, 0.2) * 1e3,
                p80_ms=quantile(times, 0.8) * 1e3,
                host_us=_scaled(besides.host.get(provider), 1e6),
                busy_p90=_busy(besides.busy.get(provider, ()), median),
                samples=len(times),
                replay_ms=None if replay is None else replay * 1e3,
                replay_p80_ms=quantile(replays, 0.8) * 1e3 if replays else None,
                vs_official=_ratio(samples.get("official"), samples[provider]),
                vs_foreach=_ratio(samples.get("foreach"), samples[provider]),
                vs_compile=_ratio(samples.get("compile"), samples[provider]),
                replay_vs_foreach=_ratio(
                    samples.get(replay_of("foreach")), samples.get(replay_of(provider))
                ),
                of_plain=_ratio(samples[provider], samples.get("plain")),
                gb_per_s=gb,
                copy_gb_per_s=copy_gb,
                copy_share=gb / copy_gb if gb else None,
                times_floor=copy_gb / gb if gb else None,
                floor_bytes=floor_bytes,
                launches=cost.launches,
                host_syncs=cost.host_syncs,
                extra_mib=_scaled(cost.extra_bytes, 1 / _MIB),
                own_us=_scaled(besides.own.get(provider), 1e6),
                reduced=besides.reduced.get(provider),
            )
        )
    return rows


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _busy(samples: Sequence[Sample], median: float) -> float | None:
    if len(samples) < LEAST_BUSY:
        return None
    return quantile([s.device for s in samples], 0.9) / median


def _ratio(base: Sequence[Sample] | None, other: Sequence[Sample] | None) -> float | None:
    """How many times faster than `base`, by the medians over all samples."""
    if not base or not other:
        return None
    return statistics.median(s.device for s in base) / statistics.median(s.device for s in other)


@dataclass(frozen=True)
class Ratio:
    """One row's time over another's.

    Attributes:
        value: Of the medians.
        low: The first row's p20 over the second one's p80.
        high: The first row's p80 over the second one's p20.
    """

    value: float
    low: float
    high: float


def ratio_of(base: Row, other: Row) -> Ratio:
    """How many times as long as `other` the first row takes."""
    return Ratio(
        base.median_ms / other.median_ms,
        base.p20_ms / other.p80_ms,
        base.p80_ms / other.p20_ms,
    )


def with_one_copy(rows: Sequence[Row]) -> list[Row]:
    """The rows with shares of one bandwidth: of the copies of all measurements, an upper quantile.

    A copy's bandwidth moved by a factor of two within a run; what a slow spell leaves of it is no
    yardstick. Rows of one call are on one device, with as many threads.
    """
    copies = {(r.case, r.workload, r.dtype): r.copy_gb_per_s for r in rows}
    known = [copy for copy in copies.values() if copy is not None]
    if not known:
        return list(rows)
    copy = quantile(known, _COPY_QUANTILE)
    return [
        r
        if r.gb_per_s is None
        else replace(r, copy_share=r.gb_per_s / copy, times_floor=copy / r.gb_per_s)
        for r in rows
    ]
