"""A GPU's results decide about targets and backends; and the calls that are profiled there."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from mmfuse.ops._preference import TRITON_FIRST, preferred

ROOT = Path(__file__).resolve().parents[2]


def load(path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_under_test", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load("benchmarks/targets.py", monkeypatch)


@pytest.fixture
def choose(benchmarks: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    return load("benchmarks/choose.py", monkeypatch)


@pytest.mark.usefixtures("benchmarks")
def test_the_profiled_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run small, on the CPU; the names must be those of cases, workloads and functions."""
    script = load("benchmarks/profile_kernels.py", monkeypatch)
    called = []
    for case, workload in script.CALLS.items():
        made = script.CASES[case]
        assert made.kind == script.WORKLOADS[workload].kind
        original = made.mmfuse
        count = lambda i, b, f=original, c=case: (  # noqa: E731
            called.append((c, i.workload.title)),
            f(i, b),
        )
        monkeypatch.setattr(made, "mmfuse", count)
    small = ["--device", "cpu", "--backend", "cpu", "--shrink", "65536"]
    assert script.main(small) == 0
    four = ["update_scale", "ogm_ge", "mutual_information"]
    assert [case for case, _ in called] == [case for case in four for _ in range(2)]
    called.clear()
    chosen = ["noisy_views", "ogm_ge_step"]
    assert script.main([*small, "--calls", *chosen, "--repeats", "1"]) == 0
    assert [case for case, _ in called] == chosen
    assert all(title.startswith("1/65536 of ") for _, title in called)


def row(case: str, workload: str, provider: str, **numbers: object) -> dict[str, object]:
    names = {"case": case, "workload": workload, "dtype": "float32", "provider": provider}
    return {**names, "median_ms": 1.0, **numbers}


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    fields = list(dict.fromkeys(key for one in rows for key in one))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    return path


def reached(targets: Any, capsys: Any, *files: Path) -> tuple[dict[tuple[str, str], str], str]:
    """(target, first words of the workload) → what was reached, and the last line."""
    assert targets.main([str(file) for file in files]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:-2]]
    return {(text, on.split(" (")[0]): found for text, on, _, found in rows}, lines[-1]


def test_targets(targets: Any, tmp_path: Path, capsys: Any) -> None:
    two, large = "two ResNet-18 (22.3 M parameters)", "one tensor of 256 M elements"
    thousand, crema = "1,000 tensors of 1,000 elements", "two ResNet-18, CREMA-D: 64 spectrograms"
    rows = [
        row("ogm_ge_step", two, "cuda", vs_official=24.0, launches=8, host_syncs=1),
        row("ogm_ge", two, "cuda", vs_foreach=4.5, replay_vs_foreach=3.9, replay_ms=0.0841),
        row("ogm_ge", thousand, "cuda", replay_vs_foreach=99),
        row("update_scale", thousand, "cuda", vs_foreach=11.0),
        row("update_scale", large, "cuda", copy_share=0.93),
        # Another provider's number does not count, nor does another dtype's.
        row("redreg", large, "triton", copy_share=0.95),
        {**row("inforeg", large, "cuda", copy_share=0.95), "dtype": "bfloat16"},
        row("mutual_information", "10⁷ pairs, 30 bins", "cuda", copy_share=1.1),
        row("ogm_ge_training", crema, "cuda", of_plain=1.0211),
    ]
    found, last = reached(targets, capsys, written(tmp_path / "results.csv", rows))
    assert found["OGM-GE's step at least 25.0× official", "two ResNet-18"] == "**missed**: 24.0×"
    assert found["OGM-GE's step in at most 8 launches", "two ResNet-18"] == "8"
    assert found["OGM-GE's step with 0 host syncs", "two ResNet-18"] == "**missed**: 1"
    assert found["OGM-GE at least 4.0× foreach", "two ResNet-18"] == "4.5×"
    replayed = "replayed, at least {} foreach".format
    assert found[f"OGM-GE, {replayed('4.0×')}", "two ResNet-18"] == "**missed**: 3.9×"
    assert found["OGM-GE, replayed, at most 85 µs on an H200", "two ResNet-18"] == "84 µs"
    assert found[f"OGM-GE, {replayed('10.0×')}", thousand] == "99.0×"
    # Eager, it is fast enough; that is not the question.
    assert found[f"OGM, {replayed('10.0×')}", thousand] == "not measured"
    assert found["OGM at least 90 % of copy", large] == "93 %"
    assert found["RedReg at least 80 % of copy", "one tensor of 256 M"] == "not measured"
    assert found["InfoReg at least 80 % of copy", "one tensor of 256 M"] == "not measured"
    missed = found["histogram MI at least 60 % of copy, by one read", "10⁷ pairs, 30 bins"]
    assert missed == "**missed**: 55 %"
    step = found["OGM-GE's training step at most 1.020× the plain one", crema]
    assert step == "**missed**: 1.021×"
    assert last == f"5 of {len(targets.TARGETS)} targets reached."


