"""Checks and layouts that the ops on lists of tensors share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import check_sequence
from ._eager import Eager

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def why_unsupported(tensor: object) -> str | None:
    """Why a gradient cannot be given to the kernels, or None when it can."""
    if not isinstance(tensor, Tensor):
        return f"is not a tensor but {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}; only dense tensors are supported"
    if tensor.dtype not in FLOATING:
        return f"has dtype {tensor.dtype}; expected float16, bfloat16, float32 or float64"
    return None


def check_named(tensors: Sequence[Tensor], name_of: Callable[[int], str]) -> None:
    """Raises a TypeError that names the first tensor which the kernels cannot take."""
    # One set over all tensors is quicker than asking each of them why it cannot be taken.
    kinds = {(getattr(t, "layout", None), getattr(t, "dtype", None)) for t in tensors}
    if all(layout is torch.strided and dtype in FLOATING for layout, dtype in kinds):
        return
    for i, tensor in enumerate(tensors):
        reason = why_unsupported(tensor)
        if reason is not None:
            raise TypeError(f"{name_of(i)} {reason}")


def check_list(name: str, tensors: Sequence[Tensor]) -> None:
    """`check_named` for a list that the user knows by one name."""
    if not isinstance(tensors, (list, tuple)):
        check_sequence(name, tensors)
    check_named(tensors, lambda i: f"{name}[{i}]")


def check_pairs(
    grads: Sequence[Tensor], params: Sequence[Tensor] | None, anchors: Sequence[Tensor] | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Checks that params and anchors mirror grads; returns them, empty where not given."""
    if params is None:
        if anchors is not None:
            raise ValueError("anchors need params: give both, or params alone, or neither")
        return (), ()
    given = [("params", params)]
    if anchors is not None:
        given.append(("anchors", anchors))
    for name, tensors in given:
        check_list(name, tensors)
        if len(tensors) != len(grads):
            raise ValueError(f"{len(grads)} grads but {len(tensors)} {name}")
        for i, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
            if tensor.shape != grad.shape:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(tensor.shape)}, its gradient {tuple(grad.shape)}"
                )
            if tensor.device != grad.device:
                raise ValueError(
                    f"{name}[{i}] is on {tensor.device}, its gradient on {grad.device}"
                )
    return params, () if anchors is None else anchors


def promoted(
    names: Sequence[str], tensors: Sequence[Tensor], why: str, shapes: str, *dims: int
) -> list[Tensor]:
    """The tensors in one dtype, checked to be of one shape on one device.

    Args:
        names: Their names in errors.
        tensors: At least one.
        why: Why they must have one shape, for the error text.
        shapes: The shapes that they may have, for the error text.
        *dims: How many dimensions they may have.

    Raises:
        TypeError: one of them is sparse, integer or complex.
        ValueError: their shapes or devices differ, or they have other dimensions.
    """
    check_named(tensors, names.__getitem__)
    first = tensors[0]
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.dim() not in dims:
            raise ValueError(f"{name} must be {shapes}, got {list(tensor.shape)}")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{why} and must have one shape: {names[0]} is {list(first.shape)}, "
                f"{name} {list(tensor.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, {names[0]} on {first.device}")
    dtype = first.dtype
    for tensor in tensors[1:]:
        if tensor.dtype is not dtype:  # asking is an operator
            dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def check_dense(name: str, value: Tensor) -> None:
    """Raises a TypeError for a sparse tensor, which has no memory that a kernel could read."""
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {value.layout}")


