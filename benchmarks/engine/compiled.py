"""torch.compile of the reference, called as plain Python functions.

Functions on lists are compiled for one flat tensor of any length and called tensor by tensor:
unrolled over a whole list, the noise took Inductor 140 s for 10 tensors on two busy cores, and
these workloads have up to 1,000.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfuse.ops import GradStats
from mmfuse.reference import grad_stats as reference_stats
from mmfuse.reference import update_grads as reference_update

from .gradients import GradientInputs


def why_missing(device: torch.device) -> str | None:
    """The reason why torch.compile cannot run here, or None."""
    if device.type == "cpu":
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        return None if any(map(shutil.which, names)) else "torch.compile needs a C++ compiler"
    return None if importlib.util.find_spec("triton") else "torch.compile needs Triton"


def compiled(*, dynamic: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    # The option makes the kernels on the CPU visible to the profiler, which counts them.
    options = {"cpp.enable_kernel_profile": True}
    return lambda function: torch.compile(
        function, fullgraph=True, dynamic=dynamic, options=options
    )


@compiled(dynamic=True)
def stats_of(*tensors: Tensor) -> GradStats:
    """Statistics of one gradient, or of one with its parameter and anchor."""
    grad, *displaced = ([t] for t in tensors)
    numel, moments = reference_stats.grad_stats(grad, *(displaced or ([], [])))
    return GradStats(numel, *moments.unbind())


@compiled(dynamic=True)
def update(
    grad: Tensor,
    scale: Tensor,
    pull: tuple[Tensor, Tensor, Tensor] | None,
    noise: tuple[Tensor, Tensor, int] | None,
) -> None:
    """One gradient; `pull` is its strength, parameter and anchor, `noise` σ, state and index."""
    weight, params, anchors = (pull[0], [pull[1]], [pull[2]]) if pull else (None, (), ())
    std, state, index = noise or (None, None, 0)
    reference_update.update_grads_(
        [grad], scale, params, anchors, weight, std, state, [index], [0], None, None
    )


@compiled(dynamic=True)
def scale_with_noise(grad: Tensor, scale: Tensor, state: Tensor, index: int) -> None:
    """One gradient, with noise as wide as it is."""
    numel, moments = reference_stats.grad_stats([grad], [], [])
    std = GradStats(numel, *moments.unbind()).std + 1e-8
    reference_update.update_grads_(
        [grad], scale, [], [], None, std, state, [index], [0], None, None
    )


def scale_all_with_noise(i: GradientInputs, scale: Tensor) -> None:
    """Tensor by tensor; `scale` is [T]."""
    for t, (grad, factor) in enumerate(zip(i.flat_grads, scale.split(1), strict=True)):
        scale_with_noise(grad, factor, i.state, t)
