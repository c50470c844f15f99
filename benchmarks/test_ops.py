"""Microbenchmarks: `pytest benchmarks/` times every op on every backend that runs here.

Small inputs, so that the reference keeps up; `run.py` measures at full size, against others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _inputs import FeatureInputs, GradientInputs, LogitsInputs, ScoresInputs
from _providers import why_no_backend
from _workloads import Workload

from mmfuse import ops
from mmfuse.ops._registry import PREFERENCE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((64, 64, 3, 3), (64,), (128, 64, 3, 3), (256, 128))

_gradients = Workload("gradients", "", encoders=(SHAPES, SHAPES))
_logits = Workload("logits", "", kind="logits", classes=309)
_scores = Workload("scores", "", kind="scores", modalities=3)
_feature = Workload("feature", "", kind="features")


def _modality_scores(backend: str) -> Callable[[], Any]:
    i = LogitsInputs(_logits, torch.float32, DEVICE)
    return lambda: ops.modality_scores(i.logits, i.labels, backend=backend)


def _discrepancy_ratios(backend: str) -> Callable[[], Any]:
    i = ScoresInputs(_scores, torch.float32, DEVICE)
    return lambda: ops.discrepancy_ratios(i.scores, backend=backend)


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


# Name → what makes the call, and the op that a backend must have for it.
_CALLS = {
    "modality_scores": (_modality_scores, "modality_scores"),
    "discrepancy_ratios": (_discrepancy_ratios, "discrepancy_ratios"),
    "grad_stats": (_grad_stats, "grad_stats"),
    "grad_stats with anchors": (_grad_stats_anchors, "grad_stats"),
    "update_grads_ scale": (_update_scale, "update_grads_"),
    "update_grads_ scale, pull, noise": (_update_all, "update_grads_"),
    "scale_grad": (_scale_grad, "scale_grad_backward"),
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

    with torch.set_grad_enabled(name == "scale_grad"):
        # A fixed count: calibration would give the reference a minute.
        benchmark.pedantic(finished, rounds=30, warmup_rounds=2)
