"""Order and time of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import run
import torch
from cases import (
    CASES,
    WORKLOADS,
)
from engine import plan, providers


def units_of(*names: str, workloads: Any = ("resnet18", "resnet18_one", "pairs_10m")) -> list[Any]:
    return plan.units(
        [CASES[name] for name in names],
        [WORKLOADS[name] for name in workloads],
        [torch.float32, torch.bfloat16],
        "all",
        main_first=True,
    )


def test_a_short_run_measures_every_case_once_before_any_twice_and_the_main_ones_first() -> None:
    units = units_of("grad_stats", "update_scale", "mutual_information", "ogm_ge")
    order = [str(unit) for unit in units]
    assert order[:5] == [
        "update_scale on resnet18, float32",
        "ogm_ge on resnet18, float32",
        "mutual_information on pairs_10m, float32",
        "grad_stats on resnet18, float32",
        "update_scale on resnet18, bfloat16",
    ]
    assert len(set(order)) == len(order) == 3 * 4 + 2


def test_a_short_run_measures_training_on_what_needs_a_gpu_before_the_small_one() -> None:
    units = units_of("ogm_ge_training", workloads=("training", "crema_d"))
    assert [unit.workload.name for unit in units] == ["crema_d", "training"]


class Watch:
    """A clock that is set."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_a_limited_run_shares_out_half_of_what_is_left() -> None:
    units = units_of("grad_stats", workloads=("resnet18", "resnet18_one"))
    watch = Watch()
    given = []
    for _, seconds in plan.share(units, 10.0, 1.0, watch):
        given.append(seconds)
        watch.time += 2 * seconds  # data, checks and counts take as long again
    assert given == pytest.approx([60 / 8] * 4)
    # Never more than is wanted.
    assert [s for _, s in plan.share(units, 3.0, 1.0, Watch())] == [3.0] * 4


def test_a_limited_run_ends() -> None:
    units = units_of("grad_stats", workloads=("resnet18", "resnet18_one"))
    watch = Watch()
    late = []
    for _, seconds in plan.share(units, 10.0, 1.0, watch):
        late.append(seconds)
        watch.time += 35
    assert late == [pytest.approx(60 / 8), pytest.approx(25 / 6), None, None]


def test_a_run_without_a_limit_keeps_its_order_and_its_seconds() -> None:
    cases = [CASES["grad_stats"], CASES["ogm_ge"]]
    units = plan.units(cases, [WORKLOADS["resnet18"]], [torch.float32], "all", main_first=False)
    shared = list(plan.share(units, 3.0, None))
    assert [(unit.case.name, s) for unit, s in shared] == [("grad_stats", 3.0), ("ogm_ge", 3.0)]


def test_a_whole_run_measures_bfloat16_on_the_first_workload_of_each_case() -> None:
    whole = run.parse(["--device", "cpu"])
    assert whole.once == [torch.bfloat16]
    assert any("bfloat16 on other workloads" in line for line in whole.left_out)
    cases = [CASES["grad_stats"], CASES["modality_scores"]]
    workloads = [WORKLOADS[name] for name in ("classes_6", "resnet18", "thousand", "classes_31")]
    dtypes = [torch.float32, torch.bfloat16]
    found = plan.units(cases, workloads, dtypes, "all", main_first=False, once=whole.once)
    assert [str(unit) for unit in found if unit.dtype == torch.bfloat16] == [
        "modality_scores on classes_6, bfloat16",
        "grad_stats on resnet18, bfloat16",
    ]
    assert sum(unit.dtype == torch.float32 for unit in found) == 4
    for asked in (["--dtype", "bfloat16"], ["--cases", "grad_stats"], ["--quick"]):
        assert run.parse(["--device", "cpu", *asked]).once == []


@pytest.mark.usefixtures("small_machine")
def test_a_run_without_time_lists_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["official", "compile", "reference"]
    monkeypatch.setattr(providers, "provider_names", lambda device: names)
    watch = Watch()
    monkeypatch.setattr(plan, "share", partial(plan.share, now=watch))
    monkeypatch.setattr(
        run.Session, "measure", lambda self, unit, *_: setattr(watch, "time", watch.time + 200)
    )
    arguments = ["--minutes", "4", "--dtype", "float32", "--device", "cpu"]
    cases = ["--cases", "grad_stats", "update_scale", "ogm_ge", "--workloads", "tiny"]
    assert run.main([*arguments, *cases, "--output", str(tmp_path)]) == 0
    _, skipped = (tmp_path / "results.md").read_text().split("## Not measured")
    assert skipped.strip().splitlines() == [
        "- compile: too slow for a run with --minutes",
        "- reference: too slow for a run with --minutes",
        "- grad_stats on tiny, float32: no time left",
    ]


def test_what_is_too_much_for_a_cpu_is_left_out_there_unless_named() -> None:
    default = run.parse(["--device", "cpu"])
    assert "crema_d" not in default.workloads and "training" in default.workloads
    assert [line for line in default.left_out if line.startswith("crema_d: ")]
    named_ = run.parse(["--device", "cpu", "--workloads", "crema_d"])
    assert named_.workloads == ["crema_d"] and not named_.left_out
    on_gpu = run.parse(["--device", "cuda", "--output", "x"])
    assert "crema_d" in on_gpu.workloads and not on_gpu.left_out
