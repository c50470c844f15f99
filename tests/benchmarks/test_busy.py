"""Measurements beside a busy neighbour, and the host's own time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import run
import torch
from benchmarked import CALLED, CPU, named, read_csv
from cases import WORKLOADS, Case
from engine import rows
from engine.cost import Cost
from engine.measure import Sample
from engine.neighbour import BusyNeighbour
from engine.workloads import tiny


def test_the_neighbour_keeps_cores_busy_and_goes() -> None:
    with BusyNeighbour() as neighbour:
        processes = neighbour.processes
        assert len(processes) == os.cpu_count()
        assert all(process.poll() is None for process in processes)
        began = _ticks(processes[0].pid)
        deadline = time.monotonic() + 20
        while _ticks(processes[0].pid) <= began and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _ticks(processes[0].pid) > began
    assert all(process.poll() is not None for process in processes)


def _ticks(pid: int) -> int:
    if not Path("/proc").is_dir():
        pytest.skip("the system does not say")
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def test_the_neighbour_goes_when_something_fails() -> None:
    with pytest.raises(ValueError, match="on purpose"), BusyNeighbour() as neighbour:
        raise ValueError("on purpose")
    assert all(process.poll() is not None for process in neighbour.processes)


def samples(*seconds: float) -> list[Sample]:
    return [Sample(s, s) for s in seconds]


def test_busy_is_the_slowest_tenth_over_the_quiet_median() -> None:
    quiet = {"cpu": samples(1, 2, 3), "foreach": samples(1)}
    busy = {"cpu": samples(*range(2, 13)), "foreach": samples(9, 9, 9, 9)}
    labels = dict.fromkeys(("case", "title", "workload", "dtype", "device"), "x")
    costs = dict.fromkeys(quiet, Cost(1, 0, 0))
    besides = rows.Besides({"cpu": 5e-5}, busy)
    cpu, foreach = rows.make_rows(labels, quiet, costs, 0, 1, besides)
    assert cpu.busy_p90 == pytest.approx(11 / 2)
    assert cpu.host_us == pytest.approx(50)
    # Four samples say nothing about the slowest tenth.
    assert foreach.busy_p90 is None and foreach.host_us is None


@pytest.mark.slow
@pytest.mark.usefixtures("small_machine")
def test_a_run_has_both_columns(tmp_path: Path) -> None:
    arguments = ["--cases", "grad_stats", "--workloads", "tiny", "--dtype", "float32", "--busy"]
    providers = ["--providers", "official", "reference", "--device", "cpu", "--no-plots"]
    assert run.main([*arguments, *providers, "--seconds", "0.1", "--output", str(tmp_path)]) == 0
    found = read_csv(tmp_path)
    assert len(found) == 2
    assert all(float(r["busy_p90"]) > 0 and float(r["host_us"]) > 0 for r in found)
    head = next(
        line for line in (tmp_path / "results.md").read_text().splitlines() if "host" in line
    )
    assert "| busy p90 |" in head


def test_whole_runs_are_measured_beside_a_neighbour_and_short_ones_are_not() -> None:
    assert run.parse(["--device", "cpu"]).busy
    assert run.parse(["--device", "cpu", "--plan", "readme"]).busy
    for short in (["--quick"], ["--minutes", "4"], ["--shrink", "8"], ["--no-busy"]):
        assert not run.parse(["--device", "cpu", *short]).busy
    assert not run.parse(["--device", "cuda", "--output", "x"]).busy


@pytest.mark.parametrize("case", [c for c in CALLED if c.kind != "training"], ids=named)
def test_a_host_time_is_taken_on_as_many_tensors_of_next_to_nothing(case: Case) -> None:
    whole = next(w for w in WORKLOADS.values() if case.fits(w))
    small = tiny(whole)
    assert small.tensors == whole.tensors
    i = case.make(small, torch.float32, CPU)
    assert i.nbytes <= 16 * 1024
    for name in ("official", "foreach"):
        call = case.provider(name)
        if call is not None:
            with torch.set_grad_enabled(case.autograd):
                i.restore(replaced=name == "official")
                call(i)
