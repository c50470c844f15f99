"""Rows of results as a table on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

from rich import box
from rich.table import Table

from .cost import Cost
from .measure import Sample, quantile
from .replay import name_of as replay_of

# Below this many bytes a call's time is that of its launches; a bandwidth would mislead.
LATENCY_BYTES = 2**20
_MIB = 2**20
NO_NUMBER = "—"


@dataclass(frozen=True)
class Row:
    """One provider in one case; None where a number means nothing.

    Times are in milliseconds, but the host's and an adapter's own, which are in microseconds.
    Bandwidth, its share of the copy's and the multiple of the floor are a replay's where there is
    one. `busy_p90` is the 90th percentile beside a busy neighbour over the quiet median, `reduced`
    how many numbers mmfuse sends to the other ranks.
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
    launches: int
    host_syncs: int
    extra_mib: float
    own_us: float | None = None
    reduced: int | None = None


#: Fewer samples beside a neighbour say nothing about the slowest tenth.
LEAST_BUSY = 5


@dataclass(frozen=True)
class Besides:
    """What is measured beside the quiet calls.

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
                extra_mib=cost.extra_bytes / _MIB,
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
    """How many times faster than `base`: the median over the rounds in which both ran."""
    if base is None or other is None:
        return None
    return statistics.median(b.device / o.device for b, o in zip(base, other, strict=False))


def show_time(ms: float) -> str:
    """Three digits and a unit."""
    for scale, unit in ((1e-3, "s"), (1.0, "ms")):
        if ms * scale >= 1:
            return f"{_digits(ms * scale)} {unit}"
    return f"{_digits(ms * 1e3)} µs"


def show_ratio(ratio: float | None) -> str:
    """E.g. 12.3×; a dash where there is no number."""
    return NO_NUMBER if ratio is None else f"{_digits(ratio)}×"


def _digits(value: float) -> str:
    """Three significant digits from 1 on, two below."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.995 else f"{value:#.2g}"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "provider": lambda r: r.provider,
    "×official": lambda r: show_ratio(r.vs_official),
    "×foreach": lambda r: show_ratio(r.vs_foreach),
    "of plain": lambda r: show_ratio(r.of_plain),
    "median": lambda r: show_time(r.median_ms),
    "p20": lambda r: show_time(r.p20_ms),
    "p80": lambda r: show_time(r.p80_ms),
    "host": lambda r: NO_NUMBER if r.host_us is None else show_time(r.host_us / 1e3),
    "busy p90": lambda r: show_ratio(r.busy_p90),
    "replay": lambda r: NO_NUMBER if r.replay_ms is None else show_time(r.replay_ms),
    "replay p80": lambda r: NO_NUMBER if r.replay_p80_ms is None else show_time(r.replay_p80_ms),
    "×foreach, replay": lambda r: show_ratio(r.replay_vs_foreach),
    "GB/s": lambda r: NO_NUMBER if r.gb_per_s is None else _digits(r.gb_per_s),
    "of copy": lambda r: NO_NUMBER if r.copy_share is None else f"{r.copy_share:.0%}",
    "×floor": lambda r: show_ratio(r.times_floor),
    "launches": lambda r: str(r.launches),
    "syncs": lambda r: str(r.host_syncs),
    "extra MiB": lambda r: f"{r.extra_mib:.{2 if r.extra_mib < 10 else 0}f}",
    "reduced": lambda r: NO_NUMBER if r.reduced is None else str(r.reduced),
    "adapter": lambda r: NO_NUMBER if r.own_us is None else show_time(r.own_us / 1e3),
    "samples": lambda r: str(r.samples),
}


# What an 80-column terminal has room for.
_NARROW = (
    "provider",
    "×official",
    "×foreach",
    "of plain",
    "median",
    "host",
    "replay",
    "of copy",
    "syncs",
    "extra MiB",
)


def _columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """Those with a number in some row."""
    return {
        name: show for name, show in _COLUMNS.items() if any(show(row) != NO_NUMBER for row in rows)
    }


