"""soft_histogram: a joint histogram that has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._registry import Op
from ._tensors import promoted
from .joint_entropies import MAX_BINS, PAIRED, check_bins, check_not_empty


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(x: Tensor, y: Tensor, x_range: Tensor, y_range: Tensor, bins: int) -> Tensor:
    return torch.empty(x.shape[0], bins, bins, dtype=_wide(x), device=x.device)


def _fake_backward(
    grad: Tensor, x: Tensor, y: Tensor, x_range: Tensor, y_range: Tensor, bins: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ranges = torch.empty(x.shape[0], 2, dtype=_wide(x), device=x.device)
    return torch.empty_like(x), torch.empty_like(y), ranges, torch.empty_like(ranges)


_op = Op(
    "soft_histogram",
    "(Tensor x, Tensor y, Tensor x_range, Tensor y_range, int bins) -> Tensor",
    _fake,
)
_backward_op = Op(
    "soft_histogram_backward",
    "(Tensor grad, Tensor x, Tensor y, Tensor x_range, Tensor y_range, int bins) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    module="soft_histogram",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.bins = inputs
    ctx.save_for_backward(*tensors)


def _backward(backend: str, ctx: Any, grad: Tensor) -> Any:
    tensors = grad.contiguous(), *ctx.saved_tensors
    return *_backward_op(backend, grad.device, *tensors, ctx.bins), None


_op.register_autograd(_backward, _setup_context)
_backward_op.register_no_second_derivative()


def soft_histogram(x: Tensor, y: Tensor, bins: int, *, backend: str | None = None) -> Tensor:
    """Joint histogram with triangular bins: each sample goes to two neighbours in each dimension.

    With the bins' centres at lo + k·(hi − lo)/(bins − 1), k = 0 … bins − 1, over the row's own
    range, a value between two centres counts for both, in proportion to how near it is. The counts
    are therefore piecewise linear in x and y, and their gradients, those of lo and hi included,
    exact almost everywhere (Parzen windows of order one, as in image registration). There is no
    second derivative.

    Equivalent to::

        t = (x - lo) / (hi - lo) * (bins - 1)
        wx = (1 - (t[:, :, None] - torch.arange(bins)).abs()).clamp(min=0)   # and wy from y
        torch.einsum("pni,pnj->pij", wx, wy)

    Args:
        x: [P, N], P problems with N ≥ 1 values each; float16, bfloat16, float32 or float64.
        y: [P, N] on the same device. Mixed dtypes are promoted.
        bins: From 2 to 256.
        backend: Name of a backend; None for the best one.

    Returns:
        [P, bins, bins], float64 for float64, otherwise float32; the entries add up to N. NaN for a
        row that holds a value that is not finite, or whose range is too wide or too narrow for
        its dtype. The same bits each time in the cuda backend, where shares are added as integers;
        in triton the order in which a bin's shares are added on a GPU is not fixed.

    Raises:
        TypeError: x or y is sparse, integer or complex, or `bins` no integer.
        ValueError: they are not [P, N] of one shape on one device, or hold no values, or `bins` is
            out of range.
    """
    bins = check_bins(bins, MAX_BINS[2], 2)
    x, y = promoted(("x", "y"), (x, y), PAIRED, "[P, N]", 2)
    check_not_empty("x", x)
    # The gradients of x and of its range are added, which half precision has no room for.
    x, y = (v.to(_wide(v)).contiguous() for v in (x, y))
    weights: Tensor = _op(backend, x.device, x, y, _range_of(x), _range_of(y), bins)
    return weights


def _range_of(x: Tensor) -> Tensor:
    """[P, 2] ends of each row's range; constant rows are at the first of the bins' centres.

    In the middle of a widened range they would lie between two centres, for an even number of bins,
    and have the entropy ln 2 of two values.
    """
    # PyTorch 2.11 has no gradient for aminmax.
    low, high = x.amin(dim=1), x.amax(dim=1)
    least = (low.detach().abs() * (4 * torch.finfo(x.dtype).eps)).clamp(min=0.5)
    return torch.stack([low, high + torch.where(low == high, 2 * least, 0.0)], dim=1)
