"""The kernels that Triton would compile on a GPU for the ops' samples; needs no GPU.

Instead of being launched a kernel is noted, with what Triton's own launcher makes of its arguments:
types, constants, and which addresses and numbers the compiler may take for multiples of 16. Results
hold whatever their memory held before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import samples
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from mmfuse import ops
from mmfuse.ops import _registry

# The launcher's part is the same for every generation of GPUs.
_BACKEND = make_backend(GPUTarget("cuda", 90, 32))


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled for some launches.

    Attributes:
        op: Whose samples launch it.
        kernel: The @triton.jit function.
        signature: The type of each argument; constants are "constexpr".
        constants: Values, by the position of the argument.
        attributes: The facts that the compiler may rely on, by the position of the argument.
        options: Keywords of `triton.compile`.
    """

    op: str
    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for variants that are compiled alike."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return self.kernel.__name__, *map(repr, parts)

    @property
    def label(self) -> str:
        """The types of what it reads and writes, and its constants."""
        kinds = [kind for kind in self.signature.values() if kind != "constexpr"]
        named = zip(self.kernel.arg_names, range(len(self.kernel.arg_names)), strict=True)
        values = [f"{n}={self.constants[(i,)]}" for n, i in named if (i,) in self.constants]
        return " ".join([*map(_short, kinds), *values])

    def source(self) -> ASTSource:
        """The source as the launcher hands it to the compiler."""
        return ASTSource(
            self.kernel, dict(self.signature), dict(self.constants), dict(self.attributes)
        )


def _short(kind: Any) -> str:
    if not isinstance(kind, tuple):
        return str(kind)
    return f"({' '.join(map(_short, kind))})"


@contextmanager
def noted(op: str, found: dict[tuple[Any, ...], Variant]) -> Iterator[None]:
    """Adds the variants that are launched in the block."""
    binders: dict[Any, Any] = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if kernel not in binders:
            signature, parameters = kernel.signature, kernel.params
            binders[kernel] = create_function_from_signature(signature, parameters, _BACKEND)
        options = {name: x for name, x in kwargs.items() if name not in kernel.arg_names}
        kwargs = {"debug": False, **kwargs}
        bound, specialization, rest = binders[kernel](*args, **kwargs)
        _, types, constants, attributes = kernel._pack_args(
            _BACKEND, kwargs, bound, specialization, rest
        )
        variant = Variant(op, kernel, types, constants, attributes, options)
        found.setdefault(variant.key, variant)

    with (
        mock.patch.object(JITFunction, "run", run),
        # The tensors are on the CPU, where only the interpreter would take them.
        mock.patch.object(_registry, "_why_not_triton", return_value=None),
        ops.use_backend("triton"),
    ):
        yield


def variants() -> list[Variant]:
    """The variants of all ops, once each: those that `compiled` launches, or else `case`."""
    found: dict[tuple[Any, ...], Variant] = {}
    for op, module in samples.MODULES.items():
        inputs = samples.Inputs("cpu", "triton")
        inputs.interpreted = False
        with noted(op, found):
            getattr(module, "compiled", module.case)(inputs)
    return list(found.values())