def terminal_table(rows: Sequence[Row], *, wide: bool) -> Table:
    """One case as a table for rich."""
    first = rows[0]
    title = f"{first.title}\n{first.workload}, {first.dtype}"
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    columns = {n: show for n, show in _columns(rows).items() if wide or n in _NARROW}
    for name in columns:
        table.add_column(name, justify="left" if name == "provider" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    return table


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All rows with all numbers; a run that is killed meanwhile leaves the file as it was."""
    draft = path.with_suffix(".part")
    with draft.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(astuple(row) for row in rows)
    os.replace(draft, path)


_NOTES = """\
- *×official*, *×foreach*: how many times faster than that provider, the median over the rounds in
  which both ran; below 1 is slower. Providers take turns, so that a slow spell hits all of them.
- *of plain*: how many times as long as the same training step without the method, likewise.
- *median*, *p20*, *p80*: of a call as Python makes it. On a GPU that is the time between two
  events around it, in which the device also waits for the host.
- *host*: what the host takes. On a GPU until the call returns; on a CPU the same call on as many
  tensors of a few elements each, in rows with warm caches: Python, checks and dispatch.
- *busy p90*: the 90th percentile beside processes that keep all cores busy, over the quiet median.
  Two fair halves of the machine would be 2×. Not for training steps and what takes longer.
- *replay*, *replay p80*: on a GPU, of the call recorded in a CUDA graph and replayed with empty
  caches, when it is already in the device's queue: the device's own time. *×foreach, replay*: how
  many times faster than that provider's. A dash where a call cannot be recorded; the reason is
  under *Not measured*.
- *GB/s*: the fewest bytes that the case must move, over the replay, or the median where there is
  none. *of copy*: its share of the
  bandwidth of a large `copy_` in the same rounds, bytes read plus bytes written. *×floor*: that
  time over what the copy would take for those bytes. On a CPU a copy also fetches the
  lines that it overwrites, so that reading, or updating in place, can pass 100 %. A dash: under
  1 MiB, where the time is that of the launches, and for whole training steps. A column without a
  number is left out.
- *launches*: on a GPU, kernels, copies and fills that the profiler saw. On the CPU, operators
  dispatched (a `_foreach_` operator counts once, though it loops inside), and for `compile` the
  kernels that Inductor generated. *syncs*: how often the host waits for a value.
- *extra MiB*: peak of what the call allocates from PyTorch's allocator.
- *reduced*: how many numbers mmfuse sends to the other ranks in a step. *adapter*: the adapter's
  own code in a step, without the method and the framework.
"""


def markdown(
    rows: Sequence[Row],
    environment: Mapping[str, str],
    skipped: Sequence[str],
    refused: Sequence[str],
    plots: Sequence[str],
) -> str:
    """The whole report."""
    lines = [f"# Benchmarks on {environment['device']}", ""]
    lines += [f"- {key}: `{value}`" for key, value in environment.items()]
    if refused:
        lines += ["", "**Refused by the parity gate:**", "", *(f"- {text}" for text in refused)]
    lines += ["", *(f"![Speed-up over official]({name})" for name in plots)]
    for workload, dtype in dict.fromkeys((row.workload, row.dtype) for row in rows):
        mine = [row for row in rows if (row.workload, row.dtype) == (workload, dtype)]
        columns = _columns(mine)
        lines += ["", f"## {workload}, {dtype}", ""]
        lines.append("| case | " + " | ".join(columns) + " |")
        lines.append("|---|---" + "|--:" * (len(columns) - 1) + "|")
        before = ""
        for row in mine:
            title = row.title if row.title != before else ""
            before = row.title
            lines.append(f"| {title} | " + " | ".join(s(row) for s in columns.values()) + " |")
    lines += ["", "## How to read this", "", _NOTES]
    if skipped:
        lines += ["## Not measured", "", *(f"- {text}" for text in skipped), ""]
    return "\n".join(lines)
