"""A rank's part of a sharded parameter: FSDP2 and tensor parallelism, whose tensors are DTensors.

Statistics of the parts are added up over the ranks that hold them; noise goes by the element's
place in the whole tensor. Nothing here needs more than torch.distributed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._devices import WIDE
from ..ops import GradStats
from ..ops._tensors import index_tensor


class Shard(NamedTuple):
    """The place of this rank's part in the whole tensor.

    Attributes:
        shape: Of the whole tensor.
        local_shape: Of the part; it may have no elements.
        offset: Index of the part's first element, in every dimension.
        groups: The ranks that hold the other parts, one group for each sharded mesh dimension.
    """

    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    offset: tuple[int, ...]
    groups: tuple[dist.ProcessGroup, ...]


def is_dtensor(tensor: object) -> bool:
    """True if it is a DTensor, without the second that importing the class takes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory; the tensor itself where it is not sharded."""
    if not is_dtensor(tensor):
        return tensor
    part: Any = tensor.to_local()  # type: ignore[attr-defined]
    found: Tensor = part.wait() if hasattr(part, "wait") else part
    return found


def placed_gradient(parameter: Tensor) -> Tensor | None:
    """The gradient, spread over the ranks as the parameter is; all of them call this.

    It may lie otherwise: with `SequenceParallel` each rank has a part of the sequence and all of
    the parameter, and autograd leaves partial sums, which PyTorch's optimizers can take. Then the
    one that is returned takes its place in ``.grad``.
    """
    grad: Any = parameter.grad
    if not (is_dtensor(grad) and is_dtensor(parameter)):
        return parameter.grad
    spec: Any = parameter
    if grad.placements != spec.placements and not any(p.is_partial() for p in spec.placements):
        with torch.no_grad():
            parameter.grad = grad.redistribute(spec.device_mesh, spec.placements)
    return parameter.grad


def shard_of(name: str, tensor: Tensor) -> Shard | None:
    """The place of this rank's part of a parameter; None if the tensor is a plain one.

    Raises:
        TypeError: the parameter is a partial sum, not yet reduced over the ranks.
    """
    if not is_dtensor(tensor):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spec: Any = tensor
    mesh, placements = spec.device_mesh, spec.placements
    if any(p.is_partial() for p in placements):
        raise TypeError(f"{name} is a DTensor of partial sums, {placements}; redistribute it first")
    local_shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    groups = tuple(
        mesh.get_group(d)
        for d, p in enumerate(placements)
        if not p.is_replicate() and mesh.size(d) > 1
    )
    return Shard(tuple(tensor.shape), tuple(local_shape), tuple(offset), groups)


def like_shard(part: Tensor, whole: Tensor) -> Tensor:
    """The part as a DTensor placed as `whole` is, so that a checkpoint can reshard it."""
    if not is_dtensor(whole):
        return part
    spec: Any = whole
    made: Tensor = type(spec).from_local(
        part,
        spec.device_mesh,
        spec.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return made


def whole_state(value: Any) -> Any:
    """A nested state with sharded tensors gathered to the CPU, so that one rank can write it.

    Every rank must call it; the tensors are met in the same order.
    """
    if isinstance(value, Mapping):
        return {key: whole_state(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(whole_state, value))
    return value.full_tensor().cpu() if is_dtensor(value) else value


def own_part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of `tensor`, which is whole or sharded as `parameter` is."""
    if is_dtensor(tensor) or not is_dtensor(parameter):
        return local_part(tensor)
    shard = shard_of("the parameter", parameter)
    assert shard is not None
    for dim, (start, length) in enumerate(zip(shard.offset, shard.local_shape, strict=True)):
        tensor = tensor.narrow(dim, min(start, tensor.shape[dim] - length), length)
    return tensor


def merge_stats(stats: GradStats, shards: Sequence[Shard | None]) -> GradStats:
    """Statistics of the whole tensors from those of the parts: at most five sums each.

    One all-reduce for each set of ranks over which some parameters are spread (one, for FSDP2 on
    one mesh). The sums are formed in float64, where Σg² − (Σg)²/n costs the variance a relative
    2⁻⁵²·mean²/variance at most. On a device without float64 they are sums of what is left of each
    value without the whole tensor's mean, which takes one all-reduce more.
    """
    places: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for t, shard in enumerate(shards):
        if shard is not None and shard.groups:
            places.setdefault(shard.groups, []).append(t)
    if not places:
        return stats
    numel, mean, m2, *products = (None if s is None else s.clone() for s in stats)
    assert numel is not None and mean is not None and m2 is not None
    present = [p for p in products if p is not None]
    wide = WIDE[mean.device.type]
    for groups, index in places.items():
        at = index_tensor(tuple(index), mean.device)
        n, mu = numel[at].to(wide), mean[at].to(wide)
        origin = None
        if wide != torch.float64:
            count, total = _over(groups, [n, n * mu])
            origin = total / count
            mu = mu - origin
        rows = [n, n * mu, m2[at].to(wide) + n * mu * mu, *(p[at].to(wide) for p in present)]
        sums = _over(groups, rows)
        n, total, squares = sums[:3]
        mu = total / n
        numel[at] = n.to(numel.dtype)
        mean[at] = mu.to(mean.dtype)
        m2[at] = (squares - total * mu).clamp_(min=0).to(m2.dtype)
        if origin is not None:
            mean[at] += origin
        for column, merged in zip(present, sums[3:], strict=True):
            column[at] = merged.to(column.dtype)
    return GradStats(numel, mean, m2, *products)


def _over(groups: Sequence[dist.ProcessGroup], rows: Sequence[Tensor]) -> Tensor:
    """The rows as one tensor, summed over the ranks."""
    sums = torch.stack(list(rows))
    for group in groups:
        dist.all_reduce(sums, group=group)
    return sums


class Run(NamedTuple):
    """Elements of a part that stand next to each other in the whole tensor."""

    tensor: Tensor
    offset: int


def runs(part: Tensor, shard: Shard | None) -> Iterator[Run]:
    """Cuts a part into runs; a part of whole rows, as FSDP2 makes them, is one."""
    if shard is None or not part.numel():
        yield Run(part, 0)
        return
    sharded = [d for d, n in enumerate(shard.local_shape) if n != shard.shape[d]]
    last = max(sharded, default=0)
    strides = [math.prod(shard.shape[d + 1 :]) for d in range(len(shard.shape))]
    for index in product(*(range(n) for n in shard.local_shape[:last])):
        first = [o + i for o, i in zip(shard.offset, (*index, 0), strict=False)]
        yield Run(part[index], sum(i * s for i, s in zip(first, strides, strict=False)))