def test_targets_of_several_files_and_of_old_ones(
    targets: Any, tmp_path: Path, capsys: Any
) -> None:
    large = "one tensor of 256 M elements"
    first = written(
        tmp_path / "a.csv",
        [
            row("update_scale", large, "cuda", copy_share=0.5, host_ms=1.0),
            row("ogm_ge", large, "cuda", copy_share=0.85, host_ms=1.0),
        ],
    )
    second = written(tmp_path / "b.csv", [row("update_scale", large, "cuda", copy_share=0.95)])
    found, _ = reached(targets, capsys, first, second)
    assert found["OGM at least 90 % of copy", large] == "95 %"
    assert found["OGM-GE at least 80 % of copy", large] == "85 %"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"median_ms": 1.1, "replay_ms": 0.101}, "1.100×"),
        ({"median_ms": 1.1, "replay_ms": 0.12}, "**missed**: 1.200×"),
        ({"median_ms": 1.2, "replay_ms": 0.1}, "**missed**: 1.200×"),
        ({"median_ms": 1.1}, "not measured"),
    ],
)
def test_channels_last_is_compared_with_contiguous_in_both_modes(
    targets: Any, tmp_path: Path, capsys: Any, times: dict[str, float], expected: str
) -> None:
    last = "two ResNet-18 in channels_last (22.3 M parameters)"
    rows = [
        row("update_scale", "two ResNet-18 (22.3 M)", "cuda", median_ms=1.0, replay_ms=0.1),
        row("update_scale", last, "cuda", **times),
    ]
    found, _ = reached(targets, capsys, written(tmp_path / "results.csv", rows))
    text = "OGM in channels_last at most 1.150× contiguous, called and replayed"
    assert found[text, "two ResNet-18 in channels_last"] == expected


def test_what_the_notes_predict_stands_beside_it(targets: Any) -> None:
    lines = targets.table([])
    assert lines[0] == "| target | on | predicted | reached |"
    found = {line.split(" | ")[2] for line in lines if "two ResNet-18 (" in line}
    assert found == {"—", "72 µs (65–80)"}
    notes = (ROOT / "benchmarks/NOTES.md").read_text()
    spelled = {"—": "—", "100×": "100 ×", "72 µs (65–80)": "72 µs (65–80)"}
    assert all(spelled.get(t.predicted, t.predicted) in notes for t in targets.TARGETS)


@pytest.mark.usefixtures("benchmarks")
def test_the_targets_name_cases_and_workloads(targets: Any) -> None:
    from cases import CASES, WORKLOADS

    for target in targets.TARGETS:
        kind = CASES[target.case].kind
        fitting = [w for w in WORKLOADS.values() if w.title.startswith(target.workload)]
        assert [w.kind for w in fitting] == [kind], target.text


@pytest.mark.usefixtures("benchmarks")
def test_the_plans_measure_every_target(targets: Any) -> None:
    from engine.plan import PLANS, planned

    measured = [
        (unit.case.name, unit.workload.title)
        for plan in PLANS.values()
        for unit in planned(plan)
        if str(unit.dtype) == "torch.float32"
    ]
    for target in targets.TARGETS:
        found = [c for c, title in measured if title.startswith(target.workload)]
        assert target.case in found, target.text


def test_choosing_a_backend(choose: Any, tmp_path: Path, capsys: Any) -> None:
    def both(case: str, workload: str, cuda: float, triton: float) -> list[dict[str, object]]:
        times = {"cuda": cuda, "triton": triton}
        return [
            row(case, workload, name, device="cuda", median_ms=ms) for name, ms in times.items()
        ]

    rows = [
        # 4 × and 1/2 ×: by the geometric mean Triton is 1.41 times faster.
        *both("info_nce", "a", 4.0, 1.0),
        *both("info_nce", "b", 1.0, 2.0),
        *both("grad_stats", "a", 1.0, 1.25),
        # Most of a training step is the network.
        *both("lfm_training", "a", 9.0, 1.0),
        # Two ops in one case, a CPU, and a backend that is alone say nothing.
        *both("ogm_ge", "a", 9.0, 1.0),
        *({**r, "device": "cpu"} for r in both("gate", "a", 9.0, 1.0)),
        *both("paired_cosine", "a", 9.0, 1.0)[:1],
    ]
    assert choose.main([str(written(tmp_path / "results.csv", rows))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["| `grad_stats` | 0.80× |", "| `info_nce` | 1.41× |"]
    assert lines[-1] == "TRITON_FIRST = ['info_nce']"


def test_the_default_backends_are_those_that_were_measured(choose: Any) -> None:
    """The committed results say so; without results on a GPU no backend may be preferred."""
    speeds = choose.speed_of_triton((ROOT / "benchmarks/results").glob("**/results.csv"))
    assert choose.triton_first(speeds) == TRITON_FIRST


def test_the_order_of_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preferred("grad_stats", "cuda") == ("cuda", "triton", "reference")
    assert preferred("grad_stats", "xpu") == ("triton", "reference")  # where it says so
    assert preferred("grad_stats", "mps") == ("reference",)
    monkeypatch.setattr("mmfuse.ops._preference.TRITON_FIRST", {"grad_stats"})
    assert preferred("grad_stats", "cuda") == ("triton", "cuda", "reference")
    assert preferred("grad_stats", "cpu") == ("cpu", "reference")
    assert preferred("update_grads_", "cuda") == ("cuda", "triton", "reference")
