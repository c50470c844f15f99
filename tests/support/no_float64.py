"""A device that lacks float64: tensors that say they are on `mps`, and are computed on the CPU.

Everything that PyTorch is asked to do passes through here. A call that would make a float64 tensor
there, or mixes tensors of two devices, raises, as on the real one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from mmfuse.ops._registry import OPS

DEVICE = torch.device("mps", 0)
_COPIES = ("_to_copy", "copy_", "_foreach_copy_", "index", "index_put_")


class OnDevice(torch.Tensor):
    """A tensor there; autograd takes it for one on `meta`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{DEVICE} has no {inner.dtype}")
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> Any:
        """The list of any tensor, which PyTorch refuses to its subclasses."""
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("mps", "meta")


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    there = [x for x in flat if isinstance(x, OnDevice)]
    name = func._schema.name.split("::")[1]
    target = kwargs.get("device")
    if target is None:
        result_there = bool(there)
    else:
        result_there = _is_there(target)
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if there and name not in _COPIES:
        for x in flat:
            if isinstance(x, Tensor) and not isinstance(x, OnDevice) and x.dim():
                raise RuntimeError(f"{func} got tensors on {DEVICE} and on {x.device}")
    if name == "_to_copy" and result_there and kwargs.get("dtype") is None:
        kwargs["dtype"] = args[0].dtype
    if name == "copy_" and not isinstance(args[0], OnDevice):
        result_there = False
    known = {id(x.inner): x for x in there}

    def inner(x: Any) -> Any:
        return x.inner if isinstance(x, OnDevice) else x

    found = func(*tree_map(inner, args), **tree_map(inner, kwargs))

    def outer(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else OnDevice(x)

    return tree_map(outer, found) if result_there else found


class _Mode(TorchDispatchMode):
    """Sees what makes tensors from nothing, and the reference of our ops from inside."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "mmfuse":
            name = func._schema.name.split("::")[1]
            assert func._overloadname == "reference", func
            module = importlib.import_module(f"mmfuse.reference.{OPS[name].module}")
            # It acts as a call from outside: below autograd PyTorch takes `meta` at its word.
            keys = torch._C.DispatchKey
            with (
                torch.no_grad(),
                torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
                torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
                self,
            ):
                return getattr(module, name)(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


@contextmanager
def device_without_float64() -> Iterator[torch.device]:
    """Yields a device; in the block, tensors can be made on it and moved to it."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def moved(value: Any) -> Any:
    """The tensors in it on that device; float64 ones as float32."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return OnDevice((x.float() if x.dtype == torch.float64 else x).detach().clone())

    return tree_map(move, value)


def back(value: Any) -> Any:
    """The tensors in it on the CPU."""
    return tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, value)