def check_vector(name: str, value: Tensor, length: int) -> None:
    """Checks that a coefficient is a floating [T] tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor of shape [{length}]")
    check_dense(name, value)
    if value.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}], got {list(value.shape)}")


def by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Positions of the tensors on each device, in the order of first appearance."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) == 1:
        return {devices.pop(): list(range(len(tensors)))}
    groups: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(i)
    return groups


class Layout(NamedTuple):
    """The tensors that the kernels get instead of strided ones."""

    grads: list[Tensor]
    params: list[Tensor]
    anchors: list[Tensor]
    #: Positions where `grads` holds a copy that must be written back.
    copied: list[int]


# Elements of one index of the first dimension: in a row of so many all kernels compute places with
# 32 bits. csrc/glue/tensors.h has the number too.
_LONGEST_ROW = 1 << 20


def channels_last(tensor: Tensor) -> bool:
    """True if it is in channels_last or channels_last_3d, with rows that the kernels can have."""
    dims = tensor.dim()
    if dims == 4:
        last = tensor.is_contiguous(memory_format=torch.channels_last)
    else:
        last = dims == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)
    return last and tensor.numel() <= _LONGEST_ROW * tensor.shape[0]


def kernel_layout(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    *,
    any_order: bool,
) -> Layout:
    """Gives the kernels memory that they can have, without copying where possible.

    They take contiguous tensors and those in channels_last; params and anchors in the order of
    their gradients. Tensors that have to be copied are copied in one call.

    Args:
        grads: T tensors.
        params: T tensors, or none.
        anchors: T tensors, or none; none without params.
        any_order: The result does not depend on which element comes first, so that a dense tensor
            in any other order can be read in storage order.
    """
    rows = [row for row in (grads, params, anchors) if row]
    # A list, not a generator: that would enter and leave a frame for each tensor.
    if False not in [t.is_contiguous() for row in rows for t in row]:
        return Layout(list(grads), list(params), list(anchors), [])
    out = [list(row) for row in rows]
    copied: list[int] = []
    copies: list[Tensor] = []
    sources: list[Tensor] = []
    for i, grad in enumerate(grads):
        as_it_is = grad.is_contiguous() or channels_last(grad)
        flat = not as_it_is and any_order and is_dense(grad)
        for k, row in enumerate(rows):
            mine = row[i]
            if not _like(mine, grad) if as_it_is or flat else not mine.is_contiguous():
                # With a dense gradient's strides, else contiguous.
                kept = torch.preserve_format if as_it_is or flat else torch.contiguous_format
                out[k][i] = torch.empty_like(grad, dtype=mine.dtype, memory_format=kept)
                copies.append(out[k][i])
                sources.append(mine)
                if k == 0:
                    copied.append(i)
            if flat:
                out[k][i] = out[k][i].as_strided((mine.numel(),), (1,))
    if copies:
        torch._foreach_copy_(copies, sources)
    out += [[], []]
    return Layout(out[0], out[1], out[2], copied)


def _like(tensor: Tensor, grad: Tensor) -> bool:
    """True if it lies in memory as a gradient does that is dense; strides of one element aside."""
    if grad.is_contiguous():
        return tensor.is_contiguous()
    return tensor.stride() == grad.stride() or (channels_last(grad) and channels_last(tensor))


def same_dense_format(tensors: list[Tensor]) -> bool:
    """True if the tensors fill their memory without gaps, all in the same order."""
    stride = tensors[0].stride()
    return all(t.stride() == stride for t in tensors) and is_dense(tensors[0])


def is_dense(tensor: Tensor) -> bool:
    """True if the tensor fills its memory without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def check_no_inference(tensors: Sequence[Tensor], name_of: Callable[[int], str]) -> None:
    """Raises a RuntimeError for a tensor of inference mode outside it; a compiler asks itself."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    for i, tensor in enumerate(tensors):
        if tensor.is_inference():
            raise RuntimeError(
                f"{name_of(i)} is an inference tensor, which cannot be changed in place outside "
                "torch.inference_mode()"
            )


def check_writable(tensors: Sequence[Tensor], name_of: Callable[[int], str]) -> None:
    """Raises a ValueError for a tensor in which one memory cell stands for several elements.

    Also for a view that PyTorch negates when it is read, whose memory holds other numbers, and a
    RuntimeError for a tensor of inference mode outside it.
    """
    check_no_inference(tensors, name_of)
    if not torch.compiler.is_compiling() and True in [t.is_neg() for t in tensors]:
        # PyTorch would write to those before it, and then refuse the list.
        i = [t.is_neg() for t in tensors].index(True)
        raise ValueError(
            f"{name_of(i)} is a negated view, as of a conjugate's imaginary part; "
            "it cannot be updated in place, use .resolve_neg() first"
        )
    for i, tensor in enumerate(tensors):
        if not tensor.is_contiguous() and any(
            stride == 0 and size > 1
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise ValueError(
                f"{name_of(i)} is an expanded view with strides {tuple(tensor.stride())}; "
                "it cannot be updated in place, use .contiguous() first"
            )


def index_tensor(index: tuple[int, ...], device: torch.device) -> Tensor:
    """The index as an int64 tensor; see `kept_tensor`."""
    return kept_tensor(index, (len(index),), torch.int64, device)


def kept_tensor(
    values: tuple[float, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
) -> Tensor:
    """Numbers of the host as a tensor on a device; nobody must write to it.

    It is kept there, so that a steady training loop copies nothing from the host: such a copy waits
    for the device and cannot be captured in a CUDA graph.

    Args:
        values: All elements, in order.
        shape: Of the tensor.
        dtype: Of the tensor.
        device: Of the tensor.
        backend: Of the calling op; an `Eager` one says that nothing is compiled.
    """
    # A compiled graph keeps its constants itself, and a fake tensor is none outside of its mode.
    compiled = type(backend) is not Eager and torch.compiler.is_compiling()
    if compiled or torch._C._get_dispatch_mode(_FAKE) is not None:
        return _copied(values, shape, dtype, device)
    capturing = _capturing(device)
    key = (values, shape, dtype, device)
    with _kept_lock:
        # Each look-up forms the hash of all numbers anew: one is enough for a call in every step.
        found = _kept.get(key)
        if found is not None:
            if capturing:  # the graph reads it whenever it is replayed
                _kept_for_graphs[key] = _kept.pop(key)
            elif next(reversed(_kept.values())) is not found:
                _kept[key] = _kept.pop(key)
            return found
        found = _kept_for_graphs.get(key)
        if found is not None:
            return found
    if capturing:
        # It is in the memory of the graph, which alone fills it, at each replay: for nobody else.
        return _filled(values, shape, dtype, device)
    made = _copied(values, shape, dtype, device)
    with _kept_lock:
        _kept[key] = made
        while len(_kept) > _MOST_KEPT:
            del _kept[next(iter(_kept))]
    return made


def _capturing(device: torch.device) -> bool:
    """True if what is done on the device now is recorded in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _copied(
    values: Sequence[float], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(shape)


def _filled(
    values: Sequence[float], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Filled by kernels that carry the numbers as arguments, one for each run of equal numbers.

    Slower than a copy, but a graph can capture it, and needs no memory of the host that would have
    to outlive it.
    """
    runs = [
        torch.full((len(list(run)),), value, dtype=dtype, device=device)
        for value, run in groupby(values)
    ]
    return torch.cat(runs or [torch.empty(0, dtype=dtype, device=device)]).view(shape)


_FAKE = torch._C._TorchDispatchModeKey.FAKE
_Key = tuple[tuple[float, ...], tuple[int, ...], torch.dtype, torch.device]

# The tensors used last, and those of captured graphs, which are never dropped.
_MOST_KEPT = 128
_kept: dict[_Key, Tensor] = {}
_kept_for_graphs: dict[_Key, Tensor] = {}
_kept_lock = threading.Lock()
