"""Derivatives beyond the first in reverse mode: those that an op has, and errors for the rest.

An op whose derivative were dropped in silence would train something else than the user has written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._eager import Formula, flat_gradients, layout_of, nested, tensors_in

#: No backend is one: backend="reference" is the same operator.
_WAY_OUT = 'write the plain PyTorch that its docstring has under "Equivalent to"'


def no_second_derivative(name: str) -> tuple[Formula, Formula]:
    """Formula and context of an operator that computes gradients and has no gradient of its own."""

    def formula(backend: str, ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"mmfuse.ops.{name} has no second derivative, in any backend; to have one, {_WAY_OUT}"
        )

    return formula, lambda ctx, inputs, output: None


def refuse_tangents(name: str, values: Sequence[object], *, written: bool = False) -> None:
    """Raises a NotImplementedError if a tensor in these values carries a tangent.

    Args:
        name: The op's public name.
        values: Arguments of the op.
        written: The op writes into these values, so that their tangents would not fit any more.
    """
    for value in values:
        for tensor in tensors_in(value):
            if forward_ad.unpack_dual(tensor).tangent is None:
                continue
            if not written:
                raise no_forward_mode(name)
            raise NotImplementedError(
                f"mmfuse.ops.{name} writes into tensors that carry a forward-mode tangent, and "
                "would leave it as it is; call it on their primals"
            )


def no_forward_mode(name: str) -> NotImplementedError:
    """The error of an op that gets a tangent."""
    return NotImplementedError(
        f"mmfuse.ops.{name} has no forward-mode derivative (torch.autograd.forward_ad, "
        f"torch.func.jvp); take the reverse mode, or {_WAY_OUT}"
    )


def no_vmap(name: str) -> NotImplementedError:
    """The error of an op under torch.func.vmap."""
    return NotImplementedError(
        f"mmfuse.ops.{name} does not go through torch.func.vmap; call it in a loop"
    )


def no_record(name: str) -> RuntimeError:
    """The error of an op that writes into tensors whose graph would not know of it."""
    return RuntimeError(
        f"mmfuse.ops.{name} writes into tensors that require a gradient, and autograd cannot "
        "record that; call it under torch.no_grad(), or on detached tensors"
    )


class _Recipe:
    """The arguments of a call beside its tensors; no container, which functorch would copy."""

    def __init__(
        self,
        name: str,
        overload: Callable[..., Any],
        args: tuple[Any, ...],
        formula: Formula,
        setup_context: Formula,
        backend: str,
    ) -> None:
        self.name, self.overload, self.backend = name, overload, backend
        self.formula, self.setup_context = formula, setup_context
        self.arguments = layout_of(args)
        self.others = [None if tensors_in(a) else a for a in args]
        self.results: list[tuple[int, bool]] = []
        self.one_result = False

    def args(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The call's arguments, with these tensors."""
        found = nested(tensors, self.arguments)
        return tuple(
            tensor if count else other
            for tensor, other, (count, _) in zip(found, self.others, self.arguments, strict=True)
        )

    def output(self, tensors: Sequence[Tensor]) -> Any:
        """The call's results, from the flat ones."""
        found = nested(tensors, self.results)
        return found[0] if self.one_result else tuple(found)


class _Transformed(torch.autograd.Function):
    """One call of an overload under torch.func: as `_eager._Call`, in the form that nests."""

    @staticmethod
    def forward(recipe: _Recipe, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output = recipe.overload(*recipe.args(tensors))
        recipe.one_result = not isinstance(output, tuple)
        results = [output] if recipe.one_result else list(output)
        recipe.results = layout_of(results)
        return tuple(t for r in results for t in tensors_in(r))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        recipe, *tensors = inputs
        ctx.recipe = recipe
        recipe.setup_context(ctx, recipe.args(tensors), recipe.output(output))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        recipe = ctx.recipe
        found = recipe.formula(recipe.backend, ctx, *nested(grads, recipe.results))
        return None, *flat_gradients(found, recipe.arguments)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise no_forward_mode(ctx.recipe.name)

    @staticmethod
    def vmap(info: Any, in_dims: Any, recipe: _Recipe, *tensors: Tensor) -> NoReturn:
        raise no_vmap(recipe.name)


def transformed_call(
    name: str,
    overload: Callable[..., Any],
    args: tuple[Any, ...],
    formula: Formula,
    setup_context: Formula,
    backend: str,
) -> Any:
    """Does as `differentiable_call`, under the transforms of torch.func; errors say `name`."""
    recipe = _Recipe(name, overload, args, formula, setup_context, backend)
    tensors = [t for a in args for t in tensors_in(a)]
    return recipe.output(_Transformed.apply(recipe, *tensors))
