"""Workloads and cases: sizes, bytes that must move, and what a selection leaves."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from benchmarked import (
    CLIPS,
    CPU,
    TINY,
    inputs_of,
)
from cases import (
    CASES,
    WORKLOADS,
)
from cases.modulation_factors import exact_decision
from engine.gradients import GradientInputs
from engine.networks import ResNet18
from engine.session import bytes_needed


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
        # Of one modality half the rows are dropped: they are written, not read.
        ("drop_modalities", 3.5),
        ("drop_modalities_grad", 7),
        ("mutual_information", 4),
        ("soft_information", 6),
        ("sample_information", 2),
        ("arm_information", 3),
        ("info_nce", 0),
    ],
)
def test_operands_of_what_is_no_gradient(name: str, operands: float) -> None:
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
