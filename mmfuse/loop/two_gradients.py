"""Two lists of gradients for each encoder: of the joint loss, and of the unimodal losses.

DistributedDataParallel reduces gradients in one backward pass only, FSDP2 in each, but it gives
`torch.autograd.grad` unreduced ones. So with DDP the unimodal gradient comes from
`torch.autograd.grad` and is averaged here, and one backward pass is that of all losses; elsewhere
each list has a backward pass of its own. All other parameters, such as heads, get the gradient of
all losses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .modalities import Modalities
from .ranks import Group, several
from .shards import placed_gradient


def two_gradients(
    joint: Tensor,
    unimodal: Sequence[Tensor],
    modalities: Modalities,
    process_group: Group,
    retain_graph: bool,
) -> list[Tensor | None]:
    """Leaves the joint loss's gradient in ``.grad``; returns that of the unimodal losses' sum.

    One for each parameter of the encoders, None where the unimodal losses do not reach it; where
    only they do, its joint gradient is zero. The losses of another rank may reach other parameters.

    Raises:
        RuntimeError: the losses are those of a DistributedDataParallel with a static graph.
        ValueError: the ranks have other modalities, or in another order.
    """
    parameters, sharded = modalities.parameters, modalities._sharded
    # A group of one rank has DistributedDataParallel's hooks as well.
    grouped = process_group is not False and dist.is_available() and dist.is_initialized()
    group = several(process_group) if grouped else None
    if group is not None:
        modalities.check_ranks(group)
    total = torch.stack([loss.reshape(()) for loss in unimodal]).sum()
    if not grouped or sharded:
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            total.backward(retain_graph=True)
            found = [p.grad for p in parameters]
            if sharded:
                found = list(map(placed_gradient, parameters))
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
        joint.backward(retain_graph=retain_graph)
        for p, grad in zip(parameters, found, strict=True):
            if grad is not None and p.grad is None:  # the joint loss does not reach it
                p.grad = torch.zeros_like(grad)
        return found
    if modalities.guard.marks is None:  # before the first step
        _refuse_static_graph(joint + total)
    wanted = [i for i, p in enumerate(parameters) if p.requires_grad]
    grads = torch.autograd.grad(
        total, [parameters[i] for i in wanted], retain_graph=True, allow_unused=True
    )
    (joint + total).backward(retain_graph=retain_graph)
    if group is not None:  # what the losses of this rank do not reach, those of another may
        both = zip(wanted, grads, strict=True)
        grads = tuple(torch.zeros_like(parameters[i]) if g is None else g for i, g in both)
    reached = {i: grad for i, grad in zip(wanted, grads, strict=True) if grad is not None}
    means = dict(zip(reached, _averaged(list(reached.values()), group), strict=True))
    # A parameter with a unimodal gradient on some rank has one of the sum.
    sums = {i: grad for i in means if (grad := parameters[i].grad) is not None}
    with torch.no_grad():
        torch._foreach_sub_(list(sums.values()), [means[i] for i in sums])
    return [means.get(i) for i in range(len(parameters))]


def _refuse_static_graph(loss: Tensor) -> None:
    """Raises a RuntimeError for a graph of which DistributedDataParallel learns what it has to do.

    Its first step has a node that reduces after the first backward pass, whichever that is.
    """
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        replica = getattr(node, "ddp_weakref", None)
        if replica is not None and replica().static_graph:
            raise RuntimeError(
                "two gradients take two backward passes, but DistributedDataParallel with "
                "static_graph=True reduces after the first: make it without static_graph (with "
                "find_unused_parameters=True, where some parameters have no part in a step)"
            )
        waiting += [each for each, _ in node.next_functions]


def _averaged(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Means over the ranks, if there are several; one reduction for each dtype and device."""
    if group is None:
        return list(tensors)
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(i)
    # New memory: of autograd's own tensors some may be expanded views.
    found = list(tensors)
    for places in kinds.values():
        alike = [tensors[i] for i in places]
        flat = _flatten_dense_tensors(alike)
        dist.all_reduce(flat, group=group)
        flat /= group.size()
        for i, mean in zip(places, _unflatten_dense_tensors(flat, alike), strict=True):
            found[i] = mean
    return found


def check_loss(loss: Tensor, retain_graph: bool, device: torch.device) -> None:
    """Raises a backward pass's errors before it, or another one, has changed anything.

    Raises:
        RuntimeError: the loss has no gradient.
        TypeError: it is no tensor, or `retain_graph` neither True nor False.
        ValueError: it is no scalar, or on the meta device while the encoders are not.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a scalar tensor, got {type(loss).__name__}")
    if not isinstance(retain_graph, bool):
        raise TypeError(f"retain_graph must be a bool, got {type(retain_graph).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"loss must be a scalar, got shape {list(loss.shape)}: take its mean or sum"
        )
    if not loss.requires_grad:
        raise RuntimeError("loss does not require grad: is it detached, or made under no_grad?")
    if loss.is_meta and device.type != "meta":
        raise ValueError(f"loss is on the meta device, where it is empty; encoders on {device}")


def checked_losses(
    modalities: Modalities, losses: Mapping[str, Tensor], missing: Collection[str] = ()
) -> list[Tensor]:
    """The losses in the order of the modalities.

    Args:
        modalities: The encoders.
        losses: Name → loss.
        missing: Modalities of which there may be no sample, and so no gradient.

    Raises:
        RuntimeError: a loss has no gradient, of an encoder that is to have one.
        TypeError: `losses` is not a mapping to tensors.
        ValueError: its names are not those of the encoders, or a loss is no scalar.
    """
    found = modalities.ordered("unimodal_losses", losses)
    for name, loss in zip(modalities.names, found, strict=True):
        if not isinstance(loss, Tensor):
            raise TypeError(f"unimodal_losses[{name!r}] is not a tensor but {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(
                f"unimodal_losses[{name!r}] must be a scalar, got shape {list(loss.shape)}"
            )
    pairs = list(zip(modalities.parameters, modalities.modality, strict=True))
    for m, (name, loss) in enumerate(zip(modalities.names, found, strict=True)):
        if name in missing or loss.requires_grad:
            continue
        if any(p.requires_grad for p, owner in pairs if owner == m):
            raise RuntimeError(
                f"unimodal_losses[{name!r}] does not require grad, so that its encoder would have "
                "one gradient in place of two: is it detached, or made under no_grad?"
            )
    return found
