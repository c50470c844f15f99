"""soft_entropies: entropies of a soft histogram, from the values in one call, with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._registry import Op


def _fake(
    x: Tensor, y: Tensor, bins: int, present: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = x.new_empty(x.shape[0], bins, bins)
    ranges = x.new_empty(x.shape[0], 2)
    return x.new_empty(x.shape[0], 3), weights, ranges, torch.empty_like(ranges)


def _fake_backward(grad: Tensor, x: Tensor, y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(y)


# A user who asks for the second derivative has called mutual_information.
_op = Op(
    "soft_entropies",
    "(Tensor x, Tensor y, int bins, Tensor? present=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    public="mutual_information",
)
_backward_op = Op(
    "soft_entropies_backward",
    "(Tensor grad, Tensor x, Tensor y, Tensor weights, Tensor x_range, Tensor y_range, "
    "Tensor? present=None) -> (Tensor, Tensor)",
    _fake_backward,
    module="soft_entropies",
    public="mutual_information",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # The dispatcher leaves a mask out that is None.
    x, y, _, *present = inputs
    ctx.constants = len(inputs) - 2
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, y, *output[1:], *present)


def _backward(backend: str, ctx: Any, grad: Tensor, *_: Tensor) -> Any:
    found = _backward_op(backend, grad.device, grad.contiguous(), *ctx.saved_tensors)
    return *found, *[None] * ctx.constants


_op.register_autograd(_backward, _setup_context)
_backward_op.register_no_second_derivative()


def soft_entropies(
    x: Tensor, y: Tensor, bins: int, backend: str | None, present: Tensor | None = None
) -> Tensor:
    """H(x), H(y) and H(x, y) of `soft_histogram`, [P, 3]; for values that are checked.

    The ranges, the histogram and the entropies are one operator, and their gradient another: in
    PyTorch they were some 60 operators on a few numbers. An empty cell's −p log p has an infinite
    slope at 0; it gets that of the smallest normal number instead.

    Args:
        x: [P, N], N ≥ 1; any floating-point dtype.
        y: [P, N] of the same dtype, on the same device.
        bins: From 2 to 256.
        backend: Name of a backend; None for the best one.
        present: [P, N] bool; samples that are absent do not enter ranges, sums and counts, whatever
            their values are. None for all.

    Returns:
        [P, 3] in nats, float64 for float64, otherwise float32; NaN where the histogram is, or no
        sample counts. Differentiable once; the gradient of a sample that is left out is 0.
    """
    # The gradients of x and of its range are added, which half precision has no room for.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mask = () if present is None else (present.contiguous(),)
    pairs = x.to(wide).contiguous(), y.to(wide).contiguous()
    entropies: Tensor = _op(backend, x.device, *pairs, bins, *mask)[0]
    return entropies
