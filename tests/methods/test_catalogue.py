"""The catalogue has every method, and tells the truth about each."""

from __future__ import annotations

import re
from dataclasses import fields
from inspect import Parameter, getdoc, signature
from pathlib import Path
from typing import Any

import pytest
import torch
from balancing import IN_FORWARD, KINDS, arguments, make, see
from torch import nn

import mmfuse
from mmfuse.loop.contract import BY_NUMBERS, Source
from mmfuse.methods import catalogue

TWO = {"audio": nn.Linear(2, 2), "visual": nn.Linear(2, 2)}
ROOT = Path(mmfuse.__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
LAYERS = {name: nn.Conv2d(1, 1, 1) for name in ("audio", "visual")}
#: The first arguments of a method, by the place where it acts; one in the forward pass has none.
MADE_ON: dict[str, tuple[Any, ...]] = {"gradient": (TWO,), "head": (nn.Linear(2, 2),)}
SOURCES = [(name, source) for name, made in mmfuse.METHODS.items() for source in made.card.official]
#: Without the controls.
RELEASED = [name for name, made in mmfuse.METHODS.items() if made.card.official]
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
        assert {name, result} <= set(dir(mmfuse))


@pytest.mark.parametrize("name", mmfuse.METHODS)
def test_a_card_is_true(name: str) -> None:
    made = mmfuse.METHODS[name]
    assert issubclass(made, mmfuse.GradientMethod) == (made.card.acts == "gradient")
    in_model = ("feature", "logits", "loss", "head")
    assert issubclass(made, nn.Module) == (made.card.acts in in_model)
    if made.card.acts == "gradient":
        need = made(TWO).rule.need
        first = "unimodal_losses" if need.second == "unimodal" else "logits"
        assert made.card.needs == (first, *need.inputs)
    elif made.card.acts == "parameter":  # between epochs, by what its users give it then
        taken = signature(made.weights).parameters
        assert {name.split("_", 1)[1] for name in taken if name.startswith("train_")} == {
            *made.card.needs,
            "labels",
            "present",
        }
    elif issubclass(made, nn.Module):
        called = made.step if made.card.acts == "head" else made.forward
        taken = signature(called).parameters.items()
        named = [name for name, p in taken if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        assert [name for name in named if name not in ("self", "fused_logits", "labels")] == [
            *made.card.needs
        ]
    if not made.card.official:  # a control
        assert not hasattr(made, "official")
        return
    year = re.search(r"\d{4}", made.card.paper)
    assert year is not None and year[0] in released_code(name).splitlines()[0]


def golden_test(name: str) -> str:
    """Empty for a method of which there are no numbers."""
    path = GOLDEN / f"test_golden_{name.lower()}.py"
    return path.read_text() if path.is_file() else ""


def released_code(name: str) -> str:
    return (ROOT / "released" / f"{name.lower()}.py").read_text()


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_a_release_is_the_one_that_it_says(name: str, source: Source) -> None:
    repository, commit = source.code.split(" at ")
    # If another script has the method as well, that script's file has the sequence.
    files = {name, *(other for other, its in SOURCES if its.code == source.code)}
    texts = [released_code(other) for other in files]
    assert any(repository in text and re.search(rf"\b{commit}\b", text) for text in texts)
    replays = "".join(map(golden_test, sorted(files)))
    listed = (GOLDEN / "data" / "README.md").read_text()
    assert source.golden == (
        f"mmfuse.{name}.official" in replays
        and re.search(rf"\b{re.escape(repository)} \| {commit}\b", listed) is not None
    )


@pytest.mark.parametrize("name", RELEASED)
def test_releases_are_those_that_official_takes(name: str) -> None:
    made = mmfuse.METHODS[name]
    names = [source.release for source in made.card.official]
    taken = signature(made.official).parameters.get("release")
    if taken is None:
        assert names == [""]
        return
    assert names[0] == taken.default
    on: tuple[Any, ...] = MADE_ON["head"] if made.card.acts == "head" else ()
    if "encoders" in signature(made).parameters:
        on = (LAYERS,)
    for release in names:
        assert isinstance(made.official(*on, release=release), made)
    with pytest.raises(ValueError, match=" or ".join(map(repr, names))):
        made.official(*on, release="none")


@pytest.mark.parametrize("name", RELEASED)
def test_a_class_is_from_the_formulas_unless_golden_numbers_are_its_own(name: str) -> None:
    made = mmfuse.METHODS[name]
    replays = golden_test(name)
    assert made.card.golden == bool(re.search(rf"replay\(.*\bmmfuse\.{name},", replays))


@pytest.mark.parametrize("name", mmfuse.METHODS)
def test_docstrings_say_what_they_are_held_to(name: str) -> None:
    made = mmfuse.METHODS[name]
    said = prose(made)
    assert said.count(f"Formulas: `{made.__module__}`. Tested against ") == 1
    assert (f". T{BY_NUMBERS[1:]}" in said) == made.card.golden
    assert ("Tested against them" in said) != made.card.golden
    if name not in RELEASED:
        return
    proofs = {source.golden for source in made.card.official}
    by_numbers = "; `official()` against numbers that the authors' code computed"
    assert made.card.golden or (by_numbers in said) == (proofs == {True})
    said = prose(made.official)
    assert said.count("Tested against ") == 1
    for source in made.card.official:
        assert f"{source.fidelity.removeprefix('tested against ')} ({source.code})" in said
        assert source.release in said


@pytest.mark.parametrize("made", [mmfuse.ogm_backward, mmfuse.sample_contributions])
def test_functions_say_so_too(made: object) -> None:
    """Neither is in the catalogue, and of neither there are golden numbers."""
    assert re.search(r"Formulas: `mmfuse\.methods\.\w+`\. Tested against them[;.]", prose(made))


def prose(made: object) -> str:
    return " ".join((getdoc(made) or "").split())


def test_the_table_in_the_readme_is_what_the_cards_say() -> None:
    """All columns but the short description agree; each method's name leads to its page."""
    readme = (ROOT / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| [`")]
    found = [re.sub(r"^(\| [^|]+\|) [^|]{15,90} \|", r"\1", row) for row in rows]
    expected = []
    for name, made in mmfuse.METHODS.items():
        card = made.card
        proofs = {source.golden for source in card.official}
        follows = {frozenset(): "a control", frozenset({True}): "golden numbers"}.get(
            frozenset(proofs), "formulas"
        )
        page = f"docs/methods/{name.lower()}.md"
        assert (ROOT / page).is_file()
        expected.append(f"| [`{name}`]({page}) | {card.paper} | {card.acts} | {follows} |")
    assert found == expected


def test_training_says_where_each_kind_is_called() -> None:
    lines = (ROOT / "docs" / "training.md").read_text().splitlines()
    table = lines[lines.index("| acts on | in a step |") + 2 :]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table[: table.index("")]]
    assert {made.card.acts for made in mmfuse.METHODS.values()} == {*rows}


def test_mmfuse_exports_the_catalogue() -> None:
    for name in catalogue.__all__:
        assert name in dir(mmfuse) and getattr(mmfuse, name) is getattr(catalogue, name)


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
@pytest.mark.parametrize("name", mmfuse.METHODS)
def test_the_documents_name_it(name: str, document: str) -> None:
    assert re.search(rf"\b{name}\b", (ROOT / document).read_text())


def keywords(name: str) -> dict[str, Any]:
    """Every keyword of a method that has a default, with the default."""
    made = mmfuse.METHODS[name]
    taken = dict(signature(made).parameters)
    if issubclass(made, mmfuse.GradientMethod):
        taken |= signature(mmfuse.GradientMethod).parameters
    return {
        key: parameter.default
        for key, parameter in taken.items()
        if parameter.default is not Parameter.empty
    }


@pytest.mark.parametrize("name", RELEASED)
def test_official_takes_the_keywords_of_the_class(name: str) -> None:
    made = mmfuse.METHODS[name]
    encoders = MADE_ON.get(made.card.acts, ())
    if "encoders" in signature(made).parameters:
        encoders = (TWO,)
    given = keywords(name)
    assert {"starts", "ends", "process_group", "backend"} < given.keys()
    plain, official = made(*encoders), made.official(*encoders, **given)
    assert type(official) is made
    # It uses the given values: with the class's own, the release differs in its type only.
    if hasattr(plain, "rule"):
        named = {field.name for field in fields(plain.rule)} & given.keys()
        assert {key: getattr(official.rule, key) for key in named} == {
            key: getattr(plain.rule, key) for key in named
        }
    assert (official.starts, official.ends) == (plain.starts, plain.ends)
    with pytest.raises(TypeError, match="magic"):
        made.official(*encoders, magic=1)


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_a_card_says_if_a_module_scales_on_the_way_back_alone(kind: str) -> None:
    torch.manual_seed(0)
    head, labels = nn.Linear(12, 4), torch.arange(8) % 4
    method = make(kind, TWO)
    for _ in range(3):  # until it acts: some know nothing in their first step
        features = {name: torch.randn(8, 6, requires_grad=True) for name in TWO}
        out = method(**arguments(method, see(head, features, features, labels)))
    card = mmfuse.METHODS[KINDS[kind].method].card
    if card.acts == "loss":
        assert not card.scales_back
        return
    given = features if card.acts == "feature" else mmfuse.unimodal_logits(head, features)
    passed = getattr(out, "features" if card.acts == "feature" else "logits")
    assert card.scales_back == all(torch.equal(passed[name], given[name]) for name in given)
    sum(x.sum() for x in passed.values()).backward()
    plain = torch.autograd.grad(sum(x.sum() for x in given.values()), list(features.values()))
    assert any(not torch.equal(x.grad, g) for x, g in zip(features.values(), plain, strict=True)), (
        "it acts"
    )
