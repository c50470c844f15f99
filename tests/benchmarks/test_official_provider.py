"""Provider `official`: the reference's numbers, and the costs that were counted in the releases."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from benchmarked import (
    CONV,
    CPU,
    LOGITS,
    TINY,
    TINY_OF,
    inputs_of,
)
from cases import (
    CASES,
    opm,
    paired_cosine,
    redreg,
)
from cases.noisy_views import SIGMA
from cases.shared_information import CONDITIONAL_BINS
from engine import cost as costs_of
from engine import gate, measure, providers
from engine.gradients import BETA, GradientInputs
from engine.inputs import ALPHA, LogitsInputs
from engine.training import DROP
from torch import Tensor

import released.opm
import released.redreg
from mmfuse import ogm_coefficients
from mmfuse.ops import GradStats
from mmfuse.reference import discrepancy_ratios as reference_ratios
from mmfuse.reference import grad_stats as reference_stats
from mmfuse.reference import modality_scores as reference_scores
from mmfuse.reference import noise as reference_noise
from mmfuse.reference import update_grads as reference_update
from released import arm, ogm


@pytest.mark.parametrize("ahead", [0, 1])
def test_official_decision_is_the_references(ahead: int) -> None:
    i = LogitsInputs(LOGITS, torch.float64, CPU)
    i.logits = i.logits if ahead == 0 else i.logits[::-1]
    coefficients, ratios = CASES["decision"].official(i)
    prob, _, _ = reference_scores.modality_scores(i.logits, i.labels)
    want = reference_ratios.discrepancy_ratios(prob)
    torch.testing.assert_close(gate.as_vector(ratios, CPU), want)
    want_coefficients = ogm_coefficients(want, ALPHA, "cvpr")
    torch.testing.assert_close(gate.as_vector(coefficients, CPU), want_coefficients)
    assert coefficients[ahead] < 1
    assert coefficients[1 - ahead] == 1


def updated(i: GradientInputs, scale: Tensor, **given: Any) -> list[Tensor]:
    want = [g.clone() for g in i.pristine]
    pull, noise_std = given.get("pull"), given.get("noise_std")
    rows = (i.params, i.anchors) if pull is not None else ((), ())
    state = i.state if noise_std is not None else None
    ids, offsets = list(range(len(want))), [0] * len(want)
    with torch.no_grad():
        reference_update.update_grads_(
            want, scale, *rows, pull, noise_std, state, ids, offsets, None, None
        )
    return want


def test_official_update_with_the_same_noise_is_the_references() -> None:
    i = GradientInputs(TINY, torch.float64, CPU)
    ids = iter(range(len(i.params)))

    def draw(grad: Tensor, std: float) -> Tensor:
        return std * reference_noise.standard_normal(i.state, grad.numel(), next(ids)).view_as(grad)

    i.restore(replaced=True)
    for params, k in zip(i.encoder_params, i.coefficients, strict=True):
        ogm.scale_with_noise(params, k, draw)
    numel, moments = reference_stats.grad_stats(i.pristine, [], [])
    std = GradStats(numel, *moments.unbind()).std + 1e-8
    torch.testing.assert_close(i.results(), updated(i, i.scale, noise_std=std))


def test_official_pulls_are_the_references() -> None:
    i = GradientInputs(TINY, torch.float64, CPU, anchored=True)
    with torch.no_grad():
        i.restore(replaced=True)
        CASES["update_pull"].official(i)
        torch.testing.assert_close(i.results(), updated(i, i.ones, pull=i.pull))
        i.restore(replaced=True)
        CASES["redreg"].official(i)
        scale = 1 - BETA * i.exact_stats.dot / i.exact_stats.sq_norm
        torch.testing.assert_close(i.results(), updated(i, scale, pull=BETA * i.ones))


@pytest.mark.parametrize(
    ("name", "launches", "syncs"),
    [("update_scale", 40, 0), ("ogm_ge", 200, 40), ("inforeg", 280, 0), ("redreg", 560, 40)],
)
def test_official_costs_what_the_specification_counted(
    name: str, launches: int, syncs: int
) -> None:
    case = CASES[name]
    prepared = providers.prepare("official", case, case.make(CONV, torch.float32, CPU))
    # The first call makes what is made once for a training run.
    prepared.restore()
    prepared.call()
    cost = costs_of.cost_of(prepared, CPU)
    assert (cost.launches, cost.host_syncs) == (launches, syncs)


def test_official_decision_costs_what_the_specification_counted() -> None:
    i = LogitsInputs(LOGITS, torch.float32, CPU)
    cost = costs_of.cost_of(measure.Prepared(lambda: CASES["decision"].official(i)), CPU)
    # 256 for the sums; two ratios, the comparison and one coefficient come on top.
    assert 256 <= cost.launches <= 266
    assert cost.host_syncs == 128 + 1


def test_official_drop_costs_what_the_specification_counted() -> None:
    case = CASES["drop_modalities"]
    prepared = providers.prepare("official", case, inputs_of(case))
    cost = costs_of.cost_of(prepared, CPU)
    # θ, and the shape of what is left.
    assert cost.host_syncs == 2
    assert 15 <= cost.launches <= 21


def test_official_information_copies_and_counts_as_often_as_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, call)

    counted(arm, "host")
    counted(arm.np, "histogramdd")  # histogram2d calls it
    case = CASES["arm_information"]
    providers.prepare("official", case, inputs_of(case)).call()
    assert calls == {"host": 10, "histogramdd": 8}


def test_what_is_measured_has_the_released_hyper_parameters() -> None:
    assert (opm.Q_BASE, opm.LAMBDA) == (released.opm.Q_BASE, released.opm.LAMBDA)
    assert CONDITIONAL_BINS == arm.CONDITIONAL_BINS
    assert SIGMA == released.redreg.SIGMA
    assert released.redreg.agreement_threshold(0, redreg.EPOCHS) == paired_cosine.AGREEMENT
    assert released.redreg.drop_probability(0, redreg.EPOCHS) == DROP


@pytest.mark.parametrize(
    ("name", "syncs"),
    # Of a step of 64 samples: a read for each sample and score, and a comparison; OGM-GE: a
    # deviation a tensor; OPM: two comparisons, θ, what is left (on a GPU its labels); ARM: sums.
    [
        ("ogm_training", 2 * 64 + 1),
        ("ogm_ge_training", 2 * 64 + 1 + 40),
        ("opm_training", 2 * 64 + 2 + 1 + 1),
        ("arm_training", 3 * 64 + 3),
    ],
)
@pytest.mark.slow
def test_official_steps_wait_as_often_as_the_specification_counted(name: str, syncs: int) -> None:
    case = CASES[name]
    workload = dataclasses.replace(TINY_OF["training"], batch=64, shape=(9, 9))
    prepared = providers.prepare("official", case, case.make(workload, torch.float32, CPU))
    prepared.restore()
    prepared.call()
    assert costs_of.cost_of(prepared, CPU).host_syncs == syncs
