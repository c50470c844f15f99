"""In which order a run measures, and how long each measurement may take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from _case import Case
from _cases import CASES
from _workloads import WORKLOADS, Workload, shrunk

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
class Plan:
    """A list of measurements, in the order of their worth.

    Attributes:
        about: What it is for.
        units: Case, workload and dtype of each.
        without: Providers that are left out unless they are named.
        samples: Of each provider and of its replays, at most.
    """

    about: str
    units: tuple[tuple[str, str, str], ...]
    without: tuple[str, ...]
    samples: int


_LARGE = tuple((case, "single_256m") for case in ("update_scale", "ogm_ge", "inforeg", "redreg"))
_TWO_RESNETS = (("ogm_ge", "resnet18"), ("ogm_ge_step", "resnet18"))
PLANS = {
    # An estimate, not a measurement, of what a unit takes on an H200: 2²⁸ elements 1.5 s, two
    # ResNet-18 and ViT-B/16 1 to 2 s, 1,000 tensors 3 s (5,000 launches a call of `official`), the
    # rest 1 s: 40 s, and 10 s for the start. Of that 20 samples are less than half, as a pass over
    # 2²⁸ elements takes 1 ms; the other half is the checks, the graphs and the profiler.
    "gpu": Plan(
        "what the targets for a GPU are about",
        (
            *((*unit, "float32") for unit in (*_LARGE, *_TWO_RESNETS)),
            ("ogm_ge", "vit_b16", "float32"),
            ("ogm_ge_step", "vit_b16", "float32"),
            ("ogm_ge", "thousand", "float32"),
            ("ogm_ge_step", "thousand", "float32"),
            ("update_scale", "thousand", "float32"),
            ("update_scale", "resnet18", "float32"),
            ("update_scale", "resnet18_channels_last", "float32"),
            ("ogm_ge", "resnet18_channels_last", "float32"),
            ("noisy_views", "images", "float32"),
            ("mutual_information", "pairs_10m", "float32"),
            ("info_nce", "contrast_8192", "float32"),
            *((*unit, "bfloat16") for unit in (*_LARGE, *_TWO_RESNETS)),
            ("ogm_ge", "vit_b16", "bfloat16"),
            ("ogm_ge", "thousand", "bfloat16"),
        ),
        without=("plain", "compile", "reference"),
        samples=20,
    ),
    "gpu-training": Plan(
        "OGM-GE's training step on CREMA-D's shapes, with and without the method",
        (("ogm_ge_training", "crema_d", "float32"),),
        without=("foreach", "compile", "reference", "triton"),
        samples=60,
    ),
}


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


def planned(plan: Plan, shrink: int = 1) -> list[Unit]:
    """The measurements of a plan; none is a main one, as they are in order already."""
    return [
        Unit(CASES[case], shrunk(WORKLOADS[workload], shrink), getattr(torch, dtype), False)
        for case, workload, dtype in plan.units
    ]


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
