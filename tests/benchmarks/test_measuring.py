"""Clocks, counts and rows."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from benchmarked import (
    CPU,
    inputs_of,
)
from cases import (
    CASES,
)
from engine import cost as costs_of
from engine import environment, measure, providers, report
from engine import rows as made_of

from mmfuse.ops import BACKENDS


def test_nothing_that_only_simulates_a_gpu_is_timed() -> None:
    names = providers.provider_names(CPU)
    assert set(names) & set(BACKENDS) == {"reference", "cpu"}


def test_cost_counts_operators_waits_and_the_peak_of_memory() -> None:
    x = torch.ones(250_000)

    def call() -> None:
        y = (x + 1) * 2  # the sum is still there while the product is made
        y.view(500, 500)[0].sum().item()
        y.nonzero()

    cost = costs_of.cost_of(measure.Prepared(call), CPU)
    assert (cost.launches, cost.host_syncs) == (3, 2)
    # y and the indices, two bytes to one; no other tensor lives by then.
    assert cost.extra_bytes == pytest.approx(3 * x.nbytes, rel=0.01)


def test_memory_that_a_provider_frees_is_not_charged() -> None:
    case = CASES["ogm_ge"]
    official = costs_of.cost_of(providers.prepare("official", case, inputs_of(case)), CPU)
    largest = 4 * 270_000
    # Product and noise, and the sum of both, of one tensor at a time.
    assert largest < official.extra_bytes < 3.2 * largest


def test_interleaved_shares_the_time_and_restores_before_every_call() -> None:
    log: list[str] = []
    chosen = {
        name: measure.Prepared(lambda n=name: log.append(n), lambda: log.append("restore"))
        for name in ("a", "b")
    }
    clock = measure.Clock(CPU)
    samples = measure.interleaved(chosen, clock, 0.0, cold=False)
    assert log[::2] == ["restore"] * (2 * measure.MIN_SAMPLES)
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys(
        ("a", "b"), measure.MIN_SAMPLES
    )
    rounds = [set(log[i : i + 4]) for i in range(0, len(log), 4)]
    assert rounds == [{"restore", "a", "b"}] * measure.MIN_SAMPLES


def test_a_slow_calls_few_samples_are_spread_over_the_whole_time() -> None:
    log: list[str] = []
    seconds = {"slow": 0.01, "quick": 0.001}

    def last(name: str) -> None:
        log.append(name)
        end = time.perf_counter() + seconds[name]
        while time.perf_counter() < end:
            pass

    chosen = {name: measure.Prepared(partial(last, name)) for name in seconds}
    measure.interleaved(
        chosen, measure.Clock(CPU, 2**12), 0.2, cold=False, most=50, least={"slow": 6}
    )
    counts = {name: log.count(name) for name in seconds}
    assert 6 <= counts["slow"] <= 12 and counts["quick"] >= 3 * counts["slow"]
    places = [n for n, name in enumerate(log) if name == "slow"]
    assert places[0] < 0.2 * len(log) and places[-1] > 0.7 * len(log)
    assert places[len(places) // 2] == pytest.approx(len(log) / 2, rel=0.4)


def test_short_calls_are_timed_in_rows() -> None:
    log: list[str] = []

    def ten_microseconds(
        call: Callable[[], object], *, cold: bool, repeats: int = 1, lead: float = 0.0
    ) -> measure.Sample:
        seconds = 1e-5 if "a" in log else 1e-3  # the first call takes much longer
        for _ in range(repeats):
            call()
        return measure.Sample(seconds, seconds)

    chosen = {"a": measure.Prepared(lambda: log.append("a"), lambda: log.append("restore"))}
    measure.interleaved(chosen, ten_microseconds, 0.0, cold=False, in_rows=True)
    # Three calls to see how long a warm one takes, then rows of a millisecond.
    assert log.count("restore") == 3 + measure.MIN_SAMPLES
    assert log.count("a") == 3 + 100 * measure.MIN_SAMPLES


def lasting(*seconds: float) -> list[measure.Sample]:
    return [measure.Sample(s, s) for s in seconds]


def test_rows_say_how_long_a_step_takes_of_a_plain_one() -> None:
    samples = {
        "plain": lasting(1.0, 10.0, 1.0),
        "official": lasting(2.0, 30.0, 4.0),
        "cpu": lasting(1.02, 10.2, 1.5),
    }
    costs = dict.fromkeys(samples, costs_of.Cost(1, 0, 0))
    labels = {**dict.fromkeys(("case", "title", "workload", "dtype"), "x"), "device": "cpu"}
    rows = made_of.make_rows(labels, samples, costs, 0, 1)
    assert [row.of_plain for row in rows] == [1, 4, 1.5]
    assert [row.vs_official for row in rows] == [4, 1, pytest.approx(4 / 1.5)]
    text = report.markdown(rows, {"device": "x"}, [], [], [])
    header = next(line for line in text.splitlines() if line.startswith("| case"))
    # Nothing has a bandwidth here, and nobody measured foreach.
    assert "of plain" in header
    assert not any(absent in header for absent in ("×foreach", "GB/s", "of copy", "×floor"))
    assert "| 1.50× |" in text
    del samples["plain"], costs["plain"]
    rows = made_of.make_rows(labels, samples, costs, 0, 1)
    assert all(row.of_plain is None for row in rows)
    assert "| of plain" not in report.markdown(rows, {"device": "x"}, [], [], [])


def test_rows_say_ratios_shares_and_floors() -> None:
    samples = {
        "copy": lasting(1.0, 1.0, 1.0),
        "official": lasting(4.0, 40.0, 4.0),
        "compile": lasting(1.5),
        "cpu": lasting(2.0, 20.0, 4.0, 2.0, 3.0),
    }
    nothing = costs_of.Cost(1, 0, 2**20)
    labels = dict.fromkeys(("case", "title", "workload", "dtype", "device"), "x")
    costs = {"official": nothing, "cpu": nothing}
    official, cpu = made_of.make_rows(labels, samples, costs, 10**9, 2 * 10**9)
    assert official.vs_official == 1
    # By the medians over all samples: those of the quick one that come later count as well.
    assert cpu.vs_official == pytest.approx(4 / 3)
    assert cpu.vs_foreach is None and cpu.vs_compile == 0.5
    assert cpu.median_ms == 3000
    assert cpu.samples == 5
    assert cpu.gb_per_s == pytest.approx(1 / 3)
    assert cpu.copy_gb_per_s == pytest.approx(2)
    assert cpu.copy_share == pytest.approx(1 / 6)
    assert cpu.times_floor == pytest.approx(6)
    assert cpu.extra_mib == 1


def test_shares_are_of_one_copy_whatever_a_measurements_own_was() -> None:
    nothing = costs_of.Cost(1, 0, 0)
    rows = []
    for case, copy in enumerate((1.0, 1.0, 1.0, 2.0)):  # the last one had a slow spell
        labels = dict.fromkeys(("title", "workload", "dtype", "device"), "x")
        samples = {"copy": lasting(copy), "cpu": lasting(1.0)}
        each = {"case": str(case), **labels}
        rows += made_of.make_rows(each, samples, {"cpu": nothing}, 10**9, 2 * 10**9)
    assert [row.copy_share for row in rows] == [0.5, 0.5, 0.5, 1.0]
    assert [row.copy_share for row in made_of.with_one_copy(rows)] == [0.5] * 4
    assert [row.times_floor for row in made_of.with_one_copy(rows)] == [2.0] * 4
    small = dataclasses.replace(rows[0], gb_per_s=None, copy_gb_per_s=None, copy_share=None)
    assert made_of.with_one_copy([small]) == [small]


def test_the_report_says_where_the_released_code_beats_the_best_eager_form() -> None:
    labels = dict.fromkeys(("case", "title", "workload", "dtype", "device"), "x")
    costs = dict.fromkeys(("official", "foreach"), costs_of.Cost(1, 0, 0))

    def text(*foreach: float) -> str:
        samples = {"official": lasting(1.0), "foreach": lasting(*foreach)}
        rows = made_of.make_rows(labels, samples, costs, 0, 1)
        return report.markdown(rows, {"device": "x"}, [], [], [])

    assert f"**{report.BEATEN}:**\n\n- x on x, x: foreach is 0.80×" in text(1.25)
    assert report.BEATEN not in text(1.01) and report.BEATEN not in text(0.5)
    # Its median is behind, its p20 is not: that is the machine's noise.
    assert report.BEATEN not in text(0.9, 0.9, 1.25, 1.25, 1.25)


def test_numbers_are_shown_with_their_unit_also_below_one() -> None:
    assert [report.show_time(ms) for ms in (1234.0, 12.34, 0.1234)] == [
        "1.23 s",
        "12.3 ms",
        "123 µs",
    ]
    assert [report.show_ratio(r) for r in (123.4, 1.0, 0.5, 0.0123, None)] == [
        "123×",
        "1.00×",
        "0.50×",
        "0.012×",
        "—",
    ]


def test_machine_becomes_a_folder_name() -> None:
    assert environment.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert environment.folder_name("Intel(R) Xeon(R) @ 2.2GHz") == "intel-r-xeon-r-2-2ghz"


def test_own_work_is_not_taken_for_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([(100.0, 10.0, 50.0), (106.0, 12.0, 54.0)])
    monkeypatch.setattr(environment.Bystanders, "_now", staticmethod(lambda: next(seconds)))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    # Six busy seconds, two of them our own, on two cores for four seconds.
    assert environment.Bystanders().share() == 0.5


def test_the_system_says_how_busy_it_is() -> None:
    share = environment.Bystanders().share()
    assert share is None or 0 <= share <= 1


@pytest.mark.parametrize("tf32", [False, True])
def test_convolutions_are_set_for_a_while(tf32: bool) -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    with measure.convolutions(tf32=tf32):
        assert (cudnn.benchmark, cudnn.allow_tf32) == (True, tf32)
    assert (cudnn.benchmark, cudnn.allow_tf32) == before
