"""noisy_views: two noisy views of one input, from one read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._numbers import real
from ..noise import NoiseStream
from ._arguments import check_stream
from ._registry import Op
from ._tensors import why_unsupported


class NoisyViews(NamedTuple):
    """Two views of x and their distance.

    Attributes:
        first: x + σ·n₁, shape and dtype of x, contiguous.
        second: x + σ·n₂.
        input_sq: 0-d, mean over all elements of (first − second)²; float64 for float64, otherwise
            float32.
    """

    first: Tensor
    second: Tensor
    input_sq: Tensor


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    first = torch.empty_like(x, memory_format=torch.contiguous_format)
    return first, torch.empty_like(first), torch.empty((), dtype=dtype, device=x.device)


_op = Op(
    "noisy_views",
    "(Tensor x, float sigma, Tensor noise_state, int[] noise_ids, int[] noise_offsets) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _backward(
    backend: str, ctx: Any, first: Tensor | None, second: Tensor | None, _: Tensor | None
) -> Any:
    # x reaches both views unchanged, and their difference does not depend on it.
    present = [grad for grad in (first, second) if grad is not None]
    return (sum(present[1:], present[0]) if present else None), None, None, None, None


_op.register_autograd(_backward, _setup_context)


def noisy_views(
    x: Tensor, sigma: float, stream: NoiseStream, *, backend: str | None = None
) -> NoisyViews:
    """Two views x + σ·n₁ and x + σ·n₂ of an input, and how far apart they are.

    One read of x, two writes; the noise is made on the way. RedReg compares how far a
    representation moves between the views (see `redundancy_ratio`).

    Equivalent to::

        first, second = x + sigma * torch.randn_like(x), x + sigma * torch.randn_like(x)
        input_sq = (first - second).square().mean()

    Args:
        x: Any shape; float16, bfloat16, float32 or float64.
        sigma: Standard deviation σ of the noise, in units of x; at least 0 and finite.
        stream: The random stream. The views draw from its first and second id. The step is not
            advanced.
        backend: Name of a backend; None for the best one.

    Returns:
        `NoisyViews`; the views are differentiable in x. `input_sq` is NaN for an empty x.

    Raises:
        TypeError: x is sparse, integer or complex, or `stream` is no NoiseStream.
        ValueError: sigma is negative or not finite, or the stream is placed for another number of
            tensors than two.
    """
    reason = why_unsupported(x)
    if reason is not None:
        raise TypeError(f"x {reason}")
    check_stream(stream)
    if type(sigma) is not float:
        sigma = real("sigma", sigma)
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a finite number of at least 0, got {sigma}")
    ids, offsets = stream.counters(2)
    state = stream.state.to(x.device)
    return NoisyViews(*_op(backend, x.device, x.contiguous(), sigma, state, ids, offsets))
