"""Eager calls without what PyTorch wraps around an op for torch.compile and other transforms.

Its wrapper around a registered gradient formula takes several times as long as the one here, for an
op with lists of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Formula = Callable[..., Any]


class Eager(str):
    """A backend's name, or "" for the best one, in eager calls that want no gradient.

    A training step looks once at how it runs; its ops then go straight to their kernels.
    """


def tensors_in(value: object) -> Sequence[Tensor]:
    """The tensors of one argument or result: itself, or a list's."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return value
    return ()


def layout_of(values: Sequence[object]) -> list[tuple[int, bool]]:
    """How many tensors each one has, and whether alone: a list is a list also with one."""
    return [(len(tensors_in(v)), isinstance(v, Tensor)) for v in values]


class _Started:
    """A call whose results autograd does not know yet. Nothing keeps it: it holds the results."""

    __slots__ = ("args", "arguments", "backend", "formula", "output", "overload", "setup_context")

    def __init__(
        self,
        overload: Callable[..., Any],
        args: tuple[Any, ...],
        arguments: list[tuple[int, bool]],
        formula: Formula,
        setup_context: Formula,
        backend: str,
    ) -> None:
        self.overload, self.args, self.backend = overload, args, backend
        self.formula, self.setup_context = formula, setup_context
        self.arguments = arguments
        self.output: Any = None


class _Call(torch.autograd.Function):
    """One call of an overload. Its tensors come flat, since autograd sees no other."""

    @staticmethod
    def forward(ctx: Any, call: _Started, *tensors: Tensor) -> tuple[Tensor, ...]:
        args = call.args
        with torch._C._AutoDispatchBelowAutograd():
            output = call.output = call.overload(*args)
        call.setup_context(ctx, args, output)
        ctx.formula, ctx.backend, ctx.arguments = call.formula, call.backend, call.arguments
        # Masks and counts have no gradient: kept out, they cost none that is made of zeros.
        constant, ctx.non_differentiable = [id(t) for t in ctx.non_differentiable or ()], None
        flat: list[Tensor] = []
        ctx.results = layout = []
        for result in output if isinstance(output, tuple) else (output,):
            own = [t for t in tensors_in(result) if t.is_floating_point() and id(t) not in constant]
            layout.append((len(own), bool(own) and own[0] is result))
            flat += own
        return tuple(flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        found = ctx.formula(ctx.backend, ctx, *nested(grads, ctx.results))
        return None, *flat_gradients(found, ctx.arguments)


def flat_gradients(found: Any, arguments: Sequence[tuple[int, bool]]) -> list[Tensor | None]:
    """The results of a formula, flat as the arguments' tensors are."""
    flat: list[Tensor | None] = []
    each = found if isinstance(found, tuple) else (found,)
    for grad, (count, alone) in zip(each, arguments, strict=True):
        if grad is None:
            flat.extend([None] * count)
        else:
            flat.extend([grad] if alone else grad)
    return flat


def nested(tensors: Sequence[Any], layout: Sequence[tuple[int, bool]]) -> list[Any]:
    """The flat tensors as they belong together: alone, or in lists."""
    left = iter(tensors)
    return [next(left) if alone else [next(left) for _ in range(count)] for count, alone in layout]


def differentiable_call(
    overload: Callable[..., Any],
    args: tuple[Any, ...],
    formula: Formula,
    setup_context: Formula,
    backend: str,
) -> Any:
    """Calls the overload, of which an argument requires a gradient.

    Args:
        overload: Of the op and `backend`, or the operator under it.
        args: Its arguments: tensors, lists of tensors, anything else.
        formula: As `backward` in `torch.library.register_autograd`, after the backend's name.
        setup_context: As there.
        backend: Name of the overload.

    Returns:
        The overload's result.
    """
    tensors: list[Tensor] = []
    layout = []
    for argument in args:
        own = tensors_in(argument)
        tensors += own
        layout.append((len(own), isinstance(argument, Tensor)))
    call = _Started(overload, args, layout, formula, setup_context, backend)
    # The results become part of the graph as they are, in place.
    _Call.apply(call, *tensors)
    return call.output
