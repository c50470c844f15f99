"""Provider `compile`: torch.compile of the reference, called as plain Python functions.

The functions on lists are compiled for one flat tensor of any length and called tensor by tensor:
unrolled over a whole list, the noise took Inductor 140 s for 10 tensors on two busy cores, and
these workloads have up to 1,000. One function per case, named like the case.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from _information_inputs import (
    CONDITIONAL_BINS,
    TEMPERATURE,
    ContrastInputs,
    FusionInputs,
    ValueInputs,
)
from _inputs import (
    ALPHA,
    SIGMA,
    DropInputs,
    GradientInputs,
    LogitsInputs,
    MapInputs,
    PairInputs,
    ScoresInputs,
    ViewInputs,
)
from torch import Tensor

from mmfuse import ogm_coefficients
from mmfuse.ops import GradStats
from mmfuse.reference import co_information_gate as reference_gate
from mmfuse.reference import discrepancy_ratios as reference_ratios
from mmfuse.reference import drop_modalities as reference_drop
from mmfuse.reference import grad_stats as reference_stats
from mmfuse.reference import info_nce as reference_nce
from mmfuse.reference import joint_entropies as reference_entropies
from mmfuse.reference import modality_scores as reference_scores
from mmfuse.reference import noise as reference_noise
from mmfuse.reference import paired_cosine as reference_cosine
from mmfuse.reference import redundancy_ratio as reference_redundancy
from mmfuse.reference import soft_histogram as reference_soft
from mmfuse.reference import update_grads as reference_update


def why_missing(device: torch.device) -> str | None:
    """The reason why torch.compile cannot run here, or None."""
    if device.type == "cpu":
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        return None if any(map(shutil.which, names)) else "torch.compile needs a C++ compiler"
    return None if importlib.util.find_spec("triton") else "torch.compile needs Triton"


def _compiled(*, dynamic: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    # The option makes the kernels on the CPU visible to the profiler, which counts them.
    options = {"cpp.enable_kernel_profile": True}
    return lambda function: torch.compile(
        function, fullgraph=True, dynamic=dynamic, options=options
    )


@_compiled(dynamic=False)
def _scores(logits: list[Tensor], labels: Tensor) -> Tensor:
    return reference_scores.modality_scores(logits, labels)[0]


@_compiled(dynamic=False)
def _decide(logits: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    prob, _ = reference_scores.modality_scores(logits, labels)
    rho = reference_ratios.discrepancy_ratios(prob)
    return ogm_coefficients(rho, ALPHA, "cvpr"), rho


@_compiled(dynamic=False)
def _ratios(scores: Tensor) -> Tensor:
    return reference_ratios.discrepancy_ratios(scores)


@_compiled(dynamic=True)
def _stats(*tensors: Tensor) -> GradStats:
    grad, *displaced = ([t] for t in tensors)
    numel, moments = reference_stats.grad_stats(grad, *(displaced or ([], [])))
    return GradStats(numel, *moments.unbind())


@_compiled(dynamic=True)
def _update(
    grad: Tensor,
    scale: Tensor,
    pull: tuple[Tensor, Tensor, Tensor] | None,
    noise: tuple[Tensor, Tensor, int] | None,
) -> None:
    weight, params, anchors = (pull[0], [pull[1]], [pull[2]]) if pull else (None, (), ())
    std, state, index = noise or (None, None, 0)
    reference_update.update_grads_(
        [grad], scale, params, anchors, weight, std, state, [index], [0], None, None
    )


@_compiled(dynamic=True)
def _scale_with_noise(grad: Tensor, scale: Tensor, state: Tensor, index: int) -> None:
    numel, moments = reference_stats.grad_stats([grad], [], [])
    std = GradStats(numel, *moments.unbind()).std + 1e-8
    reference_update.update_grads_(
        [grad], scale, [], [], None, std, state, [index], [0], None, None
    )


@_compiled(dynamic=True)
def _pull_with_trace(
    grad: Tensor, param: Tensor, anchor: Tensor, one: Tensor, weight: Tensor
) -> Tensor:
    square = torch.empty_like(one)
    reference_update.update_grads_(
        [grad], one, [param], [anchor], weight, None, None, [], [], None, square
    )
    return square


@_compiled(dynamic=True)
def _pull_orthogonally(grad: Tensor, param: Tensor, anchor: Tensor, beta: Tensor) -> None:
    numel, moments = reference_stats.grad_stats([grad], [param], [anchor])
    stats = GradStats(numel, *moments.unbind())
    scale = 1 - beta * stats.dot / (stats.sq_norm + 1e-12)
    reference_update.update_grads_(
        [grad], scale, [param], [anchor], beta.expand(1), None, None, [], [], None, None
    )


@_compiled(dynamic=False)
def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return reference_cosine.paired_cosine(a, b)


@_compiled(dynamic=False)
def _gate(a: Tensor, b: Tensor, threshold: Tensor) -> Tensor:
    return reference_gate.co_information_gate([a, b], threshold)


@_compiled(dynamic=True)
def _view(x: Tensor, state: Tensor, index: int) -> Tensor:
    z = reference_noise.standard_normal(state, x.numel(), index).view(x.shape)
    return (x + SIGMA * z).to(x.dtype)


@_compiled(dynamic=False)
def _redundancy(z1: Tensor, z2: Tensor, input_sq: Tensor) -> Tensor:
    return reference_redundancy.redundancy_ratio(z1, z2, input_sq)


@_compiled(dynamic=False)
def _distance(first: Tensor, second: Tensor) -> Tensor:
    return (first.float() - second.float()).square().mean()


@_compiled(dynamic=False)
def _drop(features: list[Tensor], q: Tensor, state: Tensor) -> list[Tensor]:
    ids = list(range(len(features)))
    return reference_drop.drop_modalities(features, q, state, ids, [0] * len(ids), None)[0]


@_compiled(dynamic=False)
def _shared(x: Tensor, y: Tensor, bins: int) -> tuple[Tensor, ...]:
    entropies, _ = reference_entropies.joint_entropies([x, y], [0, 1], 2, bins)
    h_x, h_y, h_xy = entropies[0].unbind(-1)
    mi = h_x + h_y - h_xy
    return mi, h_x, h_y, 2 * mi / (h_x + h_y)


@_compiled(dynamic=False)
def _arm(rows: list[Tensor], bins: int) -> Tensor:
    pairs, _ = reference_entropies.joint_entropies(rows, [0, 2, 1, 2], 2, bins)
    triple, _ = reference_entropies.joint_entropies(rows, [0, 1, 2], 3, CONDITIONAL_BINS)
    h_m, h_c, h_mc = pairs[:, 0].unbind(-1)
    h_a, h_v, h_av, _, h_ac, h_vc, h_avc = triple[0, 0].unbind(-1)
    given, with_c = torch.stack([h_v, h_a]), torch.stack([h_vc, h_ac])
    ncmi = 2 - 2 * (h_avc - given) / (h_av + with_c - 2 * given)
    return torch.cat([2 - 2 * h_mc / (h_m + h_c), ncmi])


@_compiled(dynamic=False)
def _soft(x: Tensor, y: Tensor, bins: int) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    wider = (v.to(wide) for v in (x, y))
    ranges = [torch.stack([v.amin(dim=1), v.amax(dim=1)], dim=1) for v in wider]
    p = reference_soft.soft_histogram(x, y, *ranges, bins) / x.shape[1]
    parts = [p.sum(2), p.sum(1), p.flatten(1)]
    least = torch.finfo(p.dtype).tiny
    h_x, h_y, h_xy = (torch.special.entr(q.clamp(min=least)).sum(1) for q in parts)
    return h_x + h_y - h_xy


@_compiled(dynamic=False)
def _contrast(a: Tensor, b: Tensor, temperature: Tensor) -> Tensor:
    return reference_nce.info_nce(a, b, temperature)[0]


def modality_scores(i: LogitsInputs) -> Tensor:
    return _scores(i.logits, i.labels)


def decision(i: LogitsInputs) -> tuple[Tensor, Tensor]:
    return _decide(i.logits, i.labels)


def discrepancy_ratios(i: ScoresInputs) -> Tensor:
    return _ratios(i.scores)


def grad_stats(i: GradientInputs) -> Tensor:
    return torch.cat([_stats(g).std for g in i.flat_grads])


def grad_stats_anchors(i: GradientInputs) -> tuple[Tensor, Tensor]:
    rows = zip(i.flat_grads, i.flat_params, i.flat_anchors, strict=True)
    stats = [_stats(*row) for row in rows]
    return torch.cat([s.dot for s in stats]), torch.cat([s.sq_norm for s in stats])


def _update_each(i: GradientInputs, *, pull: bool = False, noise: bool = False) -> None:
    scale, weights, stds = (v.split(1) for v in (i.scale, i.pull, i.noise_std))
    params, anchors = i.flat_params, i.flat_anchors
    for t, grad in enumerate(i.flat_grads):
        pulled = (weights[t], params[t], anchors[t]) if pull else None
        _update(grad, scale[t], pulled, (stds[t], i.state, t) if noise else None)


def update_scale(i: GradientInputs) -> None:
    _update_each(i)


def update_noise(i: GradientInputs) -> None:
    _update_each(i, noise=True)


def update_pull(i: GradientInputs) -> None:
    weights = i.pull.split(1)
    rows = zip(weights, i.flat_params, i.flat_anchors, strict=True)
    for grad, one, row in zip(i.flat_grads, i.ones.split(1), rows, strict=True):
        _update(grad, one, row, None)


def update_all(i: GradientInputs) -> None:
    _update_each(i, pull=True, noise=True)


def ogm_ge(i: GradientInputs) -> None:
    for t, (grad, scale) in enumerate(zip(i.flat_grads, i.scale.split(1), strict=True)):
        _scale_with_noise(grad, scale, i.state, t)


def inforeg(i: GradientInputs) -> Tensor:
    rows = zip(
        i.flat_grads, i.flat_params, i.flat_anchors, i.ones.split(1), i.pull.split(1), strict=True
    )
    return torch.cat([_pull_with_trace(*row) for row in rows])


def redreg(i: GradientInputs) -> None:
    rows = zip(i.flat_grads, i.flat_params, i.flat_anchors, strict=True)
    for row in rows:
        _pull_orthogonally(*row, i.beta)


def ogm_step(i: GradientInputs) -> None:
    coefficients, _ = decision(i.head)
    scale = coefficients[i.modality_index].split(1)
    for grad, factor in zip(i.flat_grads, scale, strict=True):
        _update(grad, factor, None, None)


def ogm_ge_step(i: GradientInputs) -> None:
    coefficients, _ = decision(i.head)
    scale = coefficients[i.modality_index].split(1)
    for t, (grad, factor) in enumerate(zip(i.flat_grads, scale, strict=True)):
        _scale_with_noise(grad, factor, i.state, t)


def paired_cosine(i: PairInputs) -> Tensor:
    return _cosine(*i.features)


def paired_cosine_grad(i: PairInputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_cosine(*i.features), i.features)


def gate(i: PairInputs) -> Tensor:
    return _gate(*i.features, i.threshold)


def noisy_views(i: ViewInputs) -> tuple[Tensor, Tensor, Tensor]:
    first, second = (_view(i.x, i.stream.state, index) for index in range(2))
    return first, second, _distance(first, second)


def redundancy_ratio(i: MapInputs) -> Tensor:
    return _redundancy(i.z1, i.z2, i.input_sq)


def drop_modalities(i: DropInputs) -> list[Tensor]:
    return _drop(i.features, i.q, i.stream.state)


def drop_modalities_grad(i: DropInputs) -> tuple[Tensor, ...]:
    out = drop_modalities(i)
    return *out, *torch.autograd.grad(out, i.features, i.grad_outputs)


def mutual_information(i: ValueInputs) -> tuple[Tensor, ...]:
    return _shared(i.x, i.y, i.bins)


def sample_information(i: ValueInputs) -> tuple[Tensor, ...]:
    return _shared(i.x, i.y, i.bins)


def arm_information(i: FusionInputs) -> Tensor:
    return _arm([feature.view(1, -1) for feature in i.features], i.bins)


def soft_information(i: ValueInputs) -> tuple[Tensor, ...]:
    mi = _soft(i.x, i.y, i.bins)
    return mi, *torch.autograd.grad(mi, (i.x, i.y))


def info_nce(i: ContrastInputs) -> tuple[Tensor, ...]:
    temperature = i.cached("temperature", lambda: torch.tensor(TEMPERATURE, device=i.device))
    bound = _contrast(*i.features, temperature)
    return bound, *torch.autograd.grad(bound, i.features)
