"""Lists of tensors that are written to, no two of which may share memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ._tensors import is_dense


class _Stretch(NamedTuple):
    """The memory of a tensor, as addresses."""

    begin: int
    end: int
    name: str


def check_apart(
    grads: Sequence[Tensor], params: Sequence[Tensor], anchors: Sequence[Tensor]
) -> None:
    """Raises a ValueError for a gradient that shares memory with another tensor of the lists.

    One thread would write to it while another one reads it. A parameter or an anchor may be its
    gradient itself. Of a tensor with gaps only the first element is looked at, since views may lie
    between each other's elements.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    written = sorted(_stretches("grads", grads))
    for one, other in pairwise(written):
        if other.begin < one.end:
            raise _shared(one, other)
    for name, tensors in (("params", params), ("anchors", anchors)):
        at = 0
        for stretch in sorted(_stretches(name, tensors, grads)):
            while at < len(written) and written[at].end <= stretch.begin:
                at += 1
            if at < len(written) and written[at].begin < stretch.end:
                raise _shared(written[at], stretch)


def _stretches(
    name: str, tensors: Sequence[Tensor], grads: Sequence[Tensor] = ()
) -> Iterator[_Stretch]:
    """Those of the tensors, but for one that is its gradient itself."""
    for i, tensor in enumerate(tensors):
        # Others, such as those of a compiler, may have no address.
        plain = type(tensor) in (Tensor, Parameter) and not tensor.is_meta
        if not plain or tensor.numel() == 0 or (grads and _same(tensor, grads[i])):
            continue
        begin = tensor.data_ptr()
        count = tensor.numel() if is_dense(tensor) else 1
        yield _Stretch(begin, begin + count * tensor.element_size(), f"{name}[{i}]")


def _same(tensor: Tensor, grad: Tensor) -> bool:
    alike = tensor.element_size() == grad.element_size() and tensor.stride() == grad.stride()
    return alike and tensor.data_ptr() == grad.data_ptr()


def _shared(one: _Stretch, other: _Stretch) -> ValueError:
    return ValueError(
        f"{one.name} and {other.name} share memory, so that one would change while the other is "
        "read; give each tensor once"
    )
