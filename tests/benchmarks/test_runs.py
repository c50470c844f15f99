"""Whole runs, small: their refusals and their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import run
from benchmarked import (
    read_csv,
)
from cases import (
    CASES,
)
from engine import rows as made_of
from engine.gradients import GradientInputs


def raising(i: GradientInputs) -> None:
    raise RuntimeError("out of order")


def doing_nothing(i: GradientInputs) -> None:
    pass


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize(
    ("impostor", "message"), [(doing_nothing, "is wrong"), (raising, "out of order")]
)
def test_a_wrong_provider_is_not_timed_and_the_run_fails(
    impostor: Callable[[GradientInputs], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(CASES["update_scale"], "foreach", impostor)
    arguments = ["--cases", "update_scale", "--workloads", "tiny", "--dtype", "float32"]
    chosen = ["--providers", "official", "foreach", "reference"]
    code = run.main([*arguments, *chosen, "--seconds", "0.01", "--output", str(tmp_path)])
    assert code == 1
    rows = read_csv(tmp_path)
    assert [row["provider"] for row in rows] == ["official", "reference"]
    assert all(row["vs_foreach"] == "" for row in rows)
    assert message in (tmp_path / "results.md").read_text()
    assert "refused" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("small_machine")
def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Rows that are there stay, to the last digit; missing ones are measured.

    Only shares of the copy, which is one for all measurements, go by those that are new as well.
    """

    def measured(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        shares = ("copy_share", "times_floor")
        return [{key: row[key] for key in row if key not in shares} for row in rows]

    arguments = ["--cases", "update_scale", "grad_stats", "--workloads", "tiny", "--no-plots"]
    chosen = ["--providers", "official", "reference", "--device", "cpu", "--seconds", "0.01"]
    whole = [*arguments, "--dtype", "float32", *chosen, "--output", str(tmp_path), "--resume"]
    part = [name for name in whole if name != "grad_stats"]
    assert run.main(part) == 0
    first = read_csv(tmp_path)
    assert {row["case"] for row in first} == {"update_scale"}
    assert run.main(whole) == 0
    both = read_csv(tmp_path)
    assert (
        measured(both[:2]) == measured(first)
        and [row["case"] for row in both[2:]] == ["grad_stats"] * 2
    )
    assert run.main(whole) == 0
    assert read_csv(tmp_path) == both


@pytest.mark.slow
@pytest.mark.usefixtures("small_machine")
def test_training_steps_are_reported_without_bandwidth(tmp_path: Path) -> None:
    arguments = ["--cases", "inforeg_training", "noisy_views", "--dtype", "float32", "bfloat16"]
    workloads = ["--workloads", "tiny_training", "tiny_inputs", "--seconds", "0.01"]
    chosen = ["--providers", "official", "reference", "--device", "cpu"]
    assert run.main([*arguments, *workloads, *chosen, "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path)
    assert [(row["case"], row["dtype"]) for row in rows[::2]] == [
        ("inforeg_training", "float32"),
        ("noisy_views", "float32"),
        ("noisy_views", "bfloat16"),
    ]
    assert all(row["times_floor"] == "" and float(row["vs_official"]) > 0 for row in rows)
    # Its means, the norms of 40 convolutions, and one comparison of the scores at least.
    assert int(rows[0]["host_syncs"]) >= 4 + 40 + 1
    assert int(rows[1]["host_syncs"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("small_machine")
def test_a_short_run_compares_training_steps_and_nothing_else_with_plain_ones(
    tmp_path: Path,
) -> None:
    arguments = ["--cases", "grad_stats", "ogm_ge_training", "--dtype", "float32", "--minutes", "9"]
    workloads = ["--workloads", "tiny", "tiny_training", "--seconds", "0.01", "--device", "cpu"]
    chosen = ["--providers", "plain", "official", "reference"]
    assert run.main([*arguments, *workloads, *chosen, "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path)
    assert [(row["case"], row["provider"]) for row in rows] == [
        *(("ogm_ge_training", name) for name in ("plain", "official", "reference")),
        *(("grad_stats", name) for name in ("official", "reference")),
    ]
    plain, official, reference, *others = (row["of_plain"] for row in rows)
    assert float(plain) == 1 and float(official) > 0 and float(reference) > 0
    assert set(others) == {""}
    text = (tmp_path / "results.md").read_text()
    assert text.count("| of plain |") == 1
    assert "## Not measured" not in text


@pytest.mark.slow
@pytest.mark.usefixtures("small_machine")
def test_quick_run_writes_table_csv_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workloads = ["--workloads", "classes_6", "tiny"]
    chosen = ["--providers", "official", "foreach", "reference"]
    arguments = ["--quick", *workloads, *chosen, "--seconds", "0.05"]
    assert run.main([*arguments, "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path)
    assert list(rows[0]) == [field.name for field in fields(made_of.Row)]
    assert {row["case"] for row in rows} == {
        "modality_scores",
        "decision",
        "update_scale",
        "ogm_ge",
    }
    for row in rows:
        small = row["case"] in ("modality_scores", "decision")
        for name, value in row.items():
            dash = small and name in ("gb_per_s", "copy_gb_per_s", "copy_share", "times_floor")
            # There are no plain steps, and no CUDA graphs on a CPU.
            dash |= name in ("of_plain", "own_us", "reduced") or name.startswith("replay")
            dash |= name == "vs_compile"  # not among the providers
            dash |= name == "busy_p90"  # a short run
            noise = row["case"] == "ogm_ge" and row["provider"] == "reference"
            dash |= noise and name in ("launches", "host_syncs", "extra_mib")
            assert (value == "") == dash, (row["case"], name)
    text = (tmp_path / "results.md").read_text()
    for needed in (
        "×official",
        "p20",
        "p80",
        "of copy",
        "×floor",
        "launches",
        "PyTorch",
        "threads",
    ):
        assert needed in text
    assert "![Speed-up over official](speedup_float32.png)" in text
    assert (tmp_path / "speedup_float32.png").read_bytes().startswith(b"\x89PNG")
    assert "official" in capsys.readouterr().out
