"""In which order a run measures, and how long each measurement may take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from _case import Case
from _workloads import Workload

# What a run that has to be short measures first, and gives more time.
MAIN = (
    "ogm_ge",
    "ogm_ge_step",
    "update_scale",
    "redreg",
    "inforeg",
    "mutual_information",
    "ogm_ge_training",
)
_MAIN_SHARE = 4
# Of a limited time; compiling can take a minute and cannot be stopped.
_COMPILING_SHARE = 0.25


@dataclass(frozen=True)
class Unit:
    """One measurement: of all providers.

    Attributes:
        case: What is measured.
        workload: On what.
        dtype: Of the data.
        first: Whether no measurement of the same case comes before.
    """

    case: Case
    workload: Workload
    dtype: torch.dtype
    first: bool

    @property
    def main(self) -> bool:
        """Whether the case is one of the main ones, and measured for the first time."""
        return self.first and self.case.name in MAIN

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case.name} on {self.workload.name}, {dtype}"


def units(
    cases: Sequence[Case],
    workloads: Sequence[Workload],
    dtypes: Sequence[torch.dtype],
    select: str,
    *,
    main_first: bool,
) -> list[Unit]:
    """All measurements, workload by workload.

    With `main_first`, every case once, the main ones before the others, then every case for the
    second time, and so on; a workload that needs a GPU before others of its kind.
    """
    if main_first:
        workloads = sorted(workloads, key=lambda workload: not workload.gpu)
    seen: Counter[str] = Counter()
    found = []
    for workload in workloads:
        for dtype in dtypes:
            for case in cases:
                if case.fits(workload, select) and case.takes(dtype):
                    turn = seen[case.name]
                    place = MAIN.index(case.name) if case.name in MAIN else len(MAIN)
                    found.append(((turn, place), Unit(case, workload, dtype, turn == 0)))
                    seen[case.name] += 1
    if main_first:
        found.sort(key=lambda row: row[0])
    return [unit for _, unit in found]


class Budget:
    """Shares out the time of a run.

    Args:
        seconds: For the samples of one measurement, at most.
        minutes: For the whole run, or None. What is left is divided among the measurements to come;
            a main one gets more. What they need besides, for data, checks and counts, is expected
            to be as much as the others have needed so far.
        now: Tells the time in seconds.
    """

    def __init__(
        self, seconds: float, minutes: float | None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._total = None if minutes is None else 60 * minutes
        self._now = now
        self._start = now()

    def share(self, plan: Sequence[Unit]) -> Iterator[tuple[Unit, float | None]]:
        """Each measurement with the seconds for its samples; None where no time is left."""
        weights = [_MAIN_SHARE if unit.main else 1 for unit in plan]
        besides, count = 0.0, 0
        for n, unit in enumerate(plan):
            if self._total is None:
                yield unit, self._seconds
                continue
            began = self._now()
            left = self._total - (began - self._start)
            if left <= 0:
                yield unit, None
                continue
            mean = besides / max(1, count)
            sampling = left - mean * (len(plan) - n)
            granted = min(self._seconds, max(0.0, sampling * weights[n] / sum(weights[n:])))
            yield unit, granted
            if not unit.main:  # which compile, and would spoil the mean
                # Too little time is exceeded by the fewest samples, which then are of the rest.
                besides += max(0.0, self._now() - began - granted)
                count += 1

    def may_compile(self, unit: Unit) -> bool:
        """Whether there is time for torch.compile."""
        if self._total is None:
            return True
        return unit.main and self._now() - self._start < _COMPILING_SHARE * self._total
