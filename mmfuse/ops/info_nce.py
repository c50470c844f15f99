"""info_nce: a differentiable lower bound of the mutual information of two batches of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._numbers import real
from ._arguments import check_near, is_single
from ._registry import Op
from .paired_cosine import aligned


def _fake(a: Tensor, b: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.empty(a.shape[0], dtype=temperature.dtype, device=a.device)
    return torch.empty_like(temperature), rows, torch.empty_like(rows)


def _fake_backward(
    grad: Tensor, a: Tensor, b: Tensor, temperature: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b), torch.empty_like(temperature)


_op = Op("info_nce", "(Tensor a, Tensor b, Tensor temperature) -> (Tensor, Tensor, Tensor)", _fake)
_backward_op = Op(
    "info_nce_backward",
    "(Tensor grad, Tensor a, Tensor b, Tensor temperature, Tensor rows, Tensor columns) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
    module="info_nce",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, rows, columns = output
    ctx.mark_non_differentiable(rows, columns)
    ctx.save_for_backward(*inputs, rows, columns)


def _backward(backend: str, ctx: Any, grad: Tensor, *_: Tensor) -> Any:
    return _backward_op(backend, grad.device, grad, *ctx.saved_tensors)


_op.register_autograd(_backward, _setup_context)
_backward_op.register_no_second_derivative()


def info_nce(
    a: Tensor, b: Tensor, temperature: float | Tensor = 0.1, *, backend: str | None = None
) -> Tensor:
    """InfoNCE: a lower bound of I(a; b), from telling each row's partner from the other rows.

    With similarities S = a·bᵀ/τ, the mean of both directions (van den Oord, Li & Vinyals 2018; as
    a bound, Poole et al., ICML 2019, Eq. 12)::

        log B + mean_i (S_ii − (log Σ_j exp S_ij + log Σ_j exp S_ji) / 2)

    It cannot exceed log B, however much the features share. The B × B similarities are never held:
    they are formed tile by tile with a running log-sum-exp, and formed again for the gradient.
    On CUDA GPUs features in half precision are multiplied as they are, with float32 sums, and the
    similarities are float32; slopes go into the gradients' products as two halves each.

    Equivalent to::

        s = a @ b.T / temperature
        i = torch.arange(B)
        math.log(B) - (F.cross_entropy(s, i) + F.cross_entropy(s.T, i)) / 2

    Args:
        a: [B, D] features; float16, bfloat16, float32 or float64. For cosine similarities
            normalise them first: ``F.normalize(a, dim=1)``.
        b: [B, D], on the same device. Mixed dtypes are promoted.
        temperature: τ > 0, a number or a 0-d tensor (a learned one gets its gradient).
        backend: Name of a backend; None for the best one.

    Returns:
        0-d, in nats; float64 for float64, otherwise float32. Differentiable once, in a, b and
        the temperature. NaN if a similarity is.

    Raises:
        TypeError: a or b is sparse, integer or complex.
        ValueError: they are not [B, D] of one shape on one device, B is 0, or the temperature is
            not a positive number or no 0-d tensor. The value of a tensor is not looked at.
    """
    a, b = aligned(("a", "b"), (a, b))
    if a.shape[0] == 0:
        raise ValueError("a and b are empty; there are no rows to tell apart")
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        if not is_single(temperature):
            raise ValueError(
                "temperature must be a number or a dense 0-d floating-point tensor, got "
                f"{temperature.dtype} {list(temperature.shape)}, {temperature.layout}"
            )
        check_near("temperature", temperature, a.device)
        temperature = temperature.to(a.device, wide)
    else:
        temperature = real("temperature", temperature)
        if not 0 < temperature <= torch.finfo(wide).max:
            raise ValueError(f"temperature must be a positive number, got {temperature}")
        temperature = torch.full((), temperature, dtype=wide, device=a.device)
    bound: Tensor = _op(backend, a.device, a, b, temperature)[0]
    return bound
