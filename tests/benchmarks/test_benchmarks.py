"""The benchmark suite: what it compares with, that its gate holds, and what it writes."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import run
from cases import (
    CASES,
    WORKLOADS,
    Case,
    co_information_gate,
    info_nce,
    opm,
    paired_cosine,
    redreg,
)
from cases.arm import CONDITIONAL_BINS
from cases.drop_modalities import DropInputs
from cases.modulation_factors import exact_decision
from cases.noisy_views import SIGMA, ViewInputs
from engine import cost as costs_of
from engine import environment, gate, measure, plan, providers, report
from engine.gradients import BETA, GradientInputs
from engine.inputs import ALPHA, COSINE, LogitsInputs
from engine.networks import ResNet18
from engine.session import bytes_needed
from engine.training import DROP, TrainingInputs
from engine.workloads import Workload

import released.opm
import released.redreg
from mmfuse import ogm_coefficients
from mmfuse.ops import BACKENDS, GradStats
from mmfuse.reference import discrepancy_ratios as reference_ratios
from mmfuse.reference import grad_stats as reference_stats
from mmfuse.reference import info_nce as reference_nce
from mmfuse.reference import modality_scores as reference_scores
from mmfuse.reference import noise as reference_noise
from mmfuse.reference import update_grads as reference_update
from released import arm, ogm

CPU = torch.device("cpu")
SHAPES = ((7, 3, 3, 3), (5,), (64, 33))
# The last tensor lifts the gradients over 1 MiB, from where on bandwidths are reported.
TINY = Workload("tiny", "a tiny model", encoders=(SHAPES, (*SHAPES, (270_000,))))
CONV = Workload("conv", "40 convolutions", encoders=(((4, 3, 3, 3),) * 20,) * 2)
LOGITS = WORKLOADS["classes_6"]
# Whatever else a case runs on, in small.
TINY_OF = {
    "gradients": TINY,
    "features": Workload("tiny_features", "", "features", batch=9, width=40),
    "inputs": Workload("tiny_inputs", "", "inputs", shape=(3, 2, 40, 40)),
    "representations": Workload("tiny_maps", "", "representations", shape=(3, 16, 4, 5)),
    "training": Workload("tiny_training", "", "training", batch=6, width=32, shape=(33, 40)),
    "pairs": Workload("tiny_pairs", "", "pairs", shape=(1, 5000)),
    "few_pairs": Workload("tiny_few_pairs", "", "few_pairs", shape=(1, 3000), bins=12),
    "samples": Workload("tiny_samples", "", "samples", shape=(7, 31), bins=10),
    "fusion": Workload("tiny_fusion", "", "fusion", batch=20, width=40, bins=9),
    "contrast": Workload("tiny_contrast", "", "contrast", batch=13, width=40),
}
# CREMA-D in small: clips of three frames, spectrograms of another shape.
CLIPS = dataclasses.replace(
    WORKLOADS["crema_d"], batch=6, width=32, encoders=(), shape=(33, 40), audio_shape=(41, 34)
)
TRAININGS = [case for case in CASES.values() if case.kind == "training"]
GRADIENT_CASES = [case for case in CASES.values() if case.kind == "gradients"]
UPDATES = [case for case in GRADIENT_CASES if not case.name.startswith("grad_stats")]


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    workload = next((w for w in WORKLOADS.values() if case.fits(w)), TINY)
    return case.make(TINY_OF.get(case.kind, workload), dtype, CPU)


def named(case: Case) -> str:
    return case.name


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The yardstick and the cache flush without their half gigabyte each."""
    monkeypatch.setitem(measure.COPY_ELEMENTS, "cpu", 2**16)
    monkeypatch.setattr(measure, "_FLUSH_BYTES", 2**16)
    monkeypatch.setattr(measure, "MIN_SAMPLES", 2)
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)
    for workload in TINY_OF.values():
        monkeypatch.setitem(WORKLOADS, workload.name, workload)


# What is measured


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("resnet18", 120, 22_346_752),
        ("resnet18_channels_last", 120, 22_346_752),
        ("resnet18_one", 60, 11_176_512),
        ("training", 120, 22_346_752),
        ("crema_d", 120, 22_346_752),
        ("vit_b16", 300, 171_597_312),
        ("single_256m", 1, 2**28),
        ("thousand", 1000, 1_000_000),
    ],
)
def test_sizes_of_the_workloads(name: str, tensors: int, elements: int) -> None:
    assert WORKLOADS[name].tensors == tensors
    assert WORKLOADS[name].elements == elements


