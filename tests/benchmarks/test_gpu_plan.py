"""The benchmark on a GPU as far as a CPU can show it: recorded calls, fixed plans, rehearsals.

A test hands in the recorder: here a recording of operators stands in for a CUDA graph.
"""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from replay import Captured
from torch import Tensor

pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import run
from cases import CASES, WORKLOADS
from engine import cost, gate, measure, plan, providers, replay, rows, session
from engine.gradients import GradientInputs
from engine.workloads import Workload, shrunk

CPU = torch.device("cpu")
# Over 1 MiB, from where on bandwidths are reported.
TINY = Workload("tiny", "a tiny model", encoders=(((7, 3, 3, 3), (5,)), ((64, 33), (270_000,))))


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The yardstick and the cache flush without their half gigabyte each."""
    monkeypatch.setitem(measure.COPY_ELEMENTS, "cpu", 2**16)
    monkeypatch.setattr(measure, "_FLUSH_BYTES", 2**16)
    monkeypatch.setattr(measure, "MIN_SAMPLES", 2)
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)


def record(prepared: measure.Prepared) -> replay.Recording:
    """Stands in for a CUDA graph."""
    prepared.restore()
    captured = Captured(prepared.call, "cpu")
    return replay.Recording(captured.replay, captured.result)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets the recorder."""

    def use(recorder: Any) -> None:
        monkeypatch.setattr(replay, "recorder_for", lambda device: recorder)

    use(record)
    return use


def measured_rows(
    folder: Path, *cases: str, code: int = 0
) -> dict[tuple[str, str], dict[str, str]]:
    """(case, provider) → row, of a run on the tiny model."""
    arguments = ["--workloads", "tiny", "--dtype", "float32", "--seconds", "0.01", "--no-plots"]
    chosen = ["--providers", "official", "foreach", "reference", "--device", "cpu"]
    output = ["--output", str(folder)]
    assert run.main(["--cases", *cases, *arguments, *chosen, *output]) == code
    return {(row["case"], row["provider"]): row for row in read(folder)}


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Replays


@pytest.mark.slow
@pytest.mark.usefixtures("recorded")
def test_replays_have_columns_and_what_cannot_be_replayed_a_reason(tmp_path: Path) -> None:
    rows = measured_rows(tmp_path, "ogm_ge", "update_scale")
    assert len(rows) == 6
    for (_, provider), row in rows.items():
        replays = [row[name] for name in ("replay_ms", "replay_p80_ms", "replay_vs_foreach")]
        # The time of the same call on next to nothing.
        assert float(row["host_us"]) > 0
        assert "host_ms" not in row
        if provider == "official":
            assert replays == ["", "", ""]
            continue
        ms, p80, ratio = map(float, replays)
        assert 0 < ms <= p80
        assert ratio > 0 and (provider != "foreach" or ratio == 1)
        # The device's own time counts for the bandwidth.
        assert float(row["gb_per_s"]) == pytest.approx(int(row["floor_bytes"]) / ms / 1e6)
    text = (tmp_path / "results.md").read_text()
    assert "replay p80" in text
    reasons = [line for line in text.splitlines() if "is not replayed" in line]
    assert reasons == [
        f"- {case} on tiny, float32: official is not replayed: "
        "it puts new tensors in the place of its gradients"
        for case in ("ogm_ge", "update_scale")
    ]


@pytest.mark.slow
def test_on_a_cpu_nothing_is_replayed(tmp_path: Path) -> None:
    rows = measured_rows(tmp_path, "update_scale")
    assert {row["replay_ms"] + row["replay_vs_foreach"] for row in rows.values()} == {""}
    text = (tmp_path / "results.md").read_text()
    assert "is not replayed" not in text and "| replay" not in text
    assert replay.recorder_for(torch.device("cuda")) is replay.record_on_cuda


