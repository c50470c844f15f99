"""The benchmark of whole training steps: its rows, its counts and its files, not its times."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import training_overhead as benchmark

# Two small encoders have as many tensors as two ResNet-18: 20 convolutions with batch norms each.
TENSORS = 120


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overhead")
    assert benchmark.main(["--quick", "--output", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_every_setup_has_a_row_for_every_step(output: Path) -> None:
    rows = read(output / "results.csv")
    assert [(r["setup"], int(r["processes"]), r["method"]) for r in rows] == [
        (setup, count, method)
        for setup, count in (("single", 1), ("ddp", 2), ("fsdp2", 2))
        for method in ("plain", "ogm-ge", "ogm", "inforeg", "redreg")
    ]
    plain = {r["setup"]: float(r["median_ms"]) for r in rows if r["method"] == "plain"}
    alone = {r["method"]: float(r["overhead_ms"]) for r in rows if r["setup"] == "single"}
    for r in rows:
        median, overhead = float(r["median_ms"]), float(r["overhead_ms"])
        assert 0 < float(r["p20_ms"]) <= median <= float(r["p80_ms"])
        assert int(r["samples"]) == 2
        assert overhead == pytest.approx(median - plain[r["setup"]], abs=1e-9 * median)
        assert float(r["of_plain"]) == pytest.approx(median / plain[r["setup"]])
        if r["setup"] == "single" or r["method"] == "plain":
            assert r["vs_single"] == ""
        elif r["vs_single"]:
            assert float(r["vs_single"]) == pytest.approx(overhead / alone[r["method"]])
        else:
            assert alone[r["method"]] <= 0


@pytest.mark.slow
def test_what_is_reduced_is_a_few_numbers(output: Path) -> None:
    """M scores and a count for OGM, more for the others; under FSDP2 also sums of every tensor."""
    rows = {(r["setup"], r["method"]): r for r in read(output / "results.csv")}
    found = {key: (int(r["all_reduces"]), int(r["floats"])) for key, r in rows.items()}
    m = 2
    for (setup, method), (calls, floats) in found.items():
        if setup == "single" or method == "plain":
            assert (calls, floats) == (0, 0)
            continue
        assert 1 <= calls <= (2 if setup == "fsdp2" else 1)
        assert m + 1 <= floats <= 4 * m + (5 * TENSORS if setup == "fsdp2" else 0)
        assert floats <= int(rows[setup, method]["most_floats"])
    assert found["ddp", "ogm-ge"] == found["ddp", "ogm"] == (1, m + 1)
    # Scores and their logarithms.
    assert found["ddp", "inforeg"] == (1, 2 * m + 1)
    # Number, sum and sum of squares.
    assert found["fsdp2", "ogm-ge"] == (2, m + 1 + 3 * TENSORS)
    assert found["fsdp2", "ogm"] == (1, m + 1)


@pytest.mark.slow
def test_the_report_says_what_the_target_is(output: Path) -> None:
    text = (output / "results.md").read_text()
    assert text.startswith("# Training overhead on cpu")
    rows = {(r["setup"], r["method"]): r for r in read(output / "results.csv")}
    ratio = rows["ddp", "ogm-ge"]["vs_single"]
    said = f": {float(ratio):.2f} (target: at most 1.25; " if ratio else ": not measured"
    assert f"2 DDP ranks / single process{said}" in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + 15
    assert len({line.count("|") for line in table}) == 1
    assert "- threads: `1 in each process`" in text


@pytest.mark.slow
def test_the_adapters_loops_are_compared_with_the_plain_one(tmp_path: Path) -> None:
    for package in ("accelerate", "lightning"):
        pytest.importorskip(f"mmfuse.adapters.{package}", exc_type=ImportError)
    assert benchmark.main(["--quick", "--adapters", "--output", str(tmp_path)]) == 0
    rows = read(tmp_path / "adapters.csv")
    assert [r["loop"] for r in rows] == ["torch", "accelerate", "lightning"]
    overheads = [float(r["overhead_ms"]) for r in rows]
    for r, overhead in zip(rows, overheads, strict=True):
        assert float(r["plain_ms"]) > 0 and float(r["balanced_ms"]) > 0
        assert overhead == pytest.approx(float(r["balanced_ms"]) - float(r["plain_ms"]))
        own = float(r["own_ms"])
        assert own == 0 if r["loop"] == "torch" else 0 < own < float(r["balanced_ms"])
        assert int(r["samples"]) == 8 - 2  # two warm up
    assert (tmp_path / "adapters.md").read_text().count("\n| ") == 4


def test_own_time_is_that_of_the_outer_function_without_the_inner() -> None:
    class Sleeper:
        def inner(self) -> None:
            time.sleep(0.2)

        def outer(self) -> None:
            time.sleep(0.05)
            self.inner()

    sleeper, own = Sleeper(), benchmark.OwnTime()
    own.count(sleeper, "outer")
    own.leave_out(sleeper, "inner")
    sleeper.inner()  # not called from what is counted
    assert own.seconds == 0
    sleeper.outer()
    assert 0.05 <= own.seconds < 0.2  # a sleep may take longer, but not four times


def row(setup: str, method: str, overhead: float, vs_single: float | None) -> benchmark.Row:
    times = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "of_plain": 1.0}
    counts = {"all_reduces": 0, "floats": 0, "most_floats": 0, "samples": 1, "processes": 2}
    return benchmark.Row(
        setup=setup,
        method=method,
        overhead_ms=overhead,
        vs_single=vs_single,
        **times,
        **counts,
    )


def test_the_verdict_is_that_of_ogm_ge_under_ddp() -> None:
    others = [row("ddp", "ogm", 1.0, 9.0), row("fsdp2", "ogm-ge", 1.0, 9.0)]
    assert "1.25 (target: at most 1.25; met)" in benchmark.verdict(
        [*others, row("ddp", "ogm-ge", 1.0, 1.25)]
    )
    assert "1.26 (target: at most 1.25; missed)" in benchmark.verdict(
        [*others, row("ddp", "ogm-ge", 1.0, 1.26)]
    )
    assert benchmark.verdict(others).endswith("not measured")


def test_the_counter_sees_what_is_reduced_and_lets_go(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        counter, original = benchmark.Counter(), dist.all_reduce
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


def test_a_process_that_fails_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="_fails_on_the_second has failed in process"):
        benchmark.in_processes(_fails_on_the_second, [(0,), (1,)])
    assert "on purpose" in capfd.readouterr().err


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["--rounds", "0"])
    assert "--rounds" in capsys.readouterr().err


def test_the_single_process_comes_first() -> None:
    assert benchmark.parse(["--setups", "ddp", "single"]).setups == ["single", "ddp"]
