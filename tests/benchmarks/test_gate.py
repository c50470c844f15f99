"""The gate of calls: right providers pass, damaged results are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from benchmarked import (
    CALLED,
    CPU,
    TINY,
    TRAININGS,
    UPDATES,
    inputs_of,
    named,
)
from cases import (
    CASES,
    WORKLOADS,
    Case,
    co_information_gate,
    info_nce,
)
from cases.drop_modalities import DropInputs
from cases.modulation_factors import exact_decision
from cases.noisy_views import SIGMA, ViewInputs
from engine import gate, providers
from engine.gradients import GradientInputs
from engine.inputs import COSINE
from torch import Tensor
from torch.nn import functional as F

import mmfuse
from mmfuse.reference import info_nce as reference_nce


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("provider", ["official", "foreach", "reference"])
@pytest.mark.parametrize("case", CALLED, ids=named)
def test_providers_pass_the_gate(case: Case, provider: str, dtype: torch.dtype) -> None:
    i = inputs_of(case, dtype)
    if not case.takes(dtype):
        pytest.skip(f"{case.name} is not run in {dtype}")
    if providers.why_not(provider, case, i.workload, CPU) is not None:
        pytest.skip(f"{provider} does not do {case.name}")
    with torch.set_grad_enabled(case.autograd):
        prepared = providers.prepare(provider, case, i)
        prepared.restore()
        case.check(provider, i, prepared.call())


def test_the_cases_that_a_provider_lacks() -> None:
    trainings = {case.name for case in TRAININGS}
    monitored = {case.name for case in CASES.values() if case.kind == "training"} - trainings
    called = {case.name for case in CALLED}
    # Calls that no release has, or that microbenchmarks alone have asked for.
    alone = {"scale_grad", "conditional_information", "modulation_factors", "sample_scores"}
    alone |= {"scores_of_outputs", "sample_statistics"}
    alone |= {"modality_accuracies", "progress_factors"}
    alone |= {"information_pull", "redundancy_pull", "keep_state"}
    unreleased = {"soft_information", "soft_information_forward"}
    unreleased |= {"logit_divergence", "logit_divergence_grad"}
    own_parts = {f"{method.lower()}_step" for method in mmfuse.METHODS if method != "OGM"} & called
    controls = {case.name for case in TRAININGS if mmfuse.METHODS[case.method].card.official == ()}
    lacks = {
        provider: {case.name for case in CALLED if case.provider(provider) is None}
        for provider in ("plain", "official", "foreach", "compile", "cpu")
    }
    assert lacks == {
        "plain": called - trainings - monitored,
        "official": alone | unreleased | monitored | controls,
        "foreach": trainings | monitored,
        # Nothing of it is called often enough to be compiled.
        "compile": alone | trainings | monitored | own_parts | {"relearning_reset"},
        "cpu": set(),
    }


def _scaled_twice(i: GradientInputs) -> None:
    for grad in i.grads:
        grad.mul_(1.05)


def _one_tensor_forgotten(i: GradientInputs) -> None:
    i.grads[2].copy_(i.pristine[2])


def _last_element_lost(i: GradientInputs) -> None:
    i.grads[-1][-1] = 1.0


def _not_a_number(i: GradientInputs) -> None:
    i.grads[1][0] = torch.nan


_DAMAGES = (_scaled_twice, _one_tensor_forgotten, _last_element_lost, _not_a_number)


@pytest.mark.parametrize("provider", ["foreach", "reference"])
@pytest.mark.parametrize("case", UPDATES, ids=named)
def test_gate_refuses_a_damaged_update(case: Case, provider: str) -> None:
    i = inputs_of(case)
    with torch.no_grad():
        result = providers.prepare(provider, case, i).call()
    right = [g.clone() for g in i.grads]
    for damage in _DAMAGES:
        torch._foreach_copy_(i.grads, right)
        damage(i)
        with pytest.raises(gate.ParityError):
            case.check(provider, i, result)


@pytest.mark.parametrize("provider", ["official", "foreach", "reference"])
def test_a_coefficient_near_zero_is_as_exact_as_float32_can_be(provider: str) -> None:
    """With many classes the ratio is large, and 1 − tanh of it has few digits left."""
    case = CASES["ogm_step"]
    i = case.make(dataclasses.replace(TINY, batch=64, classes=309), torch.float32, CPU)
    with torch.no_grad():
        result = providers.prepare(provider, case, i).call()
    case.check(provider, i, result)
    smallest = float(exact_decision(i.head.logits, i.head.labels)[0].min())
    assert smallest < 2e-3
    torch._foreach_mul_(i.grads, 1.05)
    with pytest.raises(gate.ParityError):
        case.check(provider, i, result)


def _uniform(z: Tensor) -> Tensor:
    return torch.rand_like(z).sub_(0.5).mul_(12**0.5)


def _too_wide(z: Tensor) -> Tensor:
    return torch.randn_like(z).mul_(1.05)


def _shifted(z: Tensor) -> Tensor:
    return torch.randn_like(z).add_(0.05)


@pytest.mark.parametrize("draw", [_uniform, _too_wide, _shifted, torch.zeros_like])
def test_gate_refuses_noise_that_is_not_standard_normal(draw: Callable[[Tensor], Tensor]) -> None:
    case = CASES["update_noise"]
    i = inputs_of(case)
    for grad, scale, std in zip(i.grads, i.scale, i.noise_std, strict=True):
        grad.mul_(scale).add_(draw(grad).mul_(std))
    with pytest.raises(gate.ParityError, match="noise"):
        case.check("foreach", i, None)


@pytest.mark.parametrize(
    "name",
    [
        "modality_scores",
        "decision",
        "discrepancy_ratios",
        "grad_stats",
        "inforeg",
        "paired_cosine",
        "paired_cosine_grad",
        "gate",
        "redundancy_ratio",
        "mutual_information",
        "soft_information",
        "sample_information",
        "arm_information",
        "info_nce",
        "info_nce_forward",
        "logit_divergence",
        "logit_divergence_grad",
        "soft_information_forward",
        "conditional_information",
        "modulation_factors",
        "information_pull",
        "modality_accuracies",
        "progress_factors",
        "redundancy_pull",
    ],
)
def test_gate_refuses_wrong_numbers(name: str) -> None:
    case = CASES[name]
    i = inputs_of(case)
    with torch.set_grad_enabled(case.autograd):
        right = providers.prepare("foreach", case, i).call()
    wrong = [1.02 * x for x in right] if isinstance(right, tuple) else 1.02 * right
    with pytest.raises(gate.ParityError):
        case.check("foreach", i, wrong)


@pytest.mark.parametrize("provider", ["official", "foreach", "reference"])
@pytest.mark.parametrize("threshold", [0.4, 0.6])
def test_all_gates_open_and_shut(
    provider: str, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["gate"]
    i = case.make(WORKLOADS["feature"], torch.float32, CPU)
    monkeypatch.setattr(co_information_gate, "AGREEMENT", threshold)
    i.threshold.fill_(threshold)
    result = providers.prepare(provider, case, i).call()
    assert float(result) == (threshold < COSINE)
    case.check(provider, i, result)


def test_official_traces_are_checked_as_well() -> None:
    case = CASES["inforeg"]
    i = inputs_of(case)
    with torch.no_grad():
        prepared = providers.prepare("official", case, i)
        prepared.restore()
        squares = prepared.call()
        case.check("official", i, squares)
        squares[0].mul_(1.02)
        with pytest.raises(gate.ParityError, match="Fisher"):
            case.check("official", i, squares)


def _views_of(i: ViewInputs, *noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second = (i.x + SIGMA * z for z in noise)
    return first, second, F.mse_loss(first, second)


def test_gate_refuses_views_with_the_same_noise_or_a_wrong_distance() -> None:
    case = CASES["noisy_views"]
    i = inputs_of(case)
    one, two = torch.randn_like(i.x), torch.randn_like(i.x)
    case.check("foreach", i, _views_of(i, one, two))
    with pytest.raises(gate.ParityError, match="other's"):
        case.check("foreach", i, _views_of(i, one, one))
    first, second, distance = _views_of(i, one, two)
    with pytest.raises(gate.ParityError, match="distance"):
        case.check("foreach", i, (first, second, 1.02 * distance))
    with pytest.raises(gate.ParityError, match="view 0"):
        case.check("reference", i, (first, second, distance))


def _one_sample_shared_by_both(i: DropInputs, out: list[Tensor]) -> None:
    out[0][:, 0] = i.features[0][:, 0]


def _nothing_dropped(i: DropInputs, out: list[Tensor]) -> None:
    out[0].copy_(i.features[0])


def _everything_dropped(i: DropInputs, out: list[Tensor]) -> None:
    out[0].zero_()


def _wrong_modality_dropped(i: DropInputs, out: list[Tensor]) -> None:
    out[1][0] = 0.0


@pytest.mark.parametrize(
    "damage",
    [_one_sample_shared_by_both, _nothing_dropped, _everything_dropped, _wrong_modality_dropped],
)
@pytest.mark.parametrize("provider", ["foreach", "reference"])
def test_gate_refuses_a_damaged_drop(
    damage: Callable[[DropInputs, list[Tensor]], None], provider: str
) -> None:
    case = CASES["drop_modalities"]
    i = case.make(WORKLOADS["feature"], torch.float32, CPU)
    with torch.no_grad():
        out = list(providers.prepare(provider, case, i).call())
        case.check(provider, i, out)
        damage(i, out)
        with pytest.raises(gate.ParityError):
            case.check(provider, i, out)


def test_gate_refuses_wrong_gradients_of_a_drop() -> None:
    case = CASES["drop_modalities_grad"]
    i = inputs_of(case)
    with torch.enable_grad():
        *out, grad, _ = providers.prepare("reference", case, i).call()
    with pytest.raises(gate.ParityError, match="gradient 1"):
        case.check("reference", i, (*out, grad, grad))


@pytest.mark.parametrize("tile", [4, 1024])
def test_exact_contrast_is_the_references(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info_nce, "_TILE", tile)
    i = inputs_of(CASES["info_nce"], torch.float64)
    a, b = (feature.detach() for feature in i.features)
    tau = torch.tensor(info_nce.TEMPERATURE, dtype=torch.float64)
    bound, *sums = reference_nce.info_nce(a, b, tau)
    grads = reference_nce.info_nce_backward(torch.ones_like(bound), a, b, tau, *sums)
    for got, want in zip(info_nce.exact_contrast(i), (bound, *grads[:2]), strict=True):
        torch.testing.assert_close(got, want)
