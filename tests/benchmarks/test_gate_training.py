"""The gate of training steps: right ones pass, unregulated and damaged ones are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from benchmarked import (
    CLIPS,
    CPU,
    TINY_OF,
    TRAININGS,
    inputs_of,
    named,
)
from cases import (
    CASES,
    Case,
)
from engine import cost as costs_of
from engine import from_card, gate, providers
from engine.training import TrainingInputs
from engine.workloads import Workload

import mmfuse

pytestmark = pytest.mark.slow_except_for("OGM", "OPM", "INFOREG")


@pytest.mark.parametrize("provider", ["plain", "official", "reference"])
@pytest.mark.parametrize(
    "workload",
    [TINY_OF["training"], pytest.param(CLIPS, marks=pytest.mark.slow)],
    ids=lambda w: w.name,
)
@pytest.mark.parametrize("case", TRAININGS, ids=named)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_training_steps_pass_the_gate(
    case: Case, workload: Workload, provider: str, dtype: torch.dtype
) -> None:
    if case.provider(provider) is None:
        pytest.skip(f"{case.name} has no {provider} sequence: {case.method} is a control")
    i = case.make(workload, dtype, CPU)
    prepared = providers.prepare(provider, case, i)
    for _ in range(2):  # `restore` takes back all that a step has changed
        prepared.restore()
        case.check(provider, i, prepared.call())


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAININGS, ids=named)
def test_mmfuse_waits_in_no_training_step_but_for_opms_samples(case: Case) -> None:
    i = inputs_of(case)
    prepared = providers.prepare("reference", case, i)
    prepared.restore()
    prepared.call()
    # `nonzero`, for the released rule; there is no other way to select samples.
    assert costs_of.cost_of(prepared, CPU).host_syncs == (case.name == "opm_training")


@pytest.mark.parametrize("name", ["inforeg_training", "redreg_training"])
def test_gate_refuses_training_without_regulation_or_with_a_wrong_one(name: str) -> None:
    case = CASES[name]
    i = inputs_of(case)
    start = [p.clone() for p in i.start]
    for factor in (0.0, 0.99):
        # Anchors nearer to the parameters pull less.
        for now, anchor, before in zip(i.parameters, i.start, start, strict=True):
            anchor.copy_(now.detach() + factor * (before - now.detach()))
        i._cache.clear()
        prepared = providers.prepare("reference", case, i)
        prepared.restore()
        prepared.call()
        case.check("reference", i, None)
        for anchor, before in zip(i.start, start, strict=True):
            anchor.copy_(before)
        i._cache.clear()
        with pytest.raises(gate.ParityError):
            case.check("reference", i, None)


def _nobody_regulates(i: TrainingInputs, case: Case) -> Any:
    prepared = providers.prepare("plain", case, i)
    prepared.restore()
    prepared.call()
    return [f.detach() for f in i.model.features(i.audio, i.visual)]


@pytest.mark.parametrize("case", TRAININGS, ids=named)
def test_gate_refuses_a_plain_step_for_a_regulated_one_and_the_reverse(case: Case) -> None:
    i = inputs_of(case)
    result = _nobody_regulates(i, case)
    with pytest.raises(gate.ParityError):
        case.check("reference", i, result)
    case.check("plain", i, None)
    prepared = providers.prepare("reference", case, i)
    prepared.restore()
    prepared.call()
    with pytest.raises(gate.ParityError):
        case.check("plain", i, None)


@pytest.mark.parametrize("provider", ["official", "reference"])
@pytest.mark.parametrize("name", ["ogm_training", "ogm_ge_training"])
def test_gate_refuses_wrong_modulation_and_a_step_not_taken(name: str, provider: str) -> None:
    case = CASES[name]
    i = inputs_of(case)
    prepared = providers.prepare(provider, case, i)

    def refused() -> None:
        with pytest.raises(gate.ParityError):
            case.check(provider, i, None)

    def again() -> None:
        prepared.restore()
        prepared.call()

    again()
    case.check(provider, i, None)
    ahead = [p for p in i.model.audio_net.parameters() if p.dim() == 4]
    behind = [p for p in i.model.visual_net.parameters() if p.dim() == 4]
    for convolutions in (ahead, behind):
        again()
        with torch.no_grad():
            for p in convolutions:
                p.grad = 1.05 * p.grad.detach()
        refused()
    again()
    with torch.no_grad():
        i.model.fc.bias.grad += 1e-3
    refused()
    again()
    i.model.load_state_dict(i.pristine)
    refused()


@pytest.mark.parametrize("provider", ["official", "reference"])
def test_gate_refuses_another_drop_than_the_steps(provider: str) -> None:
    case = CASES["opm_training"]
    i = inputs_of(case)
    prepared = providers.prepare(provider, case, i)
    prepared.restore()
    a, v = prepared.call()
    case.check(provider, i, (a, v))
    keeps = (a != 0).any(1)
    dropped = (v != 0).all() and not keeps.all()
    a, v = (a, v) if dropped else (v, a)
    # One sample more or less has lost its feature, which the parameters show.
    a[int((a != 0).any(1).nonzero()[0])] = 0
    if provider == "official":
        with pytest.raises(gate.ParityError):
            case.check(provider, i, (a, v) if dropped else (v, a))
    with pytest.raises(gate.ParityError, match="removed"):
        case.check(provider, i, (a[1:], v[1:]))


@pytest.mark.parametrize("case", [c for c in CASES.values() if "monitor" in c.name], ids=named)
def test_a_monitor_that_runs_too_often_or_never_is_refused(case: Case) -> None:
    i = inputs_of(case)
    for provider in ("plain", "reference"):
        prepared = providers.prepare(provider, case, i)
        for _ in range(2):
            prepared.restore()
            passes = prepared.call()
            assert passes == (0 if provider == "plain" else 4 // case.every)
            case.check(provider, i, passes)
        with pytest.raises(gate.ParityError, match="times"):
            case.check(provider, i, passes + 1)
    i.restore()
    with pytest.raises(gate.ParityError, match="trained"):
        case.check("reference", i, passes)


# A step for whatever the catalogue has


# Those that have a part in every training step.
IN_STEPS = [n for n, m in mmfuse.METHODS.items() if m.card.acts not in ("head", "parameter")]


def test_every_method_of_the_catalogue_has_a_training_step() -> None:
    assert {case.method for case in TRAININGS} >= set(IN_STEPS)
    for case in TRAININGS:
        released = mmfuse.METHODS[case.method].card.official != ()
        assert (case.provider("official") is not None) == released


class Newcomer(mmfuse.MLB):
    """A method that was added to the catalogue, and has no file here."""


@pytest.fixture
def newcomer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setitem(mmfuse.METHODS, "Newcomer", Newcomer)
    for name in list(CASES):  # put back afterwards
        monkeypatch.setitem(CASES, name, CASES[name])
    from_card.add_missing_methods()
    yield CASES["newcomer_training"]
    del CASES["newcomer_training"]


def test_a_method_that_is_added_gets_a_step_of_its_own(newcomer: Case) -> None:
    i = inputs_of(newcomer)
    assert newcomer.provider("official") is None
    for provider in ("plain", "cpu"):
        prepared = providers.prepare(provider, newcomer, i)
        for _ in range(2):
            prepared.restore()
            newcomer.check(provider, i, prepared.call())
        other = {"plain": "cpu", "cpu": "plain"}[provider]
        with pytest.raises(gate.ParityError):
            newcomer.check(other, i, None)


@pytest.mark.parametrize("method", IN_STEPS)
def test_a_step_can_be_made_from_each_card(method: str) -> None:
    """All but ARM's, which wants a fused representation, and those without steps."""
    made = type("Made", (from_card.CardStep,), {"name": "made", "title": "", "method": method})
    card = mmfuse.METHODS[method].card
    if "fused" in card.needs or card.acts in ("head", "parameter"):
        pytest.skip("a method that needs more than this has a file")
    case = made()
    i = inputs_of(case)
    prepared = providers.prepare("reference", case, i)
    prepared.restore()
    case.check("reference", i, prepared.call())


def test_a_released_sequence_that_takes_network_and_batch_is_a_provider() -> None:
    assert from_card.released_step("MLB") is None  # it wants a strength
    assert from_card.released_step("Newcomer") is None
    assert from_card.released_step("OPM") is not None
