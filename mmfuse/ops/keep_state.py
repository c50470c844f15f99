"""keep_state_: a step's new state takes the old one's place, where the step counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import check_sequence
from ._eager import Eager
from ._registry import Op
from ._tensors import check_dense, check_no_inference


def _fake(*_: object) -> None:
    return None


_op = Op(
    "keep_state_",
    "(Tensor(a!)[] state, Tensor[] values, Tensor finite, Tensor? sums) -> ()",
    _fake,
    module="keep_state",
)


def keep_state_(
    state: Sequence[Tensor],
    values: Sequence[Tensor],
    finite: Tensor,
    sums: Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """state[i] ← values[i] in place, if the step counts; else nothing changes.

    A step counts if `finite` is true and all `sums` are finite. That is known on the device alone,
    after the update: every method on gradients ends its steps with this, in one launch for all
    tensors of its state. Not differentiable.

    Equivalent to::

        counts = finite & sums.isfinite().all()
        for old, value in zip(state, values):
            torch.where(counts, value, old, out=old)

    Args:
        state: Tensors on one device, contiguous, of any dtypes.
        values: One for each of them, of its shape, dtype and device.
        finite: 0-d bool.
        sums: [T], float32 or float64; None for none.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or a device is wrong, or a state is not contiguous. Nothing has been
            changed then.
    """
    if not isinstance(state, (list, tuple)):
        check_sequence("state", state)
    if not isinstance(values, (list, tuple)):
        check_sequence("values", values)
    if not state and not values:
        return
    if len(state) != len(values):
        raise ValueError(f"{len(state)} tensors of the state but {len(values)} values")
    device = getattr(state[0], "device", None)
    for i, (old, value) in enumerate(zip(state, values, strict=True)):
        for name, tensor in ((f"state[{i}]", old), (f"values[{i}]", value)):
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be a dense tensor, got {kind}")
        if value.dtype != old.dtype:
            raise TypeError(f"values[{i}] is {value.dtype}, state[{i}] {old.dtype}")
        if value.shape != old.shape:
            raise ValueError(
                f"values[{i}] has shape {list(value.shape)}, state[{i}] {list(old.shape)}"
            )
        if not old.is_contiguous():
            raise ValueError(f"state[{i}] is not contiguous; it cannot be changed in place")
        check_no_inference([old], (f"state[{i}]",).__getitem__)
        _check_device(f"state[{i}]", old, device)
        _check_device(f"values[{i}]", value, device)
    flag = isinstance(finite, Tensor) and finite.dtype is torch.bool and finite.dim() == 0
    if not flag or finite.layout is not torch.strided:
        raise TypeError("finite must be a dense 0-d bool tensor")
    _check_device("finite", finite, device)
    if sums is not None:
        usual = isinstance(sums, Tensor) and sums.dtype in (torch.float32, torch.float64)
        if not usual or sums.dim() != 1:
            raise TypeError("sums must be a float32 or float64 tensor [T]")
        check_dense("sums", sums)
        _check_device("sums", sums, device)
        sums = sums.contiguous()
    keep_checked_(backend, list(state), [value.contiguous() for value in values], finite, sums)


def keep_checked_(
    backend: str | None,
    state: list[Tensor],
    values: list[Tensor],
    finite: Tensor,
    sums: Tensor | None,
) -> None:
    """`keep_state_` of arguments that need no check: at least one, all of them contiguous."""
    _op(backend, finite.device, state, values, finite, sums)
    if type(backend) is Eager or not torch.compiler.is_compiling():
        # Autograd has seen an operator, but not what it wrote to.
        torch._C._increment_version(state)


def _check_device(name: str, value: Tensor, device: object) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, state[0] on {device}")
