"""`make fuzz` finds planted errors, survives a crash, and finds nothing in a small share."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import judging, program, targets
from fuzzing.calls import Call, Function
from fuzzing.judging import Found
from fuzzing.machines import Plan, Step
from fuzzing.mistakes import places, spoil
from fuzzing.values import Drawer, T
from torch import Tensor

TARGETS = targets.targets()


def _one(d: Drawer) -> dict[str, Any]:
    return {"x": d.tensor(d.whole(0, 9), dtypes=("float32",), plain=True)}


def doubled(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The cpu backend is wrong for long tensors."""
    if not isinstance(x, Tensor) or x.dim() != 1 or x.dtype != torch.float32 or x.is_meta:
        raise ValueError("x must be a vector")
    return x * (3 if backend == "cpu" and len(x) > 4 else 2)


def careless(x: Tensor) -> Tensor:
    """Changes its argument before it looks at it."""
    if not isinstance(x, Tensor):
        raise ValueError("x must be a tensor")
    with torch.no_grad():
        if len(x) > 3 and x.is_contiguous() and x.dtype == torch.float32:
            x.data.add_(1)
            raise ValueError("x is too long")
    return x.clone()


def accidental(x: Tensor) -> Any:
    """Fails somewhere within."""
    return [1, 2, 3][len(x)] if isinstance(x, Tensor) and x.dim() else None


def crashing(x: Tensor) -> None:
    """Ends the process."""
    if isinstance(x, Tensor) and x.dim() and len(x) > 4:
        os.kill(os.getpid(), signal.SIGSEGV)


def endless(x: Tensor) -> None:
    """Never returns."""
    while True:
        signal.pause()


def _report(function: Any, folder: Path, compared: bool = False) -> program.Report:
    """Runs a number of cases in this process: a busy machine finds the same."""
    name = function.__name__
    target = Function(name, function, _one, compared)
    return program.rounds(target, math.inf, 1, folder / name, cases=200)


def _texts(folder: Path, name: str) -> list[str]:
    return [path.read_text() for path in (folder / name / "found").glob("*.txt")]


@pytest.mark.slow
def test_a_wrong_result_is_found_and_shrunk(tmp_path: Path) -> None:
    report = _report(doubled, tmp_path, compared=True)
    assert "doubled on cpu: the result differs" in report.found
    text = next(t for t in _texts(tmp_path, "doubled") if "the result differs" in t)
    assert "shape=(5,)" in text and "mistakes=()" in text
    again = program.still_found(Function("doubled", doubled, _one), tmp_path / "doubled")
    assert set(again) == set(report.found)
    repaired = Function("doubled", lambda x, backend=None: x, _one)
    assert program.still_found(repaired, tmp_path / "doubled") == []
    assert _texts(tmp_path, "doubled") == []


@pytest.mark.slow
def test_an_error_that_has_changed_something_is_found(tmp_path: Path) -> None:
    report = _report(careless, tmp_path)
    assert "careless: changed 0.x though it raised an error" in report.found
    assert report.cases > 10


@pytest.mark.slow
def test_an_accident_is_found(tmp_path: Path) -> None:
    found = _report(accidental, tmp_path).found
    assert [key for key in found if key.startswith("accidental: IndexError at ")] == found != []


@pytest.mark.slow
def test_a_crash_ends_the_target_alone_and_leaves_its_call(tmp_path: Path) -> None:
    function = Function("crashing", crashing, _one, compared=False)
    others = {"crashing": function, "doubled": Function("doubled", doubled, _one)}
    said: list[str] = []
    code = program.main(others, list(others), 0.3, tmp_path, first=1, say=said.append)
    assert code == 1 and "found: crashing: killed by SIGSEGV" in said
    assert "found: doubled on cpu: the result differs" in said
    (text,) = _texts(tmp_path, "crashing")
    assert "the last call:\nCall(arguments={'x': T(shape=(" in text
    assert next(line for line in said if line.startswith("crashing ")).split()[1] == "?"


@pytest.mark.slow
def test_a_hang_ends_as_well(tmp_path: Path) -> None:
    function = Function("endless", endless, _one, compared=False)
    report = program.fuzz_one("endless", function, 0.5, 1, tmp_path, grace=1.0)
    assert report.found == ["endless: it does not end"]


