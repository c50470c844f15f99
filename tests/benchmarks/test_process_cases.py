"""Cases in processes of their own: their rows and counts, not their times."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from benchmarked import read_csv
from cases import CASES, WORKLOADS, overhead
from engine.gate import ParityError
from engine.process_case import Found
from engine.processes import Counter, OwnTime, in_processes

import mmfuse

# Two small encoders have as many tensors as two ResNet-18: 20 convolutions with batch norms each.
TENSORS = 120


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    """Setup → results, on small encoders."""
    case = CASES["overhead"]
    small = {s: dataclasses.replace(WORKLOADS[s], width=16) for s in overhead.SETUPS}
    return {setup: case.measure(workload, 0.0) for setup, workload in small.items()}


def methods() -> set[str]:
    gradient = {name for name, made in mmfuse.METHODS.items() if made.card.acts == "gradient"}
    return gradient | {"OGM-GE"}


@pytest.mark.slow
def test_every_setup_steps_with_every_gradient_method(found: dict[str, Found]) -> None:
    assert set(found) == {"single", "ddp", "fsdp2"}
    for mine in found.values():
        assert set(mine.samples) == {"plain"} | methods()
        # Five rounds in each of two starts, however little time there is.
        assert {len(samples) for samples in mine.samples.values()} == {10}
        assert all(s.device > 0 for samples in mine.samples.values() for s in samples)


@pytest.mark.slow
def test_what_is_reduced_is_a_few_numbers(found: dict[str, Found]) -> None:
    """OGM reduces M scores and a count, others more; under FSDP2 also sums of every tensor."""
    m = 2
    assert set(found["single"].reduced.values()) == {0}
    ddp, fsdp2 = found["ddp"].reduced, found["fsdp2"].reduced
    assert ddp["plain"] == fsdp2["plain"] == 0
    assert ddp["OGM-GE"] == ddp["OGM"] == fsdp2["OGM"] == m + 1
    # The logarithms of scores.
    assert ddp["InfoReg"] == m + 1
    # Number, sum and sum of squares.
    assert fsdp2["OGM-GE"] == m + 1 + 3 * TENSORS


@pytest.mark.parametrize(
    ("setup", "name", "numbers", "good"),
    [
        ("single", "OGM", 0, True),
        ("single", "OGM", 1, False),
        ("ddp", "plain", 1, False),
        ("ddp", "OGM", 8, True),
        ("ddp", "OGM", 9, False),
        ("fsdp2", "OGM", 8 + 5 * TENSORS, True),
        ("fsdp2", "OGM", 9 + 5 * TENSORS, False),
        ("ddp", "MMPareto", 8 + 1000, True),
        ("ddp", "MMPareto", 9 + 1000, False),
        ("fsdp2", "MMPareto", 9 + 5 * TENSORS, False),
    ],
)
def test_what_reduces_too_much_is_refused(setup: str, name: str, numbers: int, good: bool) -> None:
    counter = Counter()
    counter.numbers = numbers
    if good:
        overhead.check_reduced(setup, name, counter, TENSORS, 1000)
        return
    with pytest.raises(ParityError, match=f"{name} reduces {numbers} numbers"):
        overhead.check_reduced(setup, name, counter, TENSORS, 1000)


@pytest.mark.slow
@pytest.mark.usefixtures("small_machine")
def test_the_runner_reports_loops_and_the_adapters_own_time(tmp_path: Path) -> None:
    import run

    for package in ("accelerate", "lightning"):
        pytest.importorskip(f"mmfuse.adapters.{package}", exc_type=ImportError)
    arguments = ["--cases", "adapters", "--dtype", "float32", "--seconds", "0.01", "--no-busy"]
    assert run.main([*arguments, "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path)
    loops = [w for w in WORKLOADS.values() if w.kind == "loops"]
    assert [(r["workload"], r["provider"]) for r in rows] == [
        (workload.title, who) for workload in loops for who in ("plain", "OGM-GE")
    ]
    for r in rows:
        assert int(r["samples"]) == 60 - 2  # of 60 differences two warm up
        # Nobody counts in the processes: no number, rather than none.
        assert r["launches"] == r["host_syncs"] == r["extra_mib"] == ""
        adapter = r["provider"] == "OGM-GE" and not r["workload"].startswith("torch")
        assert (r["own_us"] != "") == adapter
        assert not adapter or 0 < float(r["own_us"]) < 1e3 * float(r["median_ms"])
        assert float(r["of_plain"]) > 0
    assert "| adapter |" in (tmp_path / "results.md").read_text()


def test_own_time_is_that_of_the_outer_function_without_the_inner() -> None:
    class Sleeper:
        def inner(self) -> None:
            time.sleep(0.2)

        def outer(self) -> None:
            time.sleep(0.05)
            self.inner()

    sleeper, own = Sleeper(), OwnTime()
    own.count(sleeper, "outer")
    own.leave_out(sleeper, "inner")
    sleeper.inner()  # not called from what is counted
    assert own.seconds == 0
    sleeper.outer()
    assert 0.05 <= own.seconds < 0.2  # a sleep may take longer, but not four times


def test_the_counter_sees_what_is_reduced_and_lets_go(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        counter, original = Counter(), dist.all_reduce
        with counter.counting():
            dist.all_reduce(torch.ones(3, 4))
            dist.all_reduce(torch.ones(5))
        assert (counter.calls, counter.numbers) == (2, 17)
        assert dist.all_reduce is original
        dist.all_reduce(torch.ones(2))
        assert counter.calls == 2
    finally:
        dist.destroy_process_group()


def _fails_on_the_second(rank: int) -> int:
    if rank == 1:
        raise ValueError("on purpose")
    dist.barrier()  # waits for the other one
    return rank


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="_fails_on_the_second has failed in process"):
        in_processes(_fails_on_the_second, [(0,), (1,)])
    assert "on purpose" in capfd.readouterr().err
