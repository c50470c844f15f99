"""paired_cosine: how alike two batches of features are, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._registry import Op
from ._tensors import promoted


def _fake(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return torch.empty((), dtype=dtype, device=a.device)


def _fake_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b)


_op = Op("paired_cosine", "(Tensor a, Tensor b) -> Tensor", _fake)
_backward_op = Op(
    "paired_cosine_backward",
    "(Tensor grad, Tensor a, Tensor b) -> (Tensor, Tensor)",
    _fake_backward,
    module="paired_cosine",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(backend: str, ctx: Any, grad: Tensor) -> Any:
    return _backward_op(backend, grad.device, grad, *ctx.saved_tensors)


_op.register_autograd(_backward, _setup_context)
_backward_op.register_no_second_derivative()


def paired_cosine(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean over the rows of cos(a_i, b_i), without the B × B product of all rows with all rows.

    One read of both; the released code of RedReg multiplies every row with every row and takes
    the diagonal. Differentiable once, in one read and one write more.

    Equivalent to ``(F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).mean()``.

    Args:
        a: [B, D]; float16, bfloat16, float32 or float64.
        b: [B, D], on the same device. Mixed dtypes are promoted.
        backend: Name of a backend; None for the best one.

    Returns:
        0-d in [−1, 1], float64 for float64, otherwise float32. A zero row has cosine 0 and gradient
        0; B = 0 gives NaN. Squared norms must stay within the accumulator's range (1e38 for
        float32); beyond it they count as infinite.

    Raises:
        TypeError: a or b is sparse, integer or complex.
        ValueError: they are not [B, D] of one shape on one device.
    """
    a, b = aligned(("a", "b"), (a, b))
    cosine: Tensor = _op(backend, a.device, a, b)
    return cosine


def aligned(names: Sequence[str], features: Sequence[Tensor]) -> list[Tensor]:
    """Checks that features can be compared row by row; returns them contiguous, of one dtype.

    Raises:
        TypeError: one of them is sparse, integer or complex.
        ValueError: they are not [B, D] of one shape on one device.
    """
    why = "features are compared row by row"
    return [f.contiguous() for f in promoted(names, features, why, "[B, D]", 2)]