@pytest.mark.slow
@pytest.mark.usefixtures("recorded")
def test_a_call_that_waits_for_the_device_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waiting(i: GradientInputs) -> None:
        for grads, factor in zip(i.encoder_grads, i.coefficients, strict=True):
            torch._foreach_mul_(grads, factor.item())

    monkeypatch.setattr(CASES["update_scale"], "foreach", waiting)
    rows = measured_rows(tmp_path, "update_scale")
    assert rows["update_scale", "foreach"]["replay_ms"] == ""
    assert float(rows["update_scale", "reference"]["replay_ms"]) > 0
    text = (tmp_path / "results.md").read_text()
    assert "foreach is not replayed: it waits for the device (2 times)" in text


@pytest.mark.slow
def test_a_call_that_cannot_be_recorded_is_timed_all_the_same(
    tmp_path: Path, recorded: Callable[[Any], None]
) -> None:
    def failing(prepared: measure.Prepared) -> replay.Recording:
        raise RuntimeError("not permitted in a capture\nadvice")

    recorded(failing)
    rows = measured_rows(tmp_path, "update_scale")
    assert all(float(row["median_ms"]) > 0 and not row["replay_ms"] for row in rows.values())
    text = (tmp_path / "results.md").read_text()
    assert "reference is not replayed: RuntimeError: not permitted in a capture\n" in text


@pytest.mark.slow
@pytest.mark.parametrize("case", ["update_scale", "grad_stats"])
def test_a_wrong_replay_is_refused_and_the_call_still_timed(
    case: str, tmp_path: Path, recorded: Callable[[Any], None]
) -> None:
    def empty(prepared: measure.Prepared) -> replay.Recording:
        # The call has run, as it has not in a capture: its results are there, and right.
        return replay.Recording(lambda: None, record(prepared).result)

    recorded(empty)
    rows = measured_rows(tmp_path, case, code=1)
    assert set(rows) == {(case, name) for name in ("official", "foreach", "reference")}
    assert all(not row["replay_ms"] for row in rows.values())
    refused = (tmp_path / "results.md").read_text().split("**Refused by the parity gate:**")[1]
    assert f"- {case} on tiny, float32: reference's replay is wrong" in refused


def test_what_a_replay_changes_is_restored_before_each() -> None:
    log: list[str] = []
    replayed = measure.Prepared(
        lambda: log.append("replay"), lambda: log.append("restore"), queued=True
    )
    measure.interleaved({"a": replayed}, measure.Clock(CPU), 0.0, cold=True)
    assert log == ["restore", "replay"] * (3 + measure.MIN_SAMPLES)


def test_a_replay_is_in_the_queue_before_the_clock_starts() -> None:
    leads: dict[str, list[float]] = {"eager": [], "replay": []}
    now = []

    def clock(call: Callable[[], None], *, lead: float = 0.0, **_: Any) -> measure.Sample:
        call()
        leads[now[-1]].append(lead)
        return measure.Sample(1e-6, 3e-5)

    chosen = {
        name: measure.Prepared(lambda n=name: now.append(n), queued=name == "replay")
        for name in leads
    }
    measure.interleaved(chosen, clock, 0.0, cold=True)
    assert leads["eager"] == [0.0] * measure.MIN_SAMPLES
    # The host's own time is known from three calls, and is now and then twice as long.
    assert leads["replay"] == [0.0] * 3 + [6e-5] * measure.MIN_SAMPLES
    assert [measure.flushes(lead, 7e-5) for lead in (0.0, 6e-5, 1e-3)] == [1, 2, 16]


