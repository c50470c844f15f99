"""make instructions finds calls that cost more, and compares only numbers that are comparable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import counted
import pytest
import torch
from balancing import FIXED

from mmfuse import METHODS
from mmfuse.ops._registry import OPS

CI = Path(__file__).resolve().parents[2] / ".ci"
HERE = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "compiler": "g++ 12",
    "libc": "glibc 2.36",
    "valgrind": "3.19.0",
    "processor": "x86_64",
}
KEPT = {
    "OGM": {"frames": 40, "operators": 7, "launches": 8, "instructions": 100_000},
    "ops.grad_stats": {"frames": 5, "operators": 1, "launches": 2, "instructions": 50_000},
}


class Gate:
    """The script, with numbers of the test in the place of counted ones."""

    def __init__(self, script: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script = script
        self.path = path
        self.now = json.loads(json.dumps(KEPT))
        self.missing = ""
        path.write_text(json.dumps({"environment": HERE, "calls": KEPT}))
        monkeypatch.setattr(script.counted, "CALLS", dict.fromkeys(KEPT))
        monkeypatch.setattr(script, "environment", lambda: HERE)
        counters = {kind: lambda names, kind=kind: self._count(kind, names) for kind in KEPT["OGM"]}
        monkeypatch.setattr(script, "COUNTERS", counters)

    def _count(self, kind: str, names: list[str]) -> dict[str, int]:
        if kind == self.missing:
            raise self.script.NotCountedError("for this test")
        return {name: self.now[name][kind] for name in names}

    def run(self, *arguments: str) -> int:
        return self.script.main([*arguments, "--numbers", str(self.path)])

    def kept(self) -> dict[str, dict[str, int]]:
        return json.loads(self.path.read_text())["calls"]


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.syspath_prepend(str(CI))
    import instructions

    return Gate(instructions, tmp_path / "numbers.json", monkeypatch)


def test_the_same_numbers_pass(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.run() == 0
    gate.now["OGM"]["instructions"] += 1_900
    assert gate.run() == 0
    said = "instructions: 8 numbers of 2 calls are what they were\n"
    assert capsys.readouterr().out == 2 * said


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("instructions", 2_100, "dearer, 102,100 instructions instead of 100,000 (+2.1 %)"),
        ("instructions", -2_100, "cheaper, 97,900 instructions instead of 100,000 (-2.1 %)"),
        ("frames", 1, "dearer, 41 frames instead of 40 (+2.5 %)"),
        ("operators", 1, "dearer, 8 operators instead of 7 (+14.3 %)"),
        ("launches", -1, "cheaper, 7 launches instead of 8 (-12.5 %)"),
    ],
)
def test_other_numbers_fail(
    gate: Gate, capsys: pytest.CaptureFixture[str], kind: str, more: int, said: str
) -> None:
    gate.now["OGM"][kind] += more
    assert gate.run() == 1
    assert capsys.readouterr().out.splitlines()[0] == f"OGM: {said}"
    assert gate.run("ops.") == 0


def test_a_call_without_numbers_and_numbers_without_a_call_fail(
    gate: Gate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate.script.counted, "CALLS", dict.fromkeys(("OGM", "ops.new")))
    gate.now["ops.new"] = KEPT["ops.grad_stats"]
    assert gate.run() == 1
    lines = capsys.readouterr().out.splitlines()
    assert "ops.new: new, 50,000 instructions" in lines
    assert "ops.grad_stats: nothing of this name is counted any more" in lines


@pytest.mark.parametrize(
    ("key", "compared"),
    [
        ("torch", set()),
        ("python", {"operators", "launches"}),
        ("processor", {"frames", "operators", "launches"}),
    ],
)
def test_what_depends_on_something_else_is_not_compared(
    gate: Gate, capsys: pytest.CaptureFixture[str], key: str, compared: set[str]
) -> None:
    kept = {"environment": {**HERE, key: "another"}, "calls": KEPT}
    gate.path.write_text(json.dumps(kept))
    for kind in gate.now["OGM"]:
        gate.now["OGM"][kind] *= 2
    assert gate.run() == (1 if compared else 0)
    lines = capsys.readouterr().out.splitlines()
    skipped = {line.split(":")[0] for line in lines if f"not compared, {key} {HERE[key]}" in line}
    assert skipped == set(KEPT["OGM"]) - compared
    assert {
        kind for kind in KEPT["OGM"] if any(f"{kind} instead of" in x for x in lines)
    } == compared


def test_what_cannot_be_counted_is_said(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    gate.missing = "instructions"
    assert gate.run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "instructions: not counted, for this test"
    assert lines[1].startswith("instructions: 6 numbers")
    gate.now["OGM"]["frames"] = 99
    assert gate.run("--update") == 1
    assert gate.kept() == KEPT


def test_update_writes_what_is_another_number(gate: Gate) -> None:
    gate.now["OGM"]["instructions"] += 1_900
    gate.now["OGM"]["frames"] = 41
    gate.now["ops.grad_stats"]["instructions"] = 40_000
    assert gate.run("--update") == 0
    assert gate.kept() == {
        "OGM": {**KEPT["OGM"], "frames": 41},
        "ops.grad_stats": {**KEPT["ops.grad_stats"], "instructions": 40_000},
    }
    assert gate.run() == 0


def test_update_in_another_environment_writes_all(gate: Gate) -> None:
    gate.path.write_text(json.dumps({"environment": {**HERE, "libc": "musl"}, "calls": KEPT}))
    gate.now["OGM"]["instructions"] += 1
    assert gate.run("--update") == 0
    assert gate.kept() == gate.now
    assert json.loads(gate.path.read_text())["environment"] == HERE


def test_the_numbers_in_the_repository_are_complete() -> None:
    kept = json.loads((CI / "instructions.json").read_text())
    assert set(kept["environment"]) == set(HERE)
    for name, numbers in kept["calls"].items():
        assert set(numbers) == set(KEPT["OGM"]), name


@pytest.mark.parametrize("name", [n for n in counted.CALLS if not n.startswith("ops.")])
def test_what_is_counted_acts(name: str) -> None:
    """A counted step does the same each time, and treats the modalities differently."""
    call = counted.made(name)
    results = []
    for _ in range(2):
        call.prepare()
        results.append(vars(call.once()))
    if name in FIXED and "stream" in signature(METHODS[name]).parameters:  # drawn anew each time
        field = "keep" if "keep" in results[0] else "contributions"
        assert not torch.equal(results[0][field], results[1][field])
        return
    field = {"OPM": "drop_probability", "ARM": "weights"}.get(name, "coefficients")
    first, second = (result[field] for result in results)
    # MMPareto's factors are a matter of two gradients, not of a modality.
    assert (
        len(first.unique()) == 2
        or (name == "MMPareto" and first.tolist() == [0.5, 0.5])
        or (name == "NoiseOnly" and first.tolist() == [1, 1])
        # CGGM sees no progress on the batch of the step before.
        or (name == "CGGM" and first.tolist() == [1.3, 1.3])
    )
    assert torch.allclose(first, second, rtol=1e-2)


@pytest.mark.parametrize("name", ["OGM", "ARM", "ops.scale_grad"])
def test_what_is_exact_is_the_same_again(name: str) -> None:
    for count in (counted.frames, counted.operators):
        assert count(name) == count(name) > 0
    if torch.cuda.is_available() or OPS["grad_stats"].why_missing("cuda", "cpu") is not None:
        pytest.skip("the CUDA kernels do not run in the host shim here")
    assert counted.launches(name) == counted.launches(name) > 0


@pytest.mark.slow
def test_under_valgrind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind was not found")
    monkeypatch.syspath_prepend(str(CI))
    import instructions

    name, numbers = "ops.discrepancy_ratios", tmp_path / "numbers.json"
    kinds = {"frames": counted.frames(name), "operators": counted.operators(name)}
    kept = {**kinds, "launches": 1, "instructions": 1_000}
    calls = dict.fromkeys(counted.CALLS, kept)
    numbers.write_text(json.dumps({"environment": instructions.environment(), "calls": calls}))
    done = subprocess.run(
        [sys.executable, str(CI / "instructions.py"), name, "--numbers", str(numbers)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "instructions: not counted" in done.stdout:  # no header of Valgrind's, or no compiler
        pytest.skip(done.stdout)
    assert done.returncode == 1, done.stderr
    said = rf"^{re.escape(name)}: dearer, ([\d,]+) instructions instead of 1,000 "
    found = re.search(said, done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    # The interpreter's part alone, some 7 frames, is thousands; starting anything is millions.
    assert 5_000 < int(found[1].replace(",", "")) < 500_000
