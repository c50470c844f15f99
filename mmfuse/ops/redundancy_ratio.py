"""redundancy_ratio: how far a representation moves when its input moves a little."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.redundancy_ratio import EPS
from ._registry import Op
from ._tensors import check_dense, same_dense_format, why_unsupported


def _fake(z1: Tensor, z2: Tensor, input_sq: Tensor) -> Tensor:
    dtype = torch.float64 if z1.dtype == torch.float64 else torch.float32
    return torch.empty((), dtype=dtype, device=z1.device)


_op = Op("redundancy_ratio", "(Tensor z1, Tensor z2, Tensor input_sq) -> Tensor", _fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(backend: str, ctx: Any, grad: Tensor) -> Any:
    z1, z2, input_sq, ratio = ctx.saved_tensors
    scale = grad / (input_sq + EPS)
    # The product is in the accumulator's precision and range, and rounded once.
    grad_z = (z1.to(scale) - z2.to(scale)) * (2.0 * scale / max(1, z1.numel()))
    return grad_z.to(z1.dtype), -grad_z.to(z1.dtype), -scale * ratio


_op.register_autograd(_backward, _setup_context)


def redundancy_ratio(
    z1: Tensor, z2: Tensor, input_sq: Tensor, *, backend: str | None = None
) -> Tensor:
    """Mean (z₁ − z₂)² over mean (x₁ − x₂)²: RedReg's redundancy of a representation.

    One read of both representations, no intermediate tensor. Differentiable.

    Equivalent to ``(z1 - z2).square().mean() / (input_sq + 1e-12)``.

    Args:
        z1: Representation of the first view, any shape; float16, bfloat16, float32 or float64.
        z2: Representation of the second view, like `z1`.
        input_sq: 0-d floating tensor on the same device: `NoisyViews.input_sq`.
        backend: Name of a backend; None for the best one.

    Returns:
        0-d, float64 for float64, otherwise float32. NaN for empty representations.

    Raises:
        TypeError: z1 or z2 is sparse, integer or complex, or they differ in dtype; `input_sq` is
            not floating.
        ValueError: shapes or devices do not match.
    """
    for name, z in (("z1", z1), ("z2", z2)):
        reason = why_unsupported(z)
        if reason is not None:
            raise TypeError(f"{name} {reason}")
    if z1.dtype != z2.dtype:
        raise TypeError(f"z1 has dtype {z1.dtype}, z2 {z2.dtype}")
    if not isinstance(input_sq, Tensor) or not input_sq.is_floating_point():
        raise TypeError("input_sq must be a 0-d floating-point tensor")
    check_dense("input_sq", input_sq)
    if z1.shape != z2.shape:
        raise ValueError(f"z1 has shape {list(z1.shape)}, z2 {list(z2.shape)}")
    if input_sq.dim() != 0:
        raise ValueError(f"input_sq must be 0-d, got shape {list(input_sq.shape)}")
    for name, tensor in (("z2", z2), ("input_sq", input_sq)):
        if tensor.device != z1.device:
            raise ValueError(f"{name} is on {tensor.device}, z1 on {z1.device}")
    if not (z1.is_contiguous() and z2.is_contiguous()):
        # A sum does not mind the order: channels_last is read as it lies, if both are.
        if same_dense_format([z1, z2]):
            z1, z2 = (z.as_strided((z.numel(),), (1,)) for z in (z1, z2))
        else:
            z1, z2 = z1.contiguous(), z2.contiguous()
    wide = torch.float64 if z1.dtype == torch.float64 else torch.float32
    ratio: Tensor = _op(backend, z1.device, z1, z2, input_sq.to(wide))
    return ratio