def test_no_more_samples_than_a_plan_wants() -> None:
    chosen = {"a": measure.Prepared(lambda: None)}
    samples = measure.interleaved(chosen, measure.Clock(CPU), 60.0, cold=False, most=7)
    assert len(samples["a"]) == 7


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_mode_that_finds_waits_is_put_back(
    before: int, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[Any] = [before]

    def set_mode(mode: int | str) -> None:
        modes.append(mode)
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
            if error is not None:
                raise error

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    if error is None:
        with cost.sync_warnings() as caught:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        assert sum(cost._SYNC_WARNING in str(w.message) for w in caught) == 1
    else:
        with pytest.raises(error), cost.sync_warnings():
            pass
    assert modes == [before, "warn", before]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_cuda_graph_replays_the_call_and_a_failed_one_spoils_nothing() -> None:
    x = torch.zeros(5, device="cuda")

    def call() -> Tensor:
        return x.add_(1) + torch.rand(5, device="cuda").floor()

    recording = replay.record_on_cuda(measure.Prepared(call, x.zero_))
    x.zero_()
    recording.replay()
    assert x.tolist() == recording.result.tolist() == [1.0] * 5
    with pytest.raises(RuntimeError):
        replay.record_on_cuda(measure.Prepared(lambda: torch.rand(5, device="cuda").sum().item()))
    assert torch.rand(5, device="cuda").min() >= 0
    recording.replay()
    assert x.tolist() == [2.0] * 5


# Plans


@pytest.mark.parametrize("plan_of", ["gpu", "gpu-training"])
def test_a_plan_for_a_gpu_needs_no_matplotlib(plan_of: str) -> None:
    """In a process of its own: here the tests before may have imported it."""
    program = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "import run\n"
        f"chosen = run.parse(['--plan', {plan_of!r}, '--device', 'cpu', '--output', 'x'])\n"
        "assert not chosen.plots\n"
    )
    folder = Path(run.__file__).parent
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def rehearse(plan: str, folder: Path) -> int:
    arguments = ["--plan", plan, "--shrink", "65536", "--device", "cpu", "--seconds", "0.01"]
    return run.main([*arguments, "--output", str(folder)])


