"""The catalogue has every method, and what it says of one is true."""

from __future__ import annotations

import re
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import mmfuse

TWO = {"audio": nn.Linear(2, 2), "visual": nn.Linear(2, 2)}
ROOT = Path(mmfuse.__file__).resolve().parents[1]
FILES = {
    path.stem
    for path in (ROOT / "mmfuse" / "methods").glob("*.py")
    if not path.stem.startswith("_") and path.stem != "catalogue"
}


def test_every_file_is_a_method_of_the_catalogue() -> None:
    assert {name.lower() for name in mmfuse.METHODS} == FILES
    for name, made in mmfuse.METHODS.items():
        assert made.__module__ == f"mmfuse.methods.{name.lower()}"
        assert getattr(mmfuse, name) is made
        result = f"{name}Result"
        if issubclass(made, mmfuse.GradientMethod):
            result = made(TWO).rule.result.__name__
        assert {name, result} <= set(mmfuse.__all__)


@pytest.mark.parametrize("name", mmfuse.METHODS)
def test_a_card_is_true(name: str) -> None:
    made = mmfuse.METHODS[name]
    assert issubclass(made, mmfuse.GradientMethod) == (made.card.acts == "gradient")
    assert issubclass(made, nn.Module) == (made.card.acts in ("feature", "logits", "loss"))
    if made.card.acts == "gradient":
        need = made(TWO).rule.need
        first = "unimodal_losses" if need.second == "unimodal" else "logits"
        assert made.card.needs == (first, *need.inputs)
    elif issubclass(made, nn.Module):
        taken = signature(made.forward).parameters.items()
        named = [name for name, p in taken if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        assert [name for name in named if name not in ("self", "fused_logits", "labels")] == [
            *made.card.needs
        ]
    golden = ROOT / "tests" / "golden" / f"test_golden_{name.lower()}.py"
    assert golden.is_file() == made.card.golden
    if made.card.official is None:  # a control
        assert not hasattr(made, "official")
        return
    released = (ROOT / "released" / f"{name.lower()}.py").read_text()
    repository, commit = made.card.official.split(" at ")
    assert repository in released and re.search(rf"\b{commit}\b", released)
    year = re.search(r"\d{4}", made.card.paper)
    assert year is not None and year[0] in released.splitlines()[0]


def test_the_table_in_the_readme_is_what_the_cards_say() -> None:
    """To be pasted where it differs."""
    readme = (ROOT / "README.md").read_text()
    lines = readme[readme.index("### One interface") :].splitlines()
    found = [line for line in lines[: lines.index("## In real training")] if line.startswith("| `")]
    expected = []
    for name, made in mmfuse.METHODS.items():
        paper, acts, needs, official, _ = made.card
        called = ", ".join(f"`{need}`" for need in needs)
        official = official or "a control"
        expected.append(f"| `{name}` | {paper} | {acts} | {called} | {official} |")
    assert found == expected


@pytest.mark.parametrize("document", ["README.md", "docs/training.md", "CHANGELOG.md"])
@pytest.mark.parametrize("name", mmfuse.METHODS)
def test_the_documents_name_it(name: str, document: str) -> None:
    text = re.sub(r"(?m)^\| `.*", "", (ROOT / document).read_text())  # beside the table
    assert re.search(rf"\b{name}\b", text)


def keywords(name: str) -> dict[str, Any]:
    """Every keyword of a method that has a default, and which one."""
    made = mmfuse.METHODS[name]
    taken = dict(signature(made).parameters)
    if issubclass(made, mmfuse.GradientMethod):
        taken |= signature(mmfuse.GradientMethod).parameters
    return {
        key: parameter.default
        for key, parameter in taken.items()
        if parameter.default is not Parameter.empty
    }


@pytest.mark.parametrize("name", [n for n, m in mmfuse.METHODS.items() if m.card.official])
def test_official_takes_the_keywords_of_the_class(name: str) -> None:
    made = mmfuse.METHODS[name]
    encoders = (TWO,) if issubclass(made, mmfuse.GradientMethod) else ()
    given = keywords(name)
    assert {"starts", "ends", "process_group", "backend"} < given.keys()
    plain, official = made(*encoders), made.official(*encoders, **given)
    assert type(official) is made
    # What it is given it uses: with the class's own values the release is another by its type only.
    named = {field.name for field in fields(plain.rule)} & given.keys()
    assert {key: getattr(official.rule, key) for key in named} == {
        key: getattr(plain.rule, key) for key in named
    }
    assert (official.starts, official.ends) == (plain.starts, plain.ends)
    with pytest.raises(TypeError, match="magic"):
        made.official(*encoders, magic=1)
