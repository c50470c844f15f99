"""update_grads_: the one pass that changes gradients, for every method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise import NoiseStream
from ._arguments import check_stream
from ._eager import Eager
from ._lists import is_vector, read_lists
from ._overlaps import check_apart
from ._registry import Op
from ._tensors import (
    by_device,
    check_list,
    check_no_inference,
    check_pairs,
    check_vector,
    check_writable,
    index_tensor,
    kernel_layout,
)


def _fake(*_: object) -> None:
    return None


_op = Op(
    "update_grads_",
    "(Tensor(a!)[] grads, Tensor scale, Tensor[] params, Tensor[] anchors, Tensor? pull, "
    "Tensor? noise_std, Tensor? noise_state, int[] noise_ids, int[] noise_offsets, "
    "Tensor(b!)? finite, Tensor(c!)? sq_norm) -> ()",
    _fake,
    module="update_grads",
    table="(Tensor table, Tensor scale, Tensor? pull, Tensor? noise_std, Tensor(a!)? noise_state, "
    "Tensor(b!)? finite, Tensor(c!)? sq_norm, bool advance, Tensor(d!)? done) -> ()",
)


def update_grads_(
    grads: Sequence[Tensor],
    scale: Tensor,
    *,
    params: Sequence[Tensor] | None = None,
    anchors: Sequence[Tensor] | None = None,
    pull: Tensor | None = None,
    noise_std: Tensor | None = None,
    stream: NoiseStream | None = None,
    finite: Tensor | None = None,
    sq_norm: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """G ← scale[t]·g + pull[t]·(w − w₀) + noise_std[t]·N(0, 1), for T tensors, in place.

    One read and one write of every gradient; a tensor for which nothing would change is not
    written. OGM, OGM-GE, InfoReg and RedReg are choices of the three vectors (see
    `mmfuse.methods`). With `sq_norm` the same read also gives Σg² of what the gradient was before:
    the trace of the Fisher information of InfoReg (Huang et al., CVPR 2025).

    Equivalent to, for each tensor::

        sq_norm[t] = g.square().sum()
        g.mul_(scale[t]).add_(pull[t] * (w - w0)).add_(noise_std[t] * torch.randn_like(g))

    Without anchors w₀ is 0, and nothing is read for it: with second gradients as params the result
    is scale[t]·g₁ + pull[t]·g₂, a weighted sum of two gradients as in MMPareto (Wei & Hu, ICML
    2024).

    Args:
        grads: T tensors of any shapes; float16, bfloat16, float32 and float64 may be mixed.
        scale: [T] floating, on the gradients' device, as are `pull` and `noise_std`.
        params: T tensors w shaped like `grads`; needed with `pull`; any floating dtype.
        anchors: T tensors w₀ shaped like `grads`; they need `params`; any floating dtype. None for
            0.
        pull: [T]; an entry of 0 adds nothing, even to a displacement that is not finite.
        noise_std: [T]; an entry of 0 adds nothing.
        stream: The random stream; needed with `noise_std`. Tensor t draws from the stream's t-th
            id. The step is not advanced: call `stream.advance()` once per training step.
        finite: 0-d bool tensor, set to False where a gradient ends up with a NaN or an Inf.
        sq_norm: [T] on the first gradient's device, set to Σg² of each gradient as it comes in; 0
            for an empty one. float64, or float32 if no gradient is float64. The squares are added
            up in float32 (float64 for a float64 gradient) within a chunk, in float64 beyond it,
            always in the same order. A NaN or an Inf stays in its tensor's sum.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: a tensor is sparse, integer or complex.
        NotImplementedError: a gradient carries a tangent of forward-mode AD.
        RuntimeError: a gradient or `sq_norm` requires a gradient, and autograd records; or one of
            the tensors that are written is of inference mode, which has ended.
        ValueError: shapes do not match, or arguments that go together are not both given, or a
            gradient is an expanded view, or shares memory with another tensor of the lists (a
            parameter or an anchor may be its gradient itself), or `sq_norm` is an expanded view or
            has another shape, dtype or device. Nothing has been changed then.
    """
    lists, vectors = (grads, params, anchors), (scale, pull, noise_std)
    eager = not torch.compiler.is_compiling()
    if eager and _update_usual(*lists, *vectors, stream, finite, sq_norm, backend):
        return
    check_list("grads", grads)
    check_writable(grads, lambda i: f"grads[{i}]")
    check_vector("scale", scale, len(grads))
    _check_on_meta(grads, scale=scale, pull=pull, noise_std=noise_std, finite=finite)
    if (pull is None) != (params is None and anchors is None):
        raise ValueError("pull needs params, and params and anchors need pull")
    params, anchors = check_pairs(grads, params, anchors)
    check_apart(grads, params, anchors)
    if pull is not None:
        check_vector("pull", pull, len(grads))
    if (noise_std is None) != (stream is None):
        raise ValueError("noise_std needs a stream (mmfuse.NoiseStream), and a stream needs it")
    if noise_std is not None:
        check_vector("noise_std", noise_std, len(grads))
    if stream is not None:
        check_stream(stream, on_meta=all(g.is_meta for g in grads))
    if finite is not None and not isinstance(finite, Tensor):
        raise TypeError(f"finite must be a 0-d bool tensor, got {type(finite).__name__}")
    if finite is not None and not _is_flag(finite):
        raise ValueError("finite must be a dense 0-d bool tensor")
    if finite is not None:
        check_no_inference([finite], lambda _: "finite")
    if sq_norm is not None:
        _check_sq_norm(sq_norm, grads)
    if finite is not None or sq_norm is not None:
        _check_numbers(grads)
    ids, offsets = stream.counters(len(grads)) if stream is not None else ([], [])
    groups = by_device(grads)
    if len(groups) != 1:
        for device, index in groups.items():
            squares = None if sq_norm is None else sq_norm.new_empty(len(index), device=device)
            _update_part(
                device, index, grads, params, anchors, vectors, stream, finite, squares, backend
            )
            if sq_norm is not None and squares is not None:
                at = index_tensor(tuple(index), sq_norm.device)
                sq_norm.index_copy_(0, at, squares.to(sq_norm.device))
        return
    device = next(iter(groups))
    wide = torch.float64 in {g.dtype for g in grads}
    dtype = torch.float64 if wide else torch.float32
    layout = kernel_layout(grads, params, anchors, any_order=noise_std is None)
    flag = finite.to(device) if finite is not None else None
    squares = sq_norm.contiguous() if sq_norm is not None else None
    _op(
        backend,
        device,
        layout.grads,
        scale.to(device, dtype).contiguous(),
        layout.params,
        layout.anchors,
        None if pull is None else pull.to(device, dtype).contiguous(),
        None if noise_std is None else noise_std.to(device, dtype).contiguous(),
        None if stream is None else stream.state.to(device),
        ids,
        offsets,
        flag,
        squares,
    )
    if not torch.compiler.is_compiling():  # functionalization does it there
        numbers = [t for t in (flag, squares) if t is not None]
        torch._C._increment_version(layout.grads + numbers)
    if layout.copied:
        torch._foreach_copy_(
            [grads[i] for i in layout.copied], [layout.grads[i] for i in layout.copied]
        )
    if finite is not None and flag is not None and flag is not finite:
        finite.logical_and_(flag.to(finite.device))
    if sq_norm is not None and squares is not None and squares is not sq_norm:
        sq_norm.copy_(squares)


def _update_usual(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    anchors: Sequence[Tensor] | None,
    scale: Tensor,
    pull: Tensor | None,
    noise_std: Tensor | None,
    stream: NoiseStream | None,
    finite: Tensor | None,
    sq_norm: Tensor | None,
    backend: str | None,
) -> bool:
    """Does all of `update_grads_` if every argument is usual; else nothing, and returns False."""
    if (pull is None) != (params is None) or (noise_std is None) != (stream is None):
        return False
    vectors, count = (scale, pull, noise_std), len(grads) if isinstance(grads, (list, tuple)) else 0
    if scale is None or False in [is_vector(v, count) for v in vectors if v is not None]:
        return False
    state = None
    if stream is not None:
        # A place of its own may name other ids, and offsets, which a table has not.
        if type(stream) is not NoiseStream or stream.ids is not None:
            return False
        state = stream.state
        if state.is_meta or state.shape != (2,) or state.dtype is not torch.int64:
            return False
    listed = read_lists(_op, backend, grads, params, anchors, apart=True)
    if listed is None:
        return False
    own, dtype = listed.lists[0], listed.dtype
    device = own[0].device
    squared = sq_norm is None or (
        is_vector(sq_norm, count, torch.float64, dtype)
        and sq_norm.device == device
        and sq_norm.is_contiguous()
        and not (sq_norm.requires_grad and torch.is_grad_enabled())
    )
    if not squared or not _is_usual_flag(finite, device):
        return False
    if torch.is_grad_enabled() and torch._C._any_requires_grad(own):
        return False
    numbers = [t for t in (finite, sq_norm) if t is not None]
    if True in [t.is_inference() for t in numbers]:  # such a gradient is not read either
        return False
    first, *others = (None if v is None else v.to(device, dtype).contiguous() for v in vectors)
    with torch._C._AutoDispatchBelowAutograd():
        at = None if state is None else state.to(device)
        listed.kernel(listed.table, first, *others, at, finite, sq_norm, False, None)
    torch._C._increment_version(own)
    torch._C._increment_version(numbers)
    return True


def _is_usual_flag(finite: Tensor | None, device: torch.device) -> bool:
    if finite is None:
        return True
    return type(finite) is Tensor and _is_flag(finite) and finite.device == device


def _check_on_meta(grads: Sequence[Tensor], **vectors: Tensor | None) -> None:
    for name, vector in vectors.items():
        if isinstance(vector, Tensor) and vector.is_meta and not all(g.is_meta for g in grads):
            raise ValueError(f"{name} is on the meta device, where it holds no numbers")


def _check_numbers(grads: Sequence[Tensor]) -> None:
    """Results of gradients that are on the meta device are read nowhere else."""
    meta = [g.is_meta for g in grads]
    if True in meta and False in meta:
        i = meta.index(True)
        raise ValueError(f"grads[{i}] is on the meta device, where it holds no numbers")


def _is_flag(x: Tensor) -> bool:
    return x.dtype is torch.bool and x.dim() == 0 and x.layout is torch.strided


def update_checked_(
    backend: str | None,
    device: torch.device,
    grads: list[Tensor],
    scale: Tensor,
    finite: Tensor,
    sq_norm: Tensor | None,
    *,
    params: Sequence[Tensor] = (),
    anchors: Sequence[Tensor] = (),
    pull: Tensor | None = None,
    noise_std: Tensor | None = None,
    state: Tensor | None = None,
    ids: Sequence[int] = (),
    table: Tensor | None = None,
    advance: bool = False,
    done: Tensor | None = None,
) -> bool:
    """`update_grads_` of tensors that need no check.

    They are contiguous or in channels_last, params and anchors as their gradients are; of floating
    dtypes, whole and on one device, at least one. The vectors are contiguous there, float64 if a
    gradient is, else float32. `state` and `ids` are the stream's, where there is noise. `table` is
    what `mmfuse._native.read_gradients` has made of `grads`, and, where there is a pull, of params
    and anchors. With `advance` the stream goes on to its next step if all gradients are finite,
    where the kernel can do that: then it returns True, else the caller has to. `done`, if the
    decision has made one, spares that a launch.
    """
    kernel = None
    if table is not None and type(backend) is Eager:
        kernel = _op.of_table(backend, device)
    if kernel is not None:
        with torch._C._AutoDispatchBelowAutograd():
            kernel(table, scale, pull, noise_std, state, finite, sq_norm, advance, done)
    else:
        advance = False
        offsets = [0] * len(ids)
        _op(
            backend,
            device,
            grads,
            scale,
            params,
            anchors,
            pull,
            noise_std,
            state,
            ids,
            offsets,
            finite,
            sq_norm,
        )
    if type(backend) is Eager or not torch.compiler.is_compiling():
        # Autograd has seen an operator, but not what it wrote to. No list of all: a copy of a long
        # one has malloc tidy up in every step.
        numbers = [finite] if sq_norm is None else [finite, sq_norm]
        if advance and state is not None:
            numbers.append(state)
        torch._C._increment_version(grads)
        torch._C._increment_version(numbers)
    return advance


def _check_sq_norm(sq_norm: Tensor, grads: Sequence[Tensor]) -> None:
    check_vector("sq_norm", sq_norm, len(grads))
    if sq_norm.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sq_norm must be float32 or float64, got {sq_norm.dtype}")
    for i, grad in enumerate(grads):
        if grad.dtype == torch.float64 and sq_norm.dtype != torch.float64:
            raise ValueError(f"sq_norm must be float64, as grads[{i}] is; got {sq_norm.dtype}")
    if grads and sq_norm.device != grads[0].device:
        raise ValueError(f"sq_norm is on {sq_norm.device}, grads[0] on {grads[0].device}")
    check_writable([sq_norm], lambda _: "sq_norm")
    if sq_norm.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("sq_norm requires a gradient, which the sums have none of; detach it")


def _update_part(
    device: torch.device,
    index: list[int],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    vectors: tuple[Tensor, Tensor | None, Tensor | None],
    stream: NoiseStream | None,
    finite: Tensor | None,
    sq_norm: Tensor | None,
    backend: str | None,
) -> None:
    """Updates the gradients on one of several devices, each with its own id in the stream."""
    rows = tuple(index)
    scale, pull, noise_std = (
        None if v is None else v.index_select(0, index_tensor(rows, v.device)).to(device)
        for v in vectors
    )
    assert scale is not None
    placed = None
    if stream is not None:
        ids, offsets = stream.counters(len(grads))
        placed = stream.to(device).place([ids[i] for i in index], [offsets[i] for i in index])
    update_grads_(
        [grads[i] for i in index],
        scale,
        params=[params[i] for i in index] if params else None,
        anchors=[anchors[i] for i in index] if anchors else None,
        pull=pull,
        noise_std=noise_std,
        stream=placed,
        finite=finite,
        sq_norm=sq_norm,
        backend=backend,
    )
