"""Providers of mmfuse: the public calls, with all their checks, for a named backend.

One function per case, named like the case.
"""

from __future__ import annotations

import torch
from _inputs import ALPHA, FeatureInputs, GradientInputs, LogitsInputs, ScoresInputs
from torch import Tensor

import mmfuse
from mmfuse import ops


def modality_scores(i: LogitsInputs, backend: str) -> Tensor:
    return ops.modality_scores(i.logits, i.labels, backend=backend).prob


def decision(i: LogitsInputs, backend: str) -> tuple[Tensor, Tensor]:
    scores = ops.modality_scores(i.logits, i.labels, backend=backend)
    rho = ops.discrepancy_ratios(scores.prob, backend=backend)
    return mmfuse.ogm_coefficients(rho, ALPHA, "cvpr"), rho


def discrepancy_ratios(i: ScoresInputs, backend: str) -> Tensor:
    return ops.discrepancy_ratios(i.scores, backend=backend)


def grad_stats(i: GradientInputs, backend: str) -> Tensor:
    return ops.grad_stats(i.grads, backend=backend).std


def grad_stats_anchors(i: GradientInputs, backend: str) -> tuple[Tensor, Tensor]:
    stats = ops.grad_stats(i.grads, i.params, i.anchors, backend=backend)
    return stats.dot, stats.sq_norm


def update_scale(i: GradientInputs, backend: str) -> None:
    ops.update_grads_(i.grads, i.scale, backend=backend)


def update_noise(i: GradientInputs, backend: str) -> None:
    ops.update_grads_(i.grads, i.scale, noise_std=i.noise_std, stream=i.stream, backend=backend)


def update_pull(i: GradientInputs, backend: str) -> None:
    ops.update_grads_(
        i.grads, i.ones, params=i.params, anchors=i.anchors, pull=i.pull, backend=backend
    )


def update_all(i: GradientInputs, backend: str) -> None:
    ops.update_grads_(
        i.grads,
        i.scale,
        params=i.params,
        anchors=i.anchors,
        pull=i.pull,
        noise_std=i.noise_std,
        stream=i.stream,
        backend=backend,
    )


def ogm_ge(i: GradientInputs, backend: str) -> None:
    std = ops.grad_stats(i.grads, backend=backend).std + 1e-8
    ops.update_grads_(i.grads, i.scale, noise_std=std, stream=i.stream, backend=backend)


def redreg(i: GradientInputs, backend: str) -> None:
    stats = ops.grad_stats(i.grads, i.params, i.anchors, backend=backend)
    scale = 1 - i.beta * stats.dot / (stats.sq_norm + 1e-12)
    ops.update_grads_(
        i.grads,
        scale,
        params=i.params,
        anchors=i.anchors,
        pull=i.beta.expand_as(scale),
        backend=backend,
    )


def scale_grad(i: FeatureInputs, backend: str) -> Tensor:
    out = ops.scale_grad(i.feature, i.coefficient, backend=backend)
    return torch.autograd.grad(out, i.feature, i.grad_output)[0]


def _step(i: GradientInputs, backend: str, *, noise: bool) -> None:
    method = i.cached(
        ("OGM", backend, noise),
        lambda: mmfuse.OGM(
            dict(zip("av", i.encoder_params, strict=True)),
            alpha=ALPHA,
            noise=noise,
            formula="cvpr",
            stream=i.stream,
            backend=backend,
        ),
    )
    method.step(dict(zip("av", i.head.logits, strict=True)), i.head.labels)


def ogm_step(i: GradientInputs, backend: str) -> None:
    _step(i, backend, noise=False)


def ogm_ge_step(i: GradientInputs, backend: str) -> None:
    _step(i, backend, noise=True)
