"""scale_grad: modulation at a feature, in the backward pass, instead of over the parameters."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..noise import NoiseStream
from ._arguments import check_stream
from ._derivatives import no_forward_mode, no_vmap, refuse_tangents
from ._registry import Op
from ._tensors import check_dense, why_unsupported


def _fake(grad: Tensor, coefficient: Tensor, *_: object) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


_op = Op(
    "scale_grad_backward",
    "(Tensor grad, Tensor coefficient, Tensor? noise_std, Tensor? noise_state, int noise_id, "
    "int noise_offset) -> Tensor",
    _fake,
    module="scale_grad",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _double_backward(backend: str, ctx: Any, grad: Tensor) -> Any:
    (coefficient,) = ctx.saved_tensors
    scaled = _op(backend, grad.device, grad.contiguous(), coefficient, None, None, 0, 0)
    return scaled, None, None, None, None, None


# The noise does not depend on the gradient, so that the derivative is the coefficient alone.
_op.register_autograd(_double_backward, _setup_context)


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coefficient: Tensor,
        noise_std: Tensor | None,
        noise_state: Tensor | None,
        noise_id: int,
        noise_offset: int,
        backend: str | None,
    ) -> Tensor:
        ctx.save_for_backward(coefficient, noise_std, noise_state)
        ctx.place = (noise_id, noise_offset)
        ctx.backend = backend
        # A copy: autograd refuses to have a view that a function returns changed in place.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].contiguous()
        scaled = _op(ctx.backend, grad.device, grad, *ctx.saved_tensors, *ctx.place)
        return scaled, None, None, None, None, None, None


class _Transformed(torch.autograd.Function):
    """The same under torch.func; elsewhere this form takes three times as long."""

    @staticmethod
    def forward(x: Tensor, *_: Any) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _ScaleGrad.forward(ctx, *inputs)

    backward = _ScaleGrad.backward

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise no_forward_mode("scale_grad")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> NoReturn:
        raise no_vmap("scale_grad")


def scale_grad(
    x: Tensor,
    coefficient: Tensor,
    *,
    noise_std: Tensor | None = None,
    stream: NoiseStream | None = None,
    backend: str | None = None,
) -> Tensor:
    """Returns x; its backward pass multiplies the gradient by `coefficient`, and can add noise.

    Applied to an encoder's output feature it scales the gradient of all the encoder's parameters
    at once, because back-propagation is linear in the gradient that enters: OGM (without GE) then
    costs nothing but this.

    Equivalent to ``x.register_hook(lambda g: coefficient * g + noise_std * torch.randn_like(g))``.

    Args:
        x: Any shape; float16, bfloat16, float32 or float64.
        coefficient: 0-d floating tensor on x's device.
        noise_std: 0-d floating tensor: standard deviation of the added noise, in units of the
            gradient.
        stream: The random stream; needed with `noise_std`. For several features in one step give
            each its own id, ``stream.place([m])``.
        backend: Name of a backend; None for the best one.

    Returns:
        A copy of x, which may be changed in place. It is not differentiable in the coefficient.

    Raises:
        TypeError: x is sparse, integer or complex, or a coefficient is not a floating tensor.
        ValueError: a coefficient is not 0-d or on another device; noise_std without a stream.
    """
    reason = why_unsupported(x)
    if reason is not None:
        raise TypeError(f"x {reason}")
    if (noise_std is None) != (stream is None):
        raise ValueError("noise_std needs a stream (mmfuse.NoiseStream), and a stream needs it")
    if stream is not None:
        check_stream(stream)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    values: list[Tensor | None] = []
    for name, value in (("coefficient", coefficient), ("noise_std", noise_std)):
        if value is None:
            values.append(None)
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a 0-d floating-point tensor")
        check_dense(name, value)
        if value.dim() != 0:
            raise ValueError(f"{name} must be 0-d, got shape {list(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, x on {x.device}")
        if value.dtype is not dtype or value.requires_grad:
            value = value.detach().to(dtype)
        values.append(value)
    ids, offsets = stream.counters(1) if stream is not None else ([0], [0])
    state = None
    if stream is not None:
        # A copy: the backward pass may run after the stream has moved on.
        state = stream.state.to(x.device, copy=True)
    function: type[torch.autograd.Function] = _ScaleGrad
    chosen = backend  # compiled, the graph of the backward pass chooses: it knows no result of ours
    if not torch.compiler.is_compiling():
        chosen = _op.resolve(backend, x.device)
        if torch._C._are_functorch_transforms_active():
            function = _Transformed
        elif forward_ad._current_level >= 0:
            # The tangent of x, or k times it? Forward and reverse mode would differ.
            refuse_tangents("scale_grad", [x])
    result: Tensor = function.apply(x, values[0], values[1], state, ids[0], offsets[0], chosen)
    return result
