"""Microbenchmarks: `pytest benchmarks/` times every op on every backend that runs here.

Small inputs, so that the reference keeps up; `run.py` measures at full size, against others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _information_inputs import TEMPERATURE, ContrastInputs, FusionInputs, ValueInputs
from _inputs import (
    ALPHA,
    SIGMA,
    DropInputs,
    FeatureInputs,
    GradientInputs,
    LogitsInputs,
    MapInputs,
    PairInputs,
    ScoresInputs,
    ViewInputs,
)
from _providers import why_no_backend
from _workloads import Workload

from mmfuse import ops
from mmfuse.ops._preference import PREFERENCE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((64, 64, 3, 3), (64,), (128, 64, 3, 3), (256, 128))

_gradients = Workload("gradients", "", encoders=(SHAPES, SHAPES))
_logits = Workload("logits", "", kind="logits", classes=309)
_scores = Workload("scores", "", kind="scores", modalities=3)
_feature = Workload("feature", "", kind="features")
_images = Workload("images", "", kind="inputs", shape=(16, 3, 32, 32))
_maps = Workload("maps", "", kind="representations", shape=(16, 512, 4, 4))
_values = Workload("values", "", kind="pairs", shape=(1, 2**15))
_samples = Workload("samples", "", kind="samples", shape=(256, 31), bins=10)
_fusion = Workload("fusion", "", kind="fusion")
_contrast = Workload("contrast", "", kind="contrast", batch=512)


def _modality_scores(backend: str) -> Callable[[], Any]:
    i = LogitsInputs(_logits, torch.float32, DEVICE)
    return lambda: ops.modality_scores(i.logits, i.labels, backend=backend)


def _discrepancy_ratios(backend: str) -> Callable[[], Any]:
    i = ScoresInputs(_scores, torch.float32, DEVICE)
    return lambda: ops.discrepancy_ratios(i.scores, backend=backend)


def _modulation_factors(backend: str) -> Callable[[], Any]:
    i = GradientInputs(_gradients, torch.float32, DEVICE)
    scores, stats = torch.rand(2, device=DEVICE), ops.grad_stats(i.grads, backend=backend)
    return lambda: ops.modulation_factors(
        scores, ALPHA, owner=i.modality, stats=stats, backend=backend
    )


def _grad_stats(backend: str) -> Callable[[], Any]:
    i = GradientInputs(_gradients, torch.float32, DEVICE)
    return lambda: ops.grad_stats(i.grads, backend=backend)


def _grad_stats_anchors(backend: str) -> Callable[[], Any]:
    i = GradientInputs(_gradients, torch.float32, DEVICE, anchored=True)
    return lambda: ops.grad_stats(i.grads, i.params, i.anchors, backend=backend)


def _update_scale(backend: str) -> Callable[[], Any]:
    i = GradientInputs(_gradients, torch.float32, DEVICE)
    scale = -i.ones  # keeps the magnitudes, however often it is applied
    return lambda: ops.update_grads_(i.grads, scale, backend=backend)


def _update_all(backend: str) -> Callable[[], Any]:
    i = GradientInputs(_gradients, torch.float32, DEVICE, anchored=True)
    vectors = {"pull": i.pull, "noise_std": i.noise_std, "stream": i.stream}
    # A scale below 1 forgets old noise and pulls.
    return lambda: ops.update_grads_(
        i.grads, i.scale, params=i.params, anchors=i.anchors, **vectors, backend=backend
    )


def _scale_grad(backend: str) -> Callable[[], Any]:
    i = FeatureInputs(_feature, torch.float32, DEVICE)

    def call() -> Any:
        out = ops.scale_grad(i.feature, i.coefficient, backend=backend)
        return torch.autograd.grad(out, i.feature, i.grad_output)

    return call


def _paired_cosine(backend: str) -> Callable[[], Any]:
    i = PairInputs(_feature, torch.float32, DEVICE)
    return lambda: ops.paired_cosine(*i.features, backend=backend)


def _paired_cosine_grad(backend: str) -> Callable[[], Any]:
    i = PairInputs(_feature, torch.float32, DEVICE)
    return lambda: torch.autograd.grad(ops.paired_cosine(*i.features, backend=backend), i.features)


def _gate(backend: str) -> Callable[[], Any]:
    i = PairInputs(_feature, torch.float32, DEVICE)
    return lambda: ops.co_information_gate(i.features, i.threshold, backend=backend)


def _noisy_views(backend: str) -> Callable[[], Any]:
    i = ViewInputs(_images, torch.float32, DEVICE)
    return lambda: ops.noisy_views(i.x, SIGMA, i.stream, backend=backend)


def _redundancy_ratio(backend: str) -> Callable[[], Any]:
    i = MapInputs(_maps, torch.float32, DEVICE)
    return lambda: ops.redundancy_ratio(i.z1, i.z2, i.input_sq, backend=backend)


def _drop_modalities(backend: str) -> Callable[[], Any]:
    i = DropInputs(_feature, torch.float32, DEVICE)
    return lambda: ops.drop_modalities(i.features, i.q, i.stream, backend=backend)


def _drop_modalities_grad(backend: str) -> Callable[[], Any]:
    i = DropInputs(_feature, torch.float32, DEVICE)

    def call() -> Any:
        out = ops.drop_modalities(i.features, i.q, i.stream, backend=backend).features
        return torch.autograd.grad(out, i.features, i.grad_outputs)

    return call


def _mutual_information(backend: str) -> Callable[[], Any]:
    i = ValueInputs(_values, torch.float32, DEVICE)
    return lambda: ops.mutual_information(i.x, i.y, i.bins, backend=backend)


def _sample_information(backend: str) -> Callable[[], Any]:
    i = ValueInputs(_samples, torch.float32, DEVICE)
    return lambda: ops.mutual_information(i.x, i.y, i.bins, backend=backend)


def _conditional_information(backend: str) -> Callable[[], Any]:
    i = FusionInputs(_fusion, torch.float32, DEVICE)
    rows = [feature.flatten() for feature in i.features]
    return lambda: ops.conditional_mutual_information(*rows, 2, backend=backend)


def _soft_information(backend: str) -> Callable[[], Any]:
    i = ValueInputs(_values, torch.float32, DEVICE)
    return lambda: ops.mutual_information(i.x, i.y, i.bins, "soft", backend=backend)


def _soft_information_grad(backend: str) -> Callable[[], Any]:
    i = ValueInputs(_values, torch.float32, DEVICE)

    def call() -> Any:
        mi = ops.mutual_information(i.x, i.y, i.bins, "soft", backend=backend).mi
        return torch.autograd.grad(mi, (i.x, i.y))

    return call


def _info_nce(backend: str) -> Callable[[], Any]:
    i = ContrastInputs(_contrast, torch.float32, DEVICE)
    return lambda: ops.info_nce(*i.features, TEMPERATURE, backend=backend)


def _info_nce_grad(backend: str) -> Callable[[], Any]:
    i = ContrastInputs(_contrast, torch.float32, DEVICE)

    def call() -> Any:
        bound = ops.info_nce(*i.features, TEMPERATURE, backend=backend)
        return torch.autograd.grad(bound, i.features)

    return call


# Name → what makes the call, and the op that a backend must have for it.
_CALLS = {
    "modality_scores": (_modality_scores, "modality_scores"),
    "discrepancy_ratios": (_discrepancy_ratios, "discrepancy_ratios"),
    "modulation_factors": (_modulation_factors, "modulation_factors"),
    "grad_stats": (_grad_stats, "grad_stats"),
    "grad_stats with anchors": (_grad_stats_anchors, "grad_stats"),
    "update_grads_ scale": (_update_scale, "update_grads_"),
    "update_grads_ scale, pull, noise": (_update_all, "update_grads_"),
    "scale_grad": (_scale_grad, "scale_grad_backward"),
    "paired_cosine": (_paired_cosine, "paired_cosine"),
    "paired_cosine: forward and backward": (_paired_cosine_grad, "paired_cosine_backward"),
    "co_information_gate": (_gate, "co_information_gate"),
    "noisy_views": (_noisy_views, "noisy_views"),
    "redundancy_ratio": (_redundancy_ratio, "redundancy_ratio"),
    "drop_modalities": (_drop_modalities, "drop_modalities"),
    "drop_modalities: forward and backward": (_drop_modalities_grad, "drop_modalities_backward"),
    "mutual_information": (_mutual_information, "joint_entropies"),
    "mutual_information of each sample": (_sample_information, "joint_entropies"),
    "conditional_mutual_information": (_conditional_information, "joint_entropies"),
    "mutual_information, soft": (_soft_information, "soft_histogram"),
    "mutual_information, soft: forward and backward": (
        _soft_information_grad,
        "soft_histogram_backward",
    ),
    "info_nce": (_info_nce, "info_nce"),
    "info_nce: forward and backward": (_info_nce_grad, "info_nce_backward"),
}


@pytest.mark.parametrize("backend", PREFERENCE[DEVICE.type])
@pytest.mark.parametrize("name", _CALLS)
def test_op(benchmark: Any, name: str, backend: str) -> None:
    make, op = _CALLS[name]
    reason = why_no_backend(backend, (op,), DEVICE)
    if reason is not None:
        pytest.skip(reason)
    benchmark.group = name
    call = make(backend)

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with torch.set_grad_enabled(op.endswith("_backward")):
        # A fixed count: calibration would give the reference a minute.
        benchmark.pedantic(finished, rounds=30, warmup_rounds=2)
