"""Rows of results as a table on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from rich import box
from rich.table import Table

from .rows import Row, ratio_of

NO_NUMBER = "—"
#: Head of a list of measurements in which `foreach` is not what it is to be.
BEATEN = "`official` is faster than `foreach`, which is then not the best eager PyTorch"
# Medians of one code differ by this much.
_SAME = 0.03


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


def _count(value: int | None) -> str:
    return NO_NUMBER if value is None else str(value)


def _mib(value: float | None) -> str:
    return NO_NUMBER if value is None else f"{value:.{2 if value < 10 else 0}f}"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "provider": lambda r: r.provider,
    "×official": lambda r: show_ratio(r.vs_official),
    "×foreach": lambda r: show_ratio(r.vs_foreach),
    "×compile": lambda r: show_ratio(r.vs_compile),
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
    "launches": lambda r: _count(r.launches),
    "syncs": lambda r: _count(r.host_syncs),
    "extra MiB": lambda r: _mib(r.extra_mib),
    "reduced": lambda r: _count(r.reduced),
    "adapter": lambda r: NO_NUMBER if r.own_us is None else show_time(r.own_us / 1e3),
    "samples": lambda r: str(r.samples),
}


# An 80-column terminal has room for these.
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
- *×official*, *×foreach*, *×compile*: how many times faster than that provider, by the medians
  over all samples; below 1 is slower. Providers take turns over the whole time, so that a slow
  spell hits all of them.
- *of plain*: how many times as long as the same training step without the method, likewise.
- *median*, *p20*, *p80*: of a call as Python makes it. On a GPU that is the time between two
  events around it, in which the device also waits for the host.
- *host*: what the host takes. On a GPU until the call returns; on a CPU the same call on as many
  tensors of a few elements each, in rows with warm caches: Python, checks and dispatch.
- *busy p90*: the 90th percentile beside processes that keep all cores busy, over the quiet median.
  Two fair halves of the machine would be 2×. Not for training steps and what takes longer.
- *replay*, *replay p80*: on a GPU, of the call recorded in a CUDA graph and replayed. Rows with a
  bandwidth have it with empty caches and when it is already in the device's queue: the device's
  own time. The others are timed many in a row with warm caches, and the device may wait for the
  host. *×foreach, replay*: how many times faster than that provider's. A dash where a call cannot
  be recorded; the reason is under *Not measured*.
- *GB/s*: the fewest bytes that the case must move, over the replay, or the median where there is
  none. *of copy*: its share of the
  bandwidth of a large `copy_`, bytes read plus bytes written: of one number for all rows, the 90th
  percentile over all measurements, each of which has a copy in its rounds. *×floor*: that
  time over what the copy would take for those bytes. On a CPU a copy also fetches the
  lines that it overwrites, so that reading, or updating in place, can pass 100 %. A dash: under
  1 MiB, where the time is that of the launches, and for whole training steps. A column without a
  number is left out.
- *launches*: on a GPU, kernels, copies and fills that the profiler saw. On the CPU, operators
  dispatched (a `_foreach_` operator counts once, though it loops inside), and for `compile` the
  kernels that Inductor generated. *syncs*: how often the host waits for a value.
- *extra MiB*: peak of what the call allocates from PyTorch's allocator. A dash: launches, syncs and
  memory are not counted where `reference` makes noise, which takes it thousands of operators, nor
  in processes of their own.
- *reduced*: how many numbers mmfuse sends to the other ranks in a step. *adapter*: the adapter's
  own code in a step, without the method and the framework.
"""


def beaten_eager(rows: Sequence[Row]) -> list[str]:
    """The measurements in which `official` is faster than `foreach`, beyond the spread of both."""
    official = {(r.case, r.workload, r.dtype): r for r in rows if r.provider == "official"}
    found = []
    for row in rows:
        base = official.get((row.case, row.workload, row.dtype))
        if base is None or row.provider != "foreach":
            continue
        ratio = ratio_of(base, row)
        if ratio.value < 1 - _SAME and ratio.high < 1:
            where = f"{row.title} on {row.workload}, {row.dtype}"
            found.append(f"{where}: foreach is {show_ratio(ratio.value)}")
    return found


def markdown(
    rows: Sequence[Row],
    environment: Mapping[str, str],
    skipped: Sequence[str],
    refused: Sequence[str],
    plots: Sequence[str],
    invocations: Sequence[Mapping[str, str]] = (),
) -> str:
    """The whole report."""
    lines = [f"# Benchmarks on {environment['device']}", ""]
    lines += [f"- {key}: `{value}`" for key, value in environment.items()]
    for run in invocations:
        lines.append(f"- run: {'; '.join(f'{key}: `{value}`' for key, value in run.items())}")
    if refused:
        lines += ["", "**Refused by the parity gate:**", "", *(f"- {text}" for text in refused)]
    beaten = beaten_eager(rows)
    if beaten:
        lines += ["", f"**{BEATEN}:**", "", *(f"- {text}" for text in beaten)]
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