@pytest.mark.slow
def test_the_gpu_plan_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of it; `make gpu-rehearsal` has the rest."""
    whole = plan.PLANS["gpu"]
    part = dataclasses.replace(whole, units=whole.units[::4])
    monkeypatch.setitem(run.PLANS, "gpu", part)
    assert rehearse("gpu", tmp_path) == 0
    rows = read(tmp_path)
    units = plan.planned(part, 65536)
    assert [(r["case"], r["workload"], f"torch.{r['dtype']}", r["provider"]) for r in rows] == [
        (unit.case.name, unit.workload.title, str(unit.dtype), provider)
        for unit in units
        for provider in ("official", "foreach", "cpu")
    ]
    assert not list(tmp_path.glob("*.png"))
    assert "## Not measured" not in (tmp_path / "results.md").read_text()


def test_the_order_of_the_gpu_plan() -> None:
    units = [str(unit) for unit in plan.planned(plan.PLANS["gpu"])]
    assert units[:5] == [
        "update_scale on single_256m, float32",
        "ogm_ge on single_256m, float32",
        "inforeg on single_256m, float32",
        "redreg on single_256m, float32",
        "ogm_ge on resnet18, float32",
    ]
    assert len(set(units)) == len(units)
    dtypes = [unit.rpartition(" ")[2] for unit in units]
    assert dtypes == sorted(dtypes, reverse=True)


@pytest.mark.slow
def test_the_training_plan_from_end_to_end(tmp_path: Path) -> None:
    assert rehearse("gpu-training", tmp_path) == 0
    assert [(row["provider"], row["of_plain"] != "") for row in read(tmp_path)] == [
        ("plain", True),
        ("official", True),
        ("cpu", True),
    ]


@pytest.mark.slow
def test_a_plan_that_is_killed_leaves_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = session.Session.measure

    def measured(self: session.Session, *args: Any) -> None:
        seen.append(len(read(tmp_path)) if seen else 0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(session.Session, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        rehearse("gpu", tmp_path)
    assert seen == [0, 3, 6]
    assert {row["case"] for row in read(tmp_path)} == {"update_scale", "ogm_ge"}


def test_a_measurement_that_fails_does_not_end_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost_of(prepared: measure.Prepared, device: torch.device) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session, "cost_of", cost_of)
    measured_rows(tmp_path, "update_scale", "grad_stats", code=1)
    text = (tmp_path / "results.md").read_text()
    for case in ("update_scale", "grad_stats"):
        assert f"- {case} on tiny, float32 fails: RuntimeError: out of memory" in text


def test_options_of_a_plan() -> None:
    known = providers.provider_names(torch.device("cuda"))
    chosen = run.parse(["--plan", "gpu", "--device", "cuda", "--minutes", "1.4", "--output", "x"])
    assert [name for name in known if name in chosen.providers] == chosen.providers
    assert sorted(chosen.providers) == ["cuda", "foreach", "official", "triton"]
    assert not chosen.plots
    training = run.parse(["--plan", "gpu-training", "--device", "cuda", "--output", "x"])
    assert training.providers == ["plain", "official", "cuda"]
    asked = run.parse(["--plan", "gpu", "--plots", "--providers", "foreach", "--device", "cpu"])
    assert asked.plots and asked.providers == ["foreach"]
    assert run.parse(["--quick", "--device", "cpu"]).plots


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["--quick"], "--plan names"),
        (["--cases", "ogm_ge"], "--plan names"),
        (["--shrink", "0"], "at least 1"),
    ],
)
def test_what_a_plan_does_not_go_with(other: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run.parse(["--plan", "gpu", "--device", "cpu", *other])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["single_256m", "resnet18", "pairs_10m", "crema_d", "images"])
def test_a_rehearsal_is_smaller_and_says_so(name: str) -> None:
    whole, small = WORKLOADS[name], shrunk(WORKLOADS[name], 1000)
    assert shrunk(whole, 1) is whole
    assert small.title == f"1/1000 of {whole.title}"
    assert small.name == name and small.kind == whole.kind
    size = lambda w: w.elements + w.pixels + torch.Size(w.shape).numel()  # noqa: E731
    assert size(small) <= size(whole) / 8


# channels_last


def test_gradients_in_channels_last() -> None:
    workload = shrunk(WORKLOADS["resnet18_channels_last"], 8)
    i = GradientInputs(workload, torch.float32, CPU, anchored=True)
    # The first convolution that sees more than one channel.
    four = [row[3] for row in (i.grads, i.params, i.anchors, i.pristine)]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in four)
    assert not any(t.is_contiguous() for t in four)
    assert all(
        flat.data_ptr() == g.data_ptr() for flat, g in zip(i.flat_grads, i.grads, strict=True)
    )
    same = GradientInputs(shrunk(WORKLOADS["resnet18"], 8), torch.float32, CPU, anchored=True)
    assert all(torch.equal(a, b) for a, b in zip(i.pristine, same.pristine, strict=True))
    assert all(g.is_contiguous() for g in same.pristine)
    i.restore(replaced=True)
    assert i.params[3].grad.is_contiguous(memory_format=torch.channels_last)
    default = run.parse(["--device", "cuda", "--output", "x"]).workloads
    assert "resnet18_channels_last" not in default and "resnet18" in default


@pytest.mark.parametrize("provider", ["official", "foreach", "reference", "cpu"])
@pytest.mark.parametrize("name", ["update_scale", "ogm_ge", "redreg"])
def test_the_gate_holds_for_channels_last(name: str, provider: str) -> None:
    case, workload = CASES[name], shrunk(WORKLOADS["resnet18_channels_last"], 64)
    if providers.why_not(provider, case, workload, CPU) is not None:
        pytest.skip(f"{provider} does not do {name}")
    with torch.no_grad():
        i = case.make(workload, torch.float32, CPU)
        prepared = providers.prepare(provider, case, i)
        prepared.restore()
        case.check(provider, i, prepared.call())
        first = i.params[3].grad
        assert first.is_contiguous(memory_format=torch.channels_last)
        assert not first.is_contiguous()
        first[0, 0, 0, :2] = first[0, 0, 0, :2].flip(0).clone()
        if provider in gate.OWN_NOISE and case.noisy:
            return  # what is drawn says nothing about the order
        with pytest.raises(gate.ParityError):
            case.check(provider, i, None)


def test_rows_of_committed_results_are_still_read() -> None:
    """Their rows have `host_ms`, and no replays."""
    import choose

    files = list((Path(choose.__file__).parent / "results").glob("**/results.csv"))
    assert files
    choose.speed_of_triton(files)
    assert "host_us" in rows.Row.__dataclass_fields__
