"""`python -m mmfuse --check`: every operator is compared, and one that is wrong is found."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfuse import _check
from mmfuse.__main__ import _devices, check_text, main
from mmfuse.ops._registry import OPS


def test_every_operator_is_compared_on_every_backend_here() -> None:
    found = list(_check.check())
    for backend in {one.backend for one in found}:
        assert [one.op for one in found if one.backend == backend] == list(OPS)
    here = {b for b in ("cpu", "triton", "cuda") if OPS["grad_stats"].why_missing(b, "cpu") is None}
    assert {one.backend for one in found if one.device == "cpu"} == here
    assert [one for one in found if one.problem is not None] == []
    assert all(one.error is not None and one.error <= _check.TOLERANCE for one in found)


def test_a_build_for_cuda_without_a_gpu_is_checked_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its PyTorch names an accelerator whose driver is not there."""

    def named(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {one.device for one in _check.check()} <= {"cpu"}
    assert _devices()["cuda"] is None


@pytest.mark.parametrize("name", list(OPS))
def test_examples_are_of_finite_numbers(name: str) -> None:
    """They are no NaN, which a wrong kernel could share with a right one."""
    results = _check._results(OPS[name], "reference", _check.example(OPS[name]), "cpu")
    assert all(bool(x.isfinite().all()) for x in results)
    assert any(bool((x != 0).any()) for x in results)


def _broken(monkeypatch: pytest.MonkeyPatch, change: Any) -> list[_check.Checked]:
    """The comparison of one operator whose kernel is replaced."""
    op = OPS["discrepancy_ratios"]
    backend = next(b for b in ("cpu", "triton") if op.why_missing(b, "cpu") is None)
    right = op.overloads[backend]
    monkeypatch.setitem(op.overloads, backend, lambda *args: change(right(*args)))
    return [one for one in _check.check([op.name]) if one.backend == backend]


def _nan(x: Tensor) -> Tensor:
    return torch.where(torch.arange(len(x)) == 1, math.nan, x)


def _raise(_: Tensor) -> Tensor:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x: x * (1 + 2 * _check.TOLERANCE), "off by .* of its largest number"),
        (lambda x: x.flip(0), "off by"),
        (_nan, "NaN or infinite in other places"),
        (lambda x: x[:2], r"\[2\] in the place of torch.float32 \[3\]"),
        (lambda x: x.double(), "torch.float64 .* in the place of torch.float32"),
        (_raise, "RuntimeError: no kernel image"),
    ],
)
def test_a_wrong_kernel_is_found(
    change: Any, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = _broken(monkeypatch, change)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmfuse.__main__.check", lambda: iter([found]))
        assert main(["--check"]) == 1
    assert found.op in capsys.readouterr().out
    assert found.problem is not None
    assert re.search(problem, found.problem)
    assert "0 of 1 operators agree" in check_text([found])


def test_nothing_to_compare_is_said() -> None:
    assert "nothing to compare" in check_text([])
