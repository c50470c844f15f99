"""Two lists of gradients for each encoder: of the joint loss, and of the unimodal losses.

DistributedDataParallel reduces gradients in one backward pass only, FSDP2 in each, but it gives
`torch.autograd.grad` unreduced ones. So with DDP the unimodal gradient comes from
`torch.autograd.grad` and is averaged here, and one backward pass is that of all losses; elsewhere
each list has a backward pass of its own. All other parameters, such as heads, get the gradient of
all losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .modalities import Modalities
from .ranks import Group, several
from .shards import is_dtensor


def two_gradients(
    joint: Tensor,
    unimodal: Sequence[Tensor],
    modalities: Modalities,
    process_group: Group,
    retain_graph: bool,
) -> list[Tensor | None]:
    """Leaves the joint loss's gradient in ``.grad``; returns that of the unimodal losses' sum.

    One for each parameter of the encoders, None where the unimodal losses do not reach it.
    """
    parameters = modalities.parameters
    total = torch.stack([loss.reshape(()) for loss in unimodal]).sum()
    group = several(process_group)
    if group is None or any(map(is_dtensor, parameters)):
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            total.backward(retain_graph=True)
            found = [p.grad for p in parameters]
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
        joint.backward(retain_graph=retain_graph)
        return found
    wanted = [i for i, p in enumerate(parameters) if p.requires_grad]
    grads = torch.autograd.grad(
        total, [parameters[i] for i in wanted], retain_graph=True, allow_unused=True
    )
    (joint + total).backward(retain_graph=retain_graph)
    found = [None] * len(parameters)
    for i, grad in zip(wanted, grads, strict=True):
        found[i] = grad
    reached = {i: grad for i, grad in enumerate(found) if grad is not None}
    _average(list(reached.values()), group)
    both = {i: parameters[i].grad for i in reached}
    with torch.no_grad():
        present = {i: grad for i, grad in both.items() if grad is not None}
        torch._foreach_sub_(list(present.values()), [reached[i] for i in present])
    return found


def _average(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """In place, the mean over the ranks; one reduction for each dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        flat = _flatten_dense_tensors(alike)
        dist.all_reduce(flat, group=group)
        flat /= group.size()
        torch._foreach_copy_(alike, list(_unflatten_dense_tensors(flat, alike)))


def checked_losses(names: Sequence[str], losses: Mapping[str, Tensor]) -> list[Tensor]:
    """The losses in the order of the modalities.

    Raises:
        TypeError: `losses` is not a mapping to tensors.
        ValueError: its names are not those of the encoders, or a loss is no scalar.
    """
    for name in names:
        loss = losses[name]
        if not isinstance(loss, Tensor):
            raise TypeError(f"unimodal_losses[{name!r}] is not a tensor but {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(
                f"unimodal_losses[{name!r}] must be a scalar, got shape {list(loss.shape)}"
            )
    return [losses[name] for name in names]
