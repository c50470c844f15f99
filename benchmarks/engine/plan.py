"""The order in which a run measures, and the time of each measurement."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .case import CASES, Case
from .workloads import WORKLOADS, Workload, shrunk

#: Case, workload and dtype by the names of the command line.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Plan:
    """A list of measurements, in the order of their worth.

    Attributes:
        about: Its purpose.
        units: Case, workload and dtype of each.
        without: Providers that are left out unless they are named.
        samples: Of each provider and of its replays, at most.
        plots: True if they are drawn unasked; a machine with a GPU may not have what draws.
    """

    about: str
    units: tuple[Key, ...]
    without: tuple[str, ...]
    samples: int
    plots: bool = False


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
    """One measurement: of all providers."""

    case: Case
    workload: Workload
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.case.name} on {self.workload.name}, {self.labels[2]}"

    @property
    def key(self) -> Key:
        """Case, workload and dtype by the names of the command line."""
        return self.case.name, self.workload.name, self.labels[2]

    @property
    def labels(self) -> tuple[str, str, str]:
        """Case, workload and dtype as the rows have them."""
        return self.case.name, self.workload.title, str(self.dtype).removeprefix("torch.")


def units(
    cases: Sequence[Case],
    workloads: Sequence[Workload],
    dtypes: Sequence[torch.dtype],
    select: str,
    *,
    main_first: bool,
    once: Collection[torch.dtype] = (),
) -> list[Unit]:
    """All measurements, workload by workload.

    In the dtypes of `once` each case is measured on the first of its workloads alone.

    With `main_first`, every case once, the main ones before the others, then every case for the
    second time, and so on; a workload that needs a GPU before others of its kind.
    """
    if main_first:
        workloads = sorted(workloads, key=lambda workload: not workload.gpu)
    found = [
        Unit(case, selected(case, workload, select), dtype)
        for workload in workloads
        for dtype in dtypes
        for case in cases
        if case.fits(workload, select) and case.takes(dtype)
    ]
    first = {unit.case.name: unit.workload for unit in reversed(found)}
    found = [u for u in found if u.dtype not in once or u.workload == first[u.case.name]]
    if not main_first:
        return found
    turns: Counter[str] = Counter()
    places = []
    for unit in found:
        places.append((turns[unit.case.name], not unit.case.main))
        turns[unit.case.name] += 1
    order = sorted(range(len(found)), key=places.__getitem__)
    return [found[n] for n in order]


def planned(plan: Plan, shrink: int = 1, select: str = "all") -> list[Unit]:
    """The measurements of a plan."""
    return [
        Unit(
            CASES[case],
            selected(CASES[case], shrunk(WORKLOADS[workload], shrink), select),
            getattr(torch, dtype),
        )
        for case, workload, dtype in plan.units
    ]


def selected(case: Case, workload: Workload, select: str) -> Workload:
    """The workload as a selection of its parameters is called: it is another measurement."""
    if select == "all" or case.kind != "gradients":
        return workload
    return replace(
        workload, name=f"{workload.name}_{select}", title=f"{workload.title}, {select} only"
    )


def share(
    plan: Sequence[Unit],
    seconds: float,
    minutes: float | None,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Unit, float | None]]:
    """Each measurement with the seconds for its samples; None where no time is left.

    Args:
        plan: In the order of worth.
        seconds: For the samples of one measurement, at most.
        minutes: For the whole run, or None. The rest is shared out among those to come, half of it
            for data, checks and counts.
        now: Tells the time in seconds.
    """
    began = now()
    for n, unit in enumerate(plan):
        if minutes is None:
            yield unit, seconds
            continue
        left = began + 60 * minutes - now()
        yield unit, min(seconds, left / 2 / (len(plan) - n)) if left > 0 else None
