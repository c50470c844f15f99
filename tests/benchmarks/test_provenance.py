"""A folder's results are of one commit, library and number of threads; each run is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run
import tables
import torch
from benchmarked import read_csv
from cases import CASES, WORKLOADS
from engine import environment, plan, results
from engine.measure import SHOWN_SAMPLES
from engine.rows import Row

from build_tools.sources import digest

CPU = torch.device("cpu")
RUNS = [{"command": "a", environment.LOAD: "9%"}, {"command": "b", environment.LOAD: "10%"}]
FACTS = {
    "device": "cpu: x",
    "CPU": "x, 2 cores",
    "threads": "2",
    "PyTorch": "2.13.0",
    "mmfuse": "0.1.0, commit abc",
    "library built from": environment.SAME_SOURCES,
}
SMALL = ["--cases", "update_scale", "--workloads", "tiny", "--dtype", "float32", "--device", "cpu"]
SMALL += ["--no-plots", "--seconds", "0.01", "--no-busy"]


@pytest.mark.parametrize("key", ["threads", "PyTorch", "mmfuse", "library built from", "CPU"])
def test_results_of_another_machine_or_build_do_not_mix(key: str) -> None:
    old = results.Facts(dict(FACTS))
    results.check_same(Path("f"), old, dict(FACTS))
    results.check_same(Path("f"), old, {**FACTS, "date": "today", "command": "c"})
    results.check_same(Path("f"), results.Facts(), FACTS)
    with pytest.raises(results.DirtyTree, match=f"f have {key}: .* this run has other.*--output"):
        results.check_same(Path("f"), old, {**FACTS, key: "other"})
    with pytest.raises(results.DirtyTree, match=f"{key}: not known"):
        results.check_same(Path("f"), old.__class__({**FACTS, key: "not known"}), FACTS)


@pytest.mark.usefixtures("small_machine")
def test_a_run_with_other_threads_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(run.Session, "measure", lambda self, *a: measured.append(a))
    words = [*SMALL, "--output", str(tmp_path), "--resume"]
    assert run.main(words) == 0 and len(measured) == 1
    before = (tmp_path / "facts.json").read_text()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(SystemExit, match="this run has 77"):
        run.main(words)
    assert len(measured) == 1 and (tmp_path / "facts.json").read_text() == before


def test_lines_about_what_is_measured_again_go() -> None:
    old = [
        "crema_d: too much for a CPU",
        "a on w, float32: compile: has no such function",
        "a on w, float32 fails: RuntimeError",
        "a on w, float32x: stays",
        "b on w, float32: no time left",
    ]
    new = ["b on w, float32: no time left", "a on w, float32: foreach is wrong"]
    again = {"a on w, float32", "w", "crema_d"}
    assert results.merged_lines(old, new, again) == [*old[3:], new[1]]
    assert results.merged_lines(old, [], set()) == old


@pytest.mark.usefixtures("small_machine")
def test_what_was_refused_and_is_right_now_is_refused_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        """Leaves the gradients as they are."""

    monkeypatch.setattr(results, "folder_of_commit", lambda device: tmp_path)
    monkeypatch.setattr(run.providers, "provider_names", lambda device: ["official", "foreach"])
    with monkeypatch.context() as patch:
        patch.setattr(CASES["update_scale"], "foreach", wrong)
        assert run.main(SMALL) == 1
    assert len(results.load(tmp_path)[1].refused) == 1
    assert run.main(SMALL) == 0
    _, facts = results.load(tmp_path)
    assert facts.refused == [] and len(facts.invocations) == 2
    assert len(read_csv(tmp_path)) == 2
    assert (tmp_path / "results.md").read_text().count("- run: command: `") == 2


def test_the_documents_have_the_largest_load() -> None:
    facts = results.Facts(dict(FACTS), invocations=RUNS)
    assert results.largest_load(facts) == "10%"
    assert tables.Conditions().markdown([], facts) == [
        "The run had 2 threads on 2 cores. Other processes took 10 % of the CPU in the busiest of "
        "its commands."
    ]
    older = results.Facts({**FACTS, environment.LOAD: "1%"})
    assert (
        "took 1 % of the CPU in the last of its commands"
        in tables.Conditions().markdown([], older)[0]
    )


# The library


def checkout(folder: Path, sources: str | None) -> None:
    (folder / "csrc").mkdir()
    (folder / "csrc" / "a.cpp").write_text("int a;")
    (folder / "mmfuse").mkdir()
    notes = {} if sources is None else {"sources": sources}
    (folder / "mmfuse" / "_build.json").write_text(json.dumps(notes))


def test_a_library_of_older_sources_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    monkeypatch.setattr(environment._native, "build_info", lambda: {"compiler": "g++"})
    assert environment.built_from() == "sources that it does not name"
    checkout(tmp_path, None)
    assert environment.built_from() == "sources that it does not name"
    made = digest(tmp_path / "csrc")
    (tmp_path / "mmfuse" / "_build.json").write_text(json.dumps({"sources": made}))
    assert environment.built_from() == environment.SAME_SOURCES
    (tmp_path / "csrc" / "a.cpp").write_text("int b;")
    assert environment.built_from() == f"other sources ({made})"
    monkeypatch.setattr(environment, "commit", lambda: "0123456789")
    monkeypatch.setattr(environment, "changed_files", list)
    with pytest.raises(results.DirtyTree, match=r"is of other sources .*make build.*--output"):
        results.folder_of_commit(CPU)
    monkeypatch.setattr(environment._native, "build_info", lambda: None)
    assert environment.built_from() is None
    assert results.folder_of_commit(CPU).name == "0123456789"


def test_the_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    seen = set()
    for name, text in (("a", "bc"), ("ab", "c"), ("a", "b"), ("c/a", "bc")):
        folder = tmp_path / str(len(seen))
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
        seen.add(digest(folder))
        assert digest(folder) in seen
    assert len(seen) == 4 and all(len(found) == 16 for found in seen)


def test_a_package_of_older_build_tools_is_measured_too(tmp_path: Path) -> None:
    """As `make bench-compare` does, which puts a commit's checkout before all others."""
    (tmp_path / "build_tools").mkdir()
    (tmp_path / "build_tools" / "__init__.py").touch()
    (tmp_path / "a").write_text("b")
    program = "from pathlib import Path; from engine import environment as e; import build_tools;"
    program += f"print(e.digest(Path({str(tmp_path)!r})), build_tools.__file__)"
    paths = [tmp_path, tables.ROOT, tables.ROOT / "benchmarks"]
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [digest(tmp_path), str(tmp_path / "build_tools/__init__.py")]