@pytest.mark.slow
def test_nothing_found_is_exit_code_0(tmp_path: Path) -> None:
    fine = Function("fine", lambda x: None, _one, compared=False)
    said: list[str] = []
    assert program.main({"fine": fine}, ["fine"], 0.1, tmp_path, first=1, say=said.append) == 0
    assert said[1].startswith("fine ") and said[-1].startswith("1 targets")
    report = json.loads((tmp_path / "fine" / "report.json").read_text())
    assert report[0] > 0 and report[1] == []


def test_everything_public_is_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(targets.public()) <= set(TARGETS)
    assert len(TARGETS) > 60
    monkeypatch.setattr(targets.ops, "__all__", [*targets.ops.__all__, "a_new_op"])
    monkeypatch.setattr(targets.ops, "a_new_op", lambda x: x, raising=False)
    with pytest.raises(LookupError, match=r"no driver for ops\.a_new_op"):
        targets.targets()


def test_a_mistake_is_made_in_one_value_alone() -> None:
    arguments = {"grads": [torch.ones(2), torch.ones(3)], "alpha": 0.5}
    assert list(places(arguments)) == [("grads",), ("grads", 0), ("grads", 1), ("alpha",)]
    spoilt, said = spoil(arguments, 2, 0)
    assert said == "grads.1 := a dimension more"
    assert spoilt["grads"][1].shape == (1, 3) and spoilt["grads"][0] is arguments["grads"][0]
    assert arguments["grads"][1].shape == (3,)


@pytest.mark.parametrize("layout", ["gaps", "offset", "padded rows", "reversed", "negative bit"])
def test_layouts_hold_the_same_values(layout: str) -> None:
    plain, other = T((3, 4), seed=5).build(), T((3, 4), layout=layout, seed=5).build()
    assert torch.equal(plain, other)
    assert not other.is_contiguous() or other.storage_offset() or other.is_neg()


def test_the_memory_around_a_tensor_is_watched() -> None:
    x = T((4,), layout="offset").build()
    before = judging.snapshot({"x": x})
    x.as_strided((1,), (1,), 0).add_(1)
    with pytest.raises(Found, match=r"changed 0\.x"):
        judging.check_unchanged("f", before, {"x": x}, why="")


def test_one_non_finite_moment_is_as_good_as_another() -> None:
    infinite, nan = (torch.tensor([1.0, float(x)]) for x in ("inf", "nan"))
    judging.compare("ops.grad_stats on cpu", infinite, nan, "the result")
    with pytest.raises(Found, match="the result differs"):
        judging.compare("ops.info_nce on cpu", infinite, nan, "the result")
    with pytest.raises(Found, match="the result differs"):
        judging.compare("ops.grad_stats on cpu", infinite, torch.tensor([1.0, 2.0]), "the result")


def test_a_sequence_compares_the_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong kernel, of the CPU's alone, is seen in the gradients that a step leaves."""
    from fuzzing.worlds import World

    target = TARGETS["steps of OGM"]
    names = list(World("OGM", "cpu", False, False).actions)
    step = Step(names.index("step"), 1)
    plan = Plan(False, False, (Step(names.index("pass"), 1), step))
    target.judge(plan)
    made = World._pass

    def wrong(self: World, number: int) -> None:
        made(self, number)
        if self.backend == "cpu":
            self.encoders["audio"].weight.grad.mul_(1.5)

    monkeypatch.setattr(World, "_pass", wrong)
    with pytest.raises(Found, match=r"steps of OGM: \w+: the gradient.* differs"):
        target.judge(plan)
    assert "pass(number)" in target.describe(plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_small_share_finds_nothing(name: str, tmp_path: Path) -> None:
    """The same cases in each run; `make fuzz` has others every time."""
    report = program.rounds(TARGETS[name], 20.0, 2026, tmp_path, cases=25)
    assert report.cases >= 1
    assert report.found == [], _texts(tmp_path, ".")


def test_a_call_is_repeated_from_what_is_printed() -> None:
    call = Call({"x": T((5,), seed=3)}, ((0, 14),))
    function = Function("doubled", doubled, _one)
    again: Call = eval(repr(call), {"Call": Call, "T": T})
    assert again == call
    assert function.made(again)[1] == ["x := float32"] or function.made(again)[1]
