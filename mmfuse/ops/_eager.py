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


class _Call(torch.autograd.Function):
    """One call of an overload. Its tensors come flat, since autograd sees no other."""

    @staticmethod
    def forward(
        ctx: Any,
        overload: Callable[..., Any],
        args: tuple[Any, ...],
        formula: Formula,
        setup_context: Formula,
        backend: str,
        results: list[Any],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*args)
        setup_context(ctx, args, output)
        results.extend(output if isinstance(output, tuple) else [output])
        ctx.formula, ctx.backend = formula, backend
        ctx.arguments, ctx.results = layout_of(args), layout_of(results)
        return tuple(t for r in results for t in tensors_in(r))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        found = ctx.formula(ctx.backend, ctx, *nested(grads, ctx.results))
        return (None,) * 6 + tuple(flat_gradients(found, ctx.arguments))


def flat_gradients(found: Any, arguments: Sequence[tuple[int, bool]]) -> list[Tensor | None]:
    """What a formula has returned, flat as the arguments' tensors are."""
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
    """Calls the overload; its results have gradients if an argument has.

    Args:
        overload: Of the op and `backend`.
        args: Its arguments: tensors, lists of tensors, anything else.
        formula: As `backward` in `torch.library.register_autograd`, after the backend's name.
        setup_context: As there.
        backend: Name of the overload.

    Returns:
        What the overload returns.
    """
    if not torch._C._any_requires_grad(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)
    tensors = [t for a in args for t in tensors_in(a)]
    results: list[Any] = []
    flat = _Call.apply(overload, args, formula, setup_context, backend, results, *tensors)
    found = nested(flat, layout_of(results))
    return found[0] if len(found) == 1 else tuple(found)