def test_resnet_has_forty_convolutions() -> None:
    shapes = [s for encoder in WORKLOADS["resnet18"].encoders for s in encoder]
    assert sum(len(s) == 4 for s in shapes) == 40


@pytest.mark.parametrize("channels", [1, 3])
def test_network_and_workload_are_the_same_resnet(channels: int) -> None:
    encoder = WORKLOADS["resnet18"].encoders[(1, 3).index(channels)]
    assert tuple(tuple(p.shape) for p in ResNet18(channels).parameters()) == encoder


def test_the_training_batch_of_crema_d() -> None:
    workload = dataclasses.replace(WORKLOADS["crema_d"], width=8)
    case = CASES["ogm_training"]
    i = case.make(dataclasses.replace(workload, batch=2), torch.float32, CPU)
    assert i.audio.shape == (2, 1, 257, 188)
    assert i.visual.shape == (2, 3, 3, 224, 224)
    assert workload.batch == 64 and workload.classes == 6
    assert workload.pixels == 64 * (257 * 188 + 3 * 224 * 224)
    # Gradients, weights and their copies; the activations come to ten gigabytes.
    assert 10e9 < bytes_needed(WORKLOADS["crema_d"], torch.float32) < 13e9
    assert bytes_needed(TINY, torch.float32) == 40 * TINY.elements


def test_features_of_clips_are_means_over_their_frames() -> None:
    i = CASES["ogm_training"].make(CLIPS, torch.float64, CPU)
    i.model.eval()
    with torch.no_grad():
        a, v = i.model.features(i.audio, i.visual)
        frames = [i.model.features(i.audio, frame)[1] for frame in i.visual.unbind(1)]
    assert a.shape == v.shape == (6, 32)
    torch.testing.assert_close(v, torch.stack(frames).mean(0))


@pytest.mark.parametrize(
    ("name", "bytes_per_element"),
    [
        ("grad_stats", 4),
        ("grad_stats_anchors", 12),
        ("update_scale", 8),
        ("update_noise", 8),
        ("update_pull", 16),
        ("update_all", 16),
        ("ogm_ge", 12),
        ("ogm_ge_step", 12),
        ("inforeg", 16),
        ("redreg", 28),
    ],
)
def test_bytes_per_element(name: str, bytes_per_element: int) -> None:
    case = CASES[name]
    assert case.floor_bytes(inputs_of(case)) == bytes_per_element * TINY.elements
    half = inputs_of(case, torch.bfloat16)
    assert case.floor_bytes(half) == bytes_per_element * TINY.elements // 2


@pytest.mark.parametrize(
    ("name", "operands"),
    [
        ("paired_cosine", 2),
        ("paired_cosine_grad", 6),
        ("gate", 2),
        ("noisy_views", 3),
        ("redundancy_ratio", 2),
        ("drop_modalities", 4),
        ("drop_modalities_grad", 8),
        ("mutual_information", 4),
        ("soft_information", 6),
        ("sample_information", 2),
        ("arm_information", 3),
        ("info_nce", 0),
    ],
)
def test_operands_of_what_is_no_gradient(name: str, operands: int) -> None:
    case = CASES[name]
    i = inputs_of(case)
    shape = i.workload.shape or (i.workload.batch, i.workload.width)
    assert case.floor_bytes(i) == operands * 4 * math.prod(shape)


def test_training_steps_have_no_floor_and_are_not_run_below_float32() -> None:
    case = CASES["inforeg_training"]
    assert case.floor_bytes(inputs_of(case)) == 0
    assert case.takes(torch.float32) and case.takes(torch.float64)
    assert not case.takes(torch.bfloat16) and CASES["inforeg"].takes(torch.bfloat16)


def test_ogm_step_counts_only_the_modality_that_is_ahead() -> None:
    i = inputs_of(CASES["ogm_step"])
    coefficients, _ = exact_decision(i.head.logits, i.head.labels)
    assert coefficients[0] < 1
    assert coefficients[1] == 1
    assert CASES["ogm_step"].floor_bytes(i) == 8 * sum(p.numel() for p in i.encoder_params[0])


