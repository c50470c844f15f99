"""`python -m mmfuse` and the package's face."""

from __future__ import annotations

import inspect
import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mmfuse
from mmfuse.__main__ import facts, main, report
from mmfuse.ops._registry import BACKENDS, OPS


def test_report_shows_the_whole_grid() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmfuse"], capture_output=True, text=True, check=True
    )
    text = done.stdout
    assert f"mmfuse   {mmfuse.__version__}" in text
    assert torch.__version__ in text
    for op in OPS:
        assert f"\n{op} " in text
    for backend in BACKENDS:
        assert backend in text


def test_a_checkout_says_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The commit may be newer than the version, which was written during the build."""
    monkeypatch.setattr("mmfuse.__main__.__file__", str(tmp_path / "mmfuse" / "__main__.py"))
    (tmp_path / "mmfuse").mkdir()
    assert facts()["commit"] is None
    assert "commit" not in report()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.invalid"]
    for words in (["init"], ["commit", "--allow-empty", "--message=one"], ["tag", "v9.0.0"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True, capture_output=True)
    commit = facts()["commit"]
    assert re.fullmatch("[0-9a-f]{9}", commit)
    assert f"\ncommit   {commit}\n" in report()
    (tmp_path / "mmfuse" / "new.py").touch()
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    assert facts()["commit"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert facts()["commit"] is None


def test_every_missing_cell_has_a_reason() -> None:
    text = report()
    for line in text.splitlines():
        name = line.split(" ")[0]
        if name in OPS and "—" in line:
            assert "why a cell is off" in text


def test_build_info() -> None:
    info = mmfuse._native.build_info()
    if info is None:
        assert mmfuse._native.why_missing("cpu")
        return
    assert set(info) >= {
        "compiler",
        "flags",
        "cuda_version",
        "cuda_architectures",
        "simd",
        "simd_built",
        "has_cpu",
        "has_cuda",
    }
    assert info["simd"] in info["simd_built"]


def public(module: ModuleType) -> list[str]:
    return [name for name in dir(module) if not name.startswith("_")]


def test_completion_shows_public_names_only() -> None:
    modules = {name for name in public(mmfuse) if inspect.ismodule(getattr(mmfuse, name))}
    assert modules == {"amp", "ops", "scores"}
    assert {"OGM", "METHODS", "ogm_backward", "use_backend"} <= set(public(mmfuse))
    assert set(public(mmfuse.ops)) == set(mmfuse.ops.__all__)
    assert not any(inspect.ismodule(getattr(mmfuse.ops, name)) for name in public(mmfuse.ops))


def test_help_leads_on() -> None:
    """It fits on a few screens, and every name in it exists."""
    text = pydoc.plain(pydoc.render_doc(mmfuse))
    assert len(text.splitlines()) < 90
    named = re.findall(r"mmfuse\.([A-Za-z_]+)", mmfuse.__doc__ or "")
    assert len(named) > 8
    assert set(named) <= set(public(mmfuse))


def test_json_has_what_the_text_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--check"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mmfuse"] == mmfuse.__version__
    assert found["folder"] == str(Path(mmfuse.__file__).parent)
    assert set(found["ops"]) == set(OPS)
    assert set(found["devices"]) >= {"cpu", "cuda", "mps", "xpu"}
    assert {one["op"] for one in found["checked"]} <= set(OPS)
    assert all(one["problem"] is None for one in found["checked"])


def test_public_names_are_documented() -> None:
    for module in (mmfuse, mmfuse.ops):
        for name in public(module):
            thing = getattr(module, name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                assert inspect.getdoc(thing), name
    for function in (
        mmfuse.ogm_backward,
        mmfuse.ops.grad_stats,
        mmfuse.ops.update_grads_,
        mmfuse.ops.modality_scores,
        mmfuse.ops.scale_grad,
    ):
        text = inspect.getdoc(function)
        for section in ("Args:", "Raises:", "Equivalent to"):
            assert section in text, (function.__name__, section)


def test_signatures_are_the_designs() -> None:
    """The binding names and defaults of design.md, and the ranks to average over."""
    assert str(inspect.signature(mmfuse.ogm_backward)).replace("'", "").split(" ->")[0] == (
        "(loss: Tensor, encoders: Encoders, "
        "logits: Mapping[str, Tensor] | None = None, labels: Tensor | None = None, *, "
        "alpha: float = 0.8, noise: Noise = True, formula: Formula = tpami, "
        "select: Select = all, shared: Shared | None = None, stream: NoiseStream | None = None, "
        "retain_graph: bool = False, process_group: Group = None, criterion: Loss = None, "
        "backend: str | None = None, **more: Unpack[More])"
    )
