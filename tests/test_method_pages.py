"""The parts of the documents that are made from cards, rules and the tuning's ranges."""

from __future__ import annotations

import importlib.util
import re
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import mmfuse

pytest.importorskip("mkdocs", reason="`make docs` installs what builds the site")
pytest.importorskip("optuna", reason="the ranges of the tuning are Optuna's")

ROOT = Path(__file__).resolve().parents[1]
TWO = {"audio": nn.Linear(2, 2), "visual": nn.Linear(2, 2)}


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    path = ROOT / "docs" / "hooks" / "method_pages.py"
    spec = importlib.util.spec_from_file_location("method_pages", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", mmfuse.METHODS)
def test_every_method_says_what_to_do_under_adam(pages: ModuleType, name: str) -> None:
    made = mmfuse.METHODS[name]
    takes = False
    if issubclass(made, mmfuse.GradientMethod):
        with suppress(ValueError):  # "acts on gradients only"
            takes = made(TWO, apply_to="update").apply_to == "update"
    assert (pages.with_adam(name) == "update") == takes
    assert (pages.with_adam(name) == "lost") == made.card.scales_back
    row = next(r for r in pages.facts(name).splitlines() if r.startswith("| Under Adam |"))
    assert ('apply_to="update"' in row) == takes
    lists = [line for line in pages._adam().splitlines() if f"[{name}]" in line]
    assert len(lists) == 1 and pages.ADAM[pages.with_adam(name)][1] in lists[0]


@pytest.mark.parametrize("name", mmfuse.METHODS)
def test_every_method_says_what_was_tuned(pages: ModuleType, name: str) -> None:
    drawn = pages.SPACES.get(name, {})
    row = next(r for r in pages.facts(name).splitlines() if r.startswith("| Tune |"))
    assert re.findall(r"`(\w+)`", row) == [*drawn]
    assert any(r.startswith(f"| [{name}](") for r in pages._tuned().splitlines())
    if name == "MCR":
        assert "`strength` 0.001 to 0.3, log scale" in row


@pytest.mark.parametrize("name", mmfuse.METHODS)
def test_every_method_says_how_it_counts_the_modalities(pages: ModuleType, name: str) -> None:
    rows = [r for r in pages.facts(name).splitlines() if r.startswith("| Three and more")]
    assert len(rows) == 1
    method = pages.made(name)
    assert ("num_modalities=" in rows[0]) == isinstance(method, nn.Module)
    assert ("encoders" in rows[0]) == hasattr(method, "modalities")


def test_documents_have_the_places(pages: ModuleType) -> None:
    for page, marker in (("training.md", "<!-- adam -->"), ("which_method.md", "<!-- tuned -->")):
        assert (ROOT / "docs" / page).read_text().count(marker) == 1