def test_select_keeps_the_convolutions() -> None:
    i = GradientInputs(TINY, torch.float32, CPU, select="conv")
    assert [p.dim() for p in i.params] == [4, 4]
    assert not CASES["ogm_ge"].fits(WORKLOADS["thousand"], "conv")


# The authors' code


@pytest.mark.parametrize("ahead", [0, 1])
def test_official_decision_is_the_references(ahead: int) -> None:
    i = LogitsInputs(LOGITS, torch.float64, CPU)
    i.logits = i.logits if ahead == 0 else i.logits[::-1]
    coefficients, ratios = CASES["decision"].official(i)
    prob, _ = reference_scores.modality_scores(i.logits, i.labels)
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
    # What is made once for a training run is made in the first call.
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
def test_official_steps_wait_as_often_as_the_specification_counted(name: str, syncs: int) -> None:
    case = CASES[name]
    workload = dataclasses.replace(TINY_OF["training"], batch=64, shape=(9, 9))
    prepared = providers.prepare("official", case, case.make(workload, torch.float32, CPU))
    prepared.restore()
    prepared.call()
    assert costs_of.cost_of(prepared, CPU).host_syncs == syncs


# The gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("provider", ["official", "foreach", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=named)
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


def test_the_cases_that_a_provider_lacks() -> None:
    trainings = {case.name for case in TRAININGS}
    assert trainings == {
        f"{method}_training" for method in ("ogm", "ogm_ge", "opm", "arm", "inforeg", "redreg")
    }
    lacks = {
        provider: {n for n, case in CASES.items() if case.provider(provider) is None}
        for provider in ("plain", "official", "foreach", "compile", "cpu")
    }
    assert lacks == {
        "plain": set(CASES) - trainings,
        "official": {"scale_grad", "soft_information"},
        "foreach": trainings,
        "compile": {"scale_grad"} | trainings,
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


def raising(i: GradientInputs) -> None:
    raise RuntimeError("out of order")


def doing_nothing(i: GradientInputs) -> None:
    pass


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize(
    ("impostor", "message"), [(doing_nothing, "is wrong"), (raising, "out of order")]
)
def test_a_wrong_provider_is_not_timed_and_the_run_fails(
    impostor: Callable[[GradientInputs], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(CASES["update_scale"], "foreach", impostor)
    arguments = ["--cases", "update_scale", "--workloads", "tiny", "--dtype", "float32"]
    chosen = ["--providers", "official", "foreach", "reference"]
    code = run.main([*arguments, *chosen, "--seconds", "0.01", "--output", str(tmp_path)])
    assert code == 1
    rows = read_csv(tmp_path)
    assert [row["provider"] for row in rows] == ["official", "reference"]
    assert all(row["vs_foreach"] == "" for row in rows)
    assert message in (tmp_path / "results.md").read_text()
    assert "refused" in capsys.readouterr().out


# Measuring


def test_nothing_that_only_simulates_a_gpu_is_timed() -> None:
    names = providers.provider_names(CPU)
    assert set(names) & set(BACKENDS) == {"reference", "cpu"}


def test_cost_counts_operators_waits_and_the_peak_of_memory() -> None:
    x = torch.ones(250_000)

    def call() -> None:
        y = (x + 1) * 2  # the sum is still there while the product is made
        y.view(500, 500)[0].sum().item()
        y.nonzero()

    cost = costs_of.cost_of(measure.Prepared(call), CPU)
    assert (cost.launches, cost.host_syncs) == (3, 2)
    # y and the indices, two bytes to one; no other tensor lives by then.
    assert cost.extra_bytes == pytest.approx(3 * x.nbytes, rel=0.01)


def test_memory_that_a_provider_frees_is_not_charged() -> None:
    case = CASES["ogm_ge"]
    official = costs_of.cost_of(providers.prepare("official", case, inputs_of(case)), CPU)
    largest = 4 * 270_000
    # Product and noise, and the sum of both, of one tensor at a time.
    assert largest < official.extra_bytes < 3.2 * largest


def test_interleaved_shares_the_time_and_restores_before_every_call() -> None:
    log: list[str] = []
    chosen = {
        name: measure.Prepared(lambda n=name: log.append(n), lambda: log.append("restore"))
        for name in ("a", "b")
    }
    clock = measure.Clock(CPU)
    samples = measure.interleaved(chosen, clock, 0.0, cold=False)
    assert log[::2] == ["restore"] * (2 * measure.MIN_SAMPLES)
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys(
        ("a", "b"), measure.MIN_SAMPLES
    )
    rounds = [set(log[i : i + 4]) for i in range(0, len(log), 4)]
    assert rounds == [{"restore", "a", "b"}] * measure.MIN_SAMPLES


def test_short_calls_are_timed_in_rows() -> None:
    log: list[str] = []

    def ten_microseconds(
        call: Callable[[], object], *, cold: bool, repeats: int = 1, lead: float = 0.0
    ) -> measure.Sample:
        seconds = 1e-5 if "a" in log else 1e-3  # the first call takes much longer
        for _ in range(repeats):
            call()
        return measure.Sample(seconds, seconds)

    chosen = {"a": measure.Prepared(lambda: log.append("a"), lambda: log.append("restore"))}
    measure.interleaved(chosen, ten_microseconds, 0.0, cold=False, in_rows=True)
    # Three calls to see how long a warm one takes, then rows of a millisecond.
    assert log.count("restore") == 3 + measure.MIN_SAMPLES
    assert log.count("a") == 3 + 100 * measure.MIN_SAMPLES


def lasting(*seconds: float) -> list[measure.Sample]:
    return [measure.Sample(s, s) for s in seconds]


def test_rows_say_how_long_a_step_takes_of_a_plain_one() -> None:
    samples = {
        "plain": lasting(1.0, 10.0, 1.0),
        "official": lasting(2.0, 30.0, 4.0),
        "cpu": lasting(1.02, 10.2, 1.5),
    }
    costs = dict.fromkeys(samples, costs_of.Cost(1, 0, 0))
    labels = {**dict.fromkeys(("case", "title", "workload", "dtype"), "x"), "device": "cpu"}
    rows = report.make_rows(labels, samples, costs, 0, 1)
    assert [row.of_plain for row in rows] == [1, 3, pytest.approx(1.02)]
    assert [row.vs_official for row in rows] == [3, 1, pytest.approx(4 / 1.5)]
    text = report.markdown(rows, {"device": "x"}, [], [], [])
    header = next(line for line in text.splitlines() if line.startswith("| case"))
    # Nothing has a bandwidth here, and nobody measured foreach.
    assert "of plain" in header
    assert not any(absent in header for absent in ("×foreach", "GB/s", "of copy", "×floor"))
    assert "| 1.02× |" in text
    del samples["plain"], costs["plain"]
    rows = report.make_rows(labels, samples, costs, 0, 1)
    assert all(row.of_plain is None for row in rows)
    assert "| of plain" not in report.markdown(rows, {"device": "x"}, [], [], [])


def test_rows_say_ratios_shares_and_floors() -> None:
    samples = {
        "copy": lasting(1.0, 1.0, 1.0),
        "official": lasting(4.0, 40.0, 4.0),
        "cpu": lasting(2.0, 20.0, 4.0, 2.0),
    }
    nothing = costs_of.Cost(1, 0, 2**20)
    labels = dict.fromkeys(("case", "title", "workload", "dtype", "device"), "x")
    costs = {"official": nothing, "cpu": nothing}
    official, cpu = report.make_rows(labels, samples, costs, 10**9, 2 * 10**9)
    assert official.vs_official == 1
    # A slow round is slow for both, and does not count for more.
    assert cpu.vs_official == 2
    assert cpu.vs_foreach is None
    assert cpu.median_ms == 3000
    assert cpu.samples == 4
    assert cpu.gb_per_s == pytest.approx(1 / 3)
    assert cpu.copy_gb_per_s == pytest.approx(2)
    assert cpu.copy_share == pytest.approx(1 / 6)
    assert cpu.times_floor == pytest.approx(6)
    assert cpu.extra_mib == 1


def test_numbers_are_shown_with_their_unit_also_below_one() -> None:
    assert [report.show_time(ms) for ms in (1234.0, 12.34, 0.1234)] == [
        "1.23 s",
        "12.3 ms",
        "123 µs",
    ]
    assert [report.show_ratio(r) for r in (123.4, 1.0, 0.5, 0.0123, None)] == [
        "123×",
        "1.00×",
        "0.50×",
        "0.012×",
        "—",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("small_machine")
def test_training_steps_are_reported_without_bandwidth(tmp_path: Path) -> None:
    arguments = ["--cases", "inforeg_training", "noisy_views", "--dtype", "float32", "bfloat16"]
    workloads = ["--workloads", "tiny_training", "tiny_inputs", "--seconds", "0.01"]
    chosen = ["--providers", "official", "reference", "--device", "cpu"]
    assert run.main([*arguments, *workloads, *chosen, "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path)
    assert [(row["case"], row["dtype"]) for row in rows[::2]] == [
        ("inforeg_training", "float32"),
        ("noisy_views", "float32"),
        ("noisy_views", "bfloat16"),
    ]
    assert all(row["times_floor"] == "" and float(row["vs_official"]) > 0 for row in rows)
    # Its means, the norms of 40 convolutions, and one comparison of the scores at least.
    assert int(rows[0]["host_syncs"]) >= 4 + 40 + 1
    assert int(rows[1]["host_syncs"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("small_machine")
def test_a_short_run_compares_training_steps_and_nothing_else_with_plain_ones(
    tmp_path: Path,
) -> None:
    arguments = ["--cases", "grad_stats", "ogm_ge_training", "--dtype", "float32", "--minutes", "9"]
    workloads = ["--workloads", "tiny", "tiny_training", "--seconds", "0.01", "--device", "cpu"]
    chosen = ["--providers", "plain", "official", "reference"]
    assert run.main([*arguments, *workloads, *chosen, "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path)
    assert [(row["case"], row["provider"]) for row in rows] == [
        *(("ogm_ge_training", name) for name in ("plain", "official", "reference")),
        *(("grad_stats", name) for name in ("official", "reference")),
    ]
    plain, official, reference, *others = (row["of_plain"] for row in rows)
    assert float(plain) == 1 and float(official) > 0 and float(reference) > 0
    assert set(others) == {""}
    text = (tmp_path / "results.md").read_text()
    assert text.count("| of plain |") == 1
    assert "## Not measured" not in text


def test_machine_becomes_a_folder_name() -> None:
    assert environment.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert environment.folder_name("Intel(R) Xeon(R) @ 2.2GHz") == "intel-r-xeon-r-2-2ghz"


def test_own_work_is_not_taken_for_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([(100.0, 10.0, 50.0), (106.0, 12.0, 54.0)])
    monkeypatch.setattr(environment.Bystanders, "_now", staticmethod(lambda: next(seconds)))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    # Six busy seconds, two of them our own, on two cores for four seconds.
    assert environment.Bystanders().share() == 0.5


def test_the_system_says_how_busy_it_is() -> None:
    share = environment.Bystanders().share()
    assert share is None or 0 <= share <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("small_machine")
def test_quick_run_writes_table_csv_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workloads = ["--workloads", "classes_6", "tiny"]
    chosen = ["--providers", "official", "foreach", "reference"]
    arguments = ["--quick", *workloads, *chosen, "--seconds", "0.05"]
    assert run.main([*arguments, "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path)
    assert list(rows[0]) == [field.name for field in fields(report.Row)]
    assert {row["case"] for row in rows} == {
        "modality_scores",
        "decision",
        "update_scale",
        "ogm_ge",
    }
    for row in rows:
        small = row["case"] in ("modality_scores", "decision")
        for name, value in row.items():
            dash = small and name in ("gb_per_s", "copy_gb_per_s", "copy_share", "times_floor")
            # There are no plain steps, and no CUDA graphs on a CPU.
            dash |= name == "of_plain" or name.startswith("replay")
            assert (value == "") == dash, (row["case"], name)
    text = (tmp_path / "results.md").read_text()
    for needed in (
        "×official",
        "p20",
        "p80",
        "of copy",
        "×floor",
        "launches",
        "PyTorch",
        "threads",
    ):
        assert needed in text
    assert "![Speed-up over official](speedup_float32.png)" in text
    assert (tmp_path / "speedup_float32.png").read_bytes().startswith(b"\x89PNG")
    assert "official" in capsys.readouterr().out


def units_of(*names: str, workloads: Any = ("resnet18", "resnet18_one", "pairs_10m")) -> list[Any]:
    return plan.units(
        [CASES[name] for name in names],
        [WORKLOADS[name] for name in workloads],
        [torch.float32, torch.bfloat16],
        "all",
        main_first=True,
    )


def test_a_short_run_measures_every_case_once_before_any_twice_and_the_main_ones_first() -> None:
    units = units_of("grad_stats", "update_scale", "mutual_information", "ogm_ge")
    order = [str(unit) for unit in units]
    assert order[:5] == [
        "ogm_ge on resnet18, float32",
        "update_scale on resnet18, float32",
        "mutual_information on pairs_10m, float32",
        "grad_stats on resnet18, float32",
        "ogm_ge on resnet18, bfloat16",
    ]
    assert len(set(order)) == len(order) == 3 * 4 + 2


def test_a_short_run_measures_training_on_what_needs_a_gpu_before_the_small_one() -> None:
    units = units_of("ogm_ge_training", workloads=("training", "crema_d"))
    assert [unit.workload.name for unit in units] == ["crema_d", "training"]


class Watch:
    """A clock that is set."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_a_limited_run_shares_out_half_of_what_is_left() -> None:
    units = units_of("grad_stats", workloads=("resnet18", "resnet18_one"))
    watch = Watch()
    given = []
    for _, seconds in plan.share(units, 10.0, 1.0, watch):
        given.append(seconds)
        watch.time += 2 * seconds  # data, checks and counts take as long again
    assert given == pytest.approx([60 / 8] * 4)
    # Never more than is wanted.
    assert [s for _, s in plan.share(units, 3.0, 1.0, Watch())] == [3.0] * 4


def test_a_limited_run_ends() -> None:
    units = units_of("grad_stats", workloads=("resnet18", "resnet18_one"))
    watch = Watch()
    late = []
    for _, seconds in plan.share(units, 10.0, 1.0, watch):
        late.append(seconds)
        watch.time += 35
    assert late == [pytest.approx(60 / 8), pytest.approx(25 / 6), None, None]


def test_a_run_without_a_limit_keeps_its_order_and_its_seconds() -> None:
    cases = [CASES["grad_stats"], CASES["ogm_ge"]]
    units = plan.units(cases, [WORKLOADS["resnet18"]], [torch.float32], "all", main_first=False)
    shared = list(plan.share(units, 3.0, None))
    assert [(unit.case.name, s) for unit, s in shared] == [("grad_stats", 3.0), ("ogm_ge", 3.0)]


@pytest.mark.usefixtures("small_machine")
def test_a_run_without_time_lists_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["official", "compile", "reference"]
    monkeypatch.setattr(providers, "provider_names", lambda device: names)
    watch = Watch()
    monkeypatch.setattr(plan, "share", partial(plan.share, now=watch))
    monkeypatch.setattr(
        run.Session, "measure", lambda self, unit, *_: setattr(watch, "time", watch.time + 200)
    )
    arguments = ["--minutes", "4", "--dtype", "float32", "--device", "cpu"]
    cases = ["--cases", "grad_stats", "update_scale", "ogm_ge", "--workloads", "tiny"]
    assert run.main([*arguments, *cases, "--output", str(tmp_path)]) == 0
    _, skipped = (tmp_path / "results.md").read_text().split("## Not measured")
    assert skipped.strip().splitlines() == [
        "- compile: too slow for a run with --minutes",
        "- reference: too slow for a run with --minutes",
        "- grad_stats on tiny, float32: no time left",
    ]


def test_what_is_too_much_for_a_cpu_is_left_out_there_unless_named() -> None:
    default = run.parse(["--device", "cpu"])
    assert "crema_d" not in default.workloads and "training" in default.workloads
    assert [line for line in default.left_out if line.startswith("crema_d: ")]
    named_ = run.parse(["--device", "cpu", "--workloads", "crema_d"])
    assert named_.workloads == ["crema_d"] and not named_.left_out
    on_gpu = run.parse(["--device", "cuda", "--output", "x"])
    assert "crema_d" in on_gpu.workloads and not on_gpu.left_out


@pytest.mark.parametrize("tf32", [False, True])
def test_convolutions_are_set_for_a_while(tf32: bool) -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    with measure.convolutions(tf32=tf32):
        assert (cudnn.benchmark, cudnn.allow_tf32) == (True, tf32)
    assert (cudnn.benchmark, cudnn.allow_tf32) == before
