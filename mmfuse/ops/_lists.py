"""Lists of plain tensors, read in one call of `mmfuse._C`: kernels then get a table in their place.

A long list costs more in checks in Python and in PyTorch's dispatcher than in a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _native
from ._eager import Eager
from ._registry import Op


class Listed(NamedTuple):
    """Lists as a table, and the op's kernel that takes one."""

    kernel: Callable[..., Any]
    #: They have to live as long as the table is used.
    lists: list[list[Tensor]]
    table: Tensor
    #: Of the vectors beside it: float64 if a gradient is, else float32.
    dtype: torch.dtype


def read_lists(
    op: Op,
    backend: str | None,
    grads: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    anchors: Sequence[Tensor] | None,
    apart: bool = False,
) -> Listed | None:
    """Reads the lists of an eager call; None wherever one of them is anything else than usual.

    Usual are dense tensors of floating dtypes on one device, params and anchors in the order of
    their gradients. With `apart` no gradient may share memory with another tensor. Nobody else may
    have to see them, such as a mode or a transform of PyTorch.
    """
    if (
        _native.read_list is None
        or _native.read_apart is None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or (backend == "" and type(backend) is not Eager)  # which is nobody's name
        or (params is None and anchors is not None)
        or not isinstance(grads, (list, tuple))
        or len(grads) == 0
        or type(grads[0]) is not Tensor
    ):
        return None
    kernel = op.of_table(Eager(backend or ""), grads[0].device)
    if kernel is None:
        return None
    given = [row for row in (grads, params, anchors) if row is not None]
    if False in [isinstance(row, (list, tuple)) for row in given]:
        return None
    lists = [list(row) for row in given]
    read = _native.read_apart if apart else _native.read_list
    found = read(*lists)
    if found is None:
        return None
    wide, table = found
    return Listed(kernel, lists, table, torch.float64 if wide else torch.float32)


def is_vector(value: object, length: int, *dtypes: torch.dtype) -> bool:
    """True for a plain dense tensor [length] of a floating dtype, or of one of these."""
    return (
        type(value) is Tensor
        and (value.dtype in dtypes if dtypes else value.is_floating_point())
        and value.layout is torch.strided
        and value.shape == (length,)
        and not value.is_meta
    )
