"""The cells of the documents' tables: each shows something of one measurement's rows.

Ratios are of medians over all samples. The brackets have p20 over p80 and p80 over p20 of both
sides; a ratio whose brackets contain 1 is about 1, whatever its own digits are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engine.report import NO_NUMBER, show_ratio, show_time
from engine.rows import Ratio, Row, ratio_of

Rows = Mapping[str, Row]  # by the provider, of one measurement
Show = Callable[[Rows], str]

#: The provider that the documents call mmfuse.
OURS = "cpu"
BASELINES = ("official", "foreach", "compile")


def of(provider: str, show: Callable[[Row], str]) -> Show:
    """The cell in which a function shows something of one provider's row."""
    return lambda rows: show(rows[provider]) if provider in rows else NO_NUMBER


def ratio(rows: Rows, base: str, other: str = OURS) -> Ratio | None:
    """How many times as long as `other` the first provider takes; None where one is missing."""
    return ratio_of(rows[base], rows[other]) if base in rows and other in rows else None


def times(base: str, other: str = OURS) -> Show:
    """The cell of a ratio."""
    return lambda rows: spread(ratio(rows, base, other))


def spread(found: Ratio | None) -> str:
    """E.g. 8.98× (8.41–9.55)."""
    if found is None:
        return NO_NUMBER
    low, high = (show_ratio(end).rstrip("×") for end in (found.low, found.high))
    return f"{value(found)} ({low}–{high})"


def value(found: Ratio) -> str:
    """The ratio, where it differs from 1 beyond the spread."""
    about = found.low <= 1 <= found.high
    return "about 1" if about else show_ratio(found.value)


def of_plain(provider: str) -> Show:
    """How many times as long as a plain step."""
    return times(provider, "plain")


def samples(*providers: str) -> Show:
    """The fewest and the most samples of these providers."""

    def show(rows: Rows) -> str:
        counts = [rows[name].samples for name in providers if name in rows]
        ends = sorted({min(counts), max(counts)}) if counts else []
        return "–".join(map(str, ends)) or NO_NUMBER

    return show


def share(row: Row) -> str:
    """Of the copy's bandwidth."""
    return NO_NUMBER if row.copy_share is None else f"{row.copy_share:.0%}".replace("%", " %")


def host(row: Row) -> str:
    """The host's time."""
    return NO_NUMBER if row.host_us is None else show_time(row.host_us / 1e3)


def own(row: Row) -> str:
    """An adapter's own time."""
    return NO_NUMBER if row.own_us is None else show_time(row.own_us / 1e3)


def median(row: Row) -> str:
    """The time of a call."""
    return show_time(row.median_ms)


def mib(row: Row, less: float | None = 0.0) -> str:
    """Extra memory, less that of another row."""
    if row.extra_mib is None or less is None:
        return NO_NUMBER
    found = row.extra_mib - less
    digits = 1 if 0.05 <= abs(found) < 10 else 0
    # Adding zero takes the sign from what is rounded to zero, and from nothing else.
    return f"{round(found, digits) + 0.0:.{digits}f}"


def over_plain(provider: str) -> Show:
    """Extra memory beyond a plain step's."""
    return lambda rows: of(provider, lambda row: mib(row, rows["plain"].extra_mib))(rows)


def memory(rows: Rows) -> str:
    """Extra memory of three providers."""
    return " / ".join(of(provider, mib)(rows) for provider in ("official", "foreach", OURS))


def with_method(name: str) -> Show:
    """A step in processes as a multiple of the plain one; in brackets the numbers it reduces."""

    def show(rows: Rows) -> str:
        found = ratio(rows, name, "plain")
        if found is None:
            return NO_NUMBER
        reduced = f" ({rows[name].reduced})" if rows[name].reduced else ""
        return f"{value(found)}{reduced}"

    return show


SPEED: dict[str, Show] = {
    **{f"× {base}": times(base) for base in BASELINES},
    "n": samples(*BASELINES, OURS),
    "of copy": of(OURS, share),
    "host": of(OURS, host),
    "busy p90: foreach": of("foreach", lambda r: show_ratio(r.busy_p90)),
    "busy p90": of(OURS, lambda r: show_ratio(r.busy_p90)),
    "MiB: official / foreach / mmfuse": memory,
}
LOSSES: dict[str, Show] = {
    **{f"× {base}": times(base) for base in BASELINES},
    "n": samples(*BASELINES, OURS),
    "host": of(OURS, host),
}
STEPS: dict[str, Show] = {
    "× official": times("official"),
    "of plain: official": of_plain("official"),
    "of plain": of_plain(OURS),
    "n": samples("plain", "official", OURS),
    "more MiB: official": over_plain("official"),
    "more MiB": over_plain(OURS),
}
BOTH: dict[str, Show] = {
    "kernels × official": times("kernels: official", f"kernels: {OURS}"),
    "step × official": times("official"),
    "step of plain: official": of_plain("official"),
    "step of plain: mmfuse": of_plain(OURS),
    "n": samples("kernels: official", f"kernels: {OURS}", "plain", "official", OURS),
    "more MiB: official": over_plain("official"),
    "mmfuse": over_plain(OURS),
}
