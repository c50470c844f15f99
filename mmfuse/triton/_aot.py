"""How kernels are compiled, at a launch or ahead of time without a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

# Said aloud, because Triton's default depends on its version.
COMPILE_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


class AotSpec(NamedTuple):
    """One variant of a kernel, as its launcher would ask for it.

    Attributes:
        kernel: The @triton.jit function.
        label: What sets this variant apart, e.g. its dtypes.
        types: Type of each run-time argument in Triton's notation; pointers that end in a ``!``
            are multiples of 16 bytes. A tuple argument has a tuple of types.
        constants: Value of each tl.constexpr argument, and None for absent pointers.
        num_warps: Warps per program.
    """

    kernel: Any
    label: str
    types: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