# The rows that may be in a commit's folder


@pytest.mark.parametrize(
    "words",
    [["--quick"], ["--minutes", "4"], ["--providers", "cpu"], ["--shrink", "8"]],
    ids=lambda words: words[0],
)
def test_less_than_whole_measurements_need_a_folder_of_their_own(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(device: torch.device) -> Path:
        raise AssertionError("the commit's folder was asked for")

    monkeypatch.setattr(results, "folder_of_commit", asked)
    with pytest.raises(SystemExit, match=f"{words[0]} makes less .* name a folder with --output"):
        run.main(["--device", "cpu", *words])
    for whole in ([], ["--plan", "readme"], ["--cases", "ogm_ge"]):
        assert run.parse(["--device", "cpu", *whole]).partial is None


def test_a_selection_is_a_measurement_of_its_own() -> None:
    case, whole = CASES["update_scale"], WORKLOADS["resnet18"]
    options: dict[str, Any] = {"main_first": False}
    (every,), (conv,) = (
        plan.units([case], [whole], [torch.float32], select, **options)
        for select in ("all", "conv")
    )
    assert every.workload is whole
    assert conv.labels[1] == f"{whole.title}, conv only"
    assert every.labels != conv.labels and every.key != conv.key
    (logits,) = plan.units(
        [CASES["decision"]], [WORKLOADS["classes_6"]], [torch.float32], "conv", **options
    )
    assert logits.workload is WORKLOADS["classes_6"]
    chosen = plan.Plan("", (("update_scale", "resnet18", "float32"),), (), 20)
    assert [u.labels for u in plan.planned(chosen, 1, "conv")] == [conv.labels]


def measured(*counts: tuple[str, int]) -> list[Row]:
    rest = dict.fromkeys(Row.__dataclass_fields__)
    return [Row(**{**rest, "provider": name, "samples": n}) for name, n in counts]


def test_resuming_measures_anew_what_the_documents_show_of_too_few_samples() -> None:
    shown, other = tables.README.units[0], ("update_scale", "thousand", "bfloat16")
    assert other not in tables.README.units
    few = measured(("official", SHOWN_SAMPLES - 1), ("cpu", 50))
    enough = measured(("official", SHOWN_SAMPLES), ("cpu", 50), ("reference", 3))
    assert not run.has_enough(few, shown)
    assert run.has_enough(enough, shown) and run.has_enough(few, other)


@pytest.mark.usefixtures("small_machine")
def test_what_the_documents_show_has_ten_samples_however_long_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "update_scale", "tiny", "float32"
    shown = plan.Plan("", (key,), (), 200)
    monkeypatch.setattr(run.tables, "README", shown)
    monkeypatch.setattr(
        run.providers, "provider_names", lambda device: ["foreach", "reference", "cpu"]
    )
    words = [*SMALL, "--seconds", "1e-9", "--output", str(tmp_path)]
    assert run.main(words) == 0
    counts = {r["provider"]: int(r["samples"]) for r in read_csv(tmp_path)}
    assert counts == {"foreach": SHOWN_SAMPLES, "cpu": SHOWN_SAMPLES, "reference": 2}
    # A run that has to be short stays short.
    assert run.main([*words, "--minutes", "9", "--providers", "foreach", "cpu"]) == 0
    assert {int(r["samples"]) for r in read_csv(tmp_path)} == {2}
