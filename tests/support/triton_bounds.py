"""Checks what a Triton kernel reads and writes, in the interpreter, against its tensors' elements.

A pointer belongs to the argument that it comes from, through all of a kernel's arithmetic; what a
kernel reads from a table of addresses belongs to the tensor of the operator's arguments that begins
at that address. Each lane that the mask lets through has to hit an element of that tensor: neither
memory beyond it, which may be another tensor's, nor the gaps of a strided view. A lane that the
mask keeps out may point anywhere. On a GPU it holds no particular value without `other=`, where the
interpreter has a zero: here it holds NaN or a large integer. `tl.multiple_of` has to be true.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.runtime.jit import mangle_type

_NOT_THE_KERNELS = (str(Path(triton.__file__).parent), __file__)
_READS = ("create_masked_load", "create_atomic_cas", "create_atomic_rmw")


class BoundsError(Exception):
    """An access that a GPU may not survive, or that leaves a wrong number."""


@dataclass(frozen=True, eq=False)
class Extent:
    """The elements of a tensor.

    Attributes:
        name: Of the argument.
        kind: The type of a pointer to it.
        base: Its address.
        itemsize: Bytes of an element.
        span: From the first element to the last, both included.
        elements: Which places within the span are elements; None for all.
    """

    name: str
    kind: Any
    base: int
    itemsize: int
    span: int
    elements: np.ndarray | None = field(repr=False)

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Extent:
        """The extent of this view, whatever else its memory holds."""
        kind = tl.str_to_ty(mangle_type(tensor), None)
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
        elements = None
        if span != tensor.numel() or not tensor.is_contiguous():
            places = torch.zeros(span, dtype=torch.bool)
            places.as_strided(tensor.shape, tensor.stride()).fill_(True)
            elements = None if places.all() else places.numpy()
        return cls(name, kind, tensor.data_ptr(), tensor.itemsize, span, elements)

    def missed(self, addresses: np.ndarray) -> np.ndarray:
        """True for each address that is no element's."""
        # Without a sign, what lies before the tensor is far beyond it.
        places, within = np.divmod(addresses - np.uint64(self.base), np.uint64(self.itemsize))
        missed = (within != 0) | (places >= self.span)
        if self.elements is not None and self.span:
            missed |= ~self.elements[np.minimum(places, self.span - 1).astype(np.int64)]
        return missed

    def described(self, address: int) -> str:
        """A missed address, in words."""
        place, within = divmod(address - self.base, self.itemsize)
        part = f" + {within} bytes" if within else ""
        kind = "gap" if not within and 0 <= place < self.span else "element"
        return f"{self.name}, {kind} {place}{part} of {self.span}"


@dataclass
class Site:
    """A line of a kernel that reads or writes.

    Attributes:
        lanes: How many lanes it had.
        kept_out: How many of these the mask kept out.
    """

    lanes: int = 0
    kept_out: int = 0


@dataclass
class Checked:
    """Everything that has been looked at.

    Attributes:
        kernels: How often each kernel was launched.
        sites: By file and line.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    sites: dict[tuple[str, int], Site] = field(default_factory=dict)


class _Arguments(TorchDispatchMode):
    """Notes the tensors of the operators that are running, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.extents: dict[int, list[Extent]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace != "mmfuse":
            return func(*args, **(kwargs or {}))
        before, self.extents = self.extents, {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            for name, tensor in _tensors(argument.name, value):
                self.extents.setdefault(tensor.data_ptr(), []).append(Extent.of(name, tensor))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.extents = before


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _tensors(f"{name}[{i}]", part)


def _is_pointer(handle: object) -> bool:
    return type(handle) is TensorHandle and isinstance(handle.dtype.scalar, tl.pointer_type)


def _origins(handle: Any) -> tuple[Extent, ...]:
    return getattr(handle, "origins", ())


class _Checker:
    """Stands around the interpreter's builder.

    Args:
        arguments: Of the operators.
    """

    def __init__(self, arguments: _Arguments) -> None:
        self.checked = Checked()
        self._arguments = arguments
        self._kernel = ""
        self._names: list[str] = []

    def launch(self, original: Callable[..., None]) -> Callable[..., None]:
        """Wraps GridExecutor's launch: notes which kernel runs."""

        def call(executor: Any, *args: Any, **kwargs: Any) -> None:
            before = self._kernel, self._names
            self._kernel = executor.fn.__name__
            self._names = [n for n in executor.arg_names if n not in executor.constexprs]
            self.checked.kernels[self._kernel] += 1
            try:
                original(executor, *args, **kwargs)
            except interpreter.InterpreterError as error:
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, BoundsError):
                    cause = cause.__cause__
                raise cause or error from None
            finally:
                self._kernel, self._names = before

        return call

    def convert(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Wraps the conversion of arguments, in their order: finds the tensor of each pointer."""

        def named(argument: Any, name: str) -> Any:
            if type(argument) is tuple:
                return tl.tuple([named(a, f"{name}[{i}]") for i, a in enumerate(argument)])
            made = original(argument)
            if isinstance(argument, Tensor):
                made.handle.origins = (Extent.of(name, argument),)
            return made

        return lambda argument: named(argument, self._names.pop(0))

    def carry(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps all that makes a pointer: it belongs to the tensor of those that it is made of."""

        def call(builder: Any, *args: Any, **kwargs: Any) -> Any:
            made = original(builder, *args, **kwargs)
            if _is_pointer(made):
                known = dict.fromkeys(origin for a in args for origin in _origins(a))
                made.origins = tuple(known) or self._listed(made)
            return made

        return call

    def _listed(self, handle: Any) -> tuple[Extent, ...]:
        """The tensors that begin at these addresses."""
        element = handle.get_element_ty()
        found = self._arguments.extents
        return tuple(
            extent
            for address in np.unique(handle.data).tolist()
            for extent in found.get(address, ())
            if extent.kind.element_ty == element
        )

    def promise(self, original: Callable[..., None]) -> Callable[..., None]:
        """Wraps tl.multiple_of: checks that the number or the address is a multiple."""

        def call(handle: Any, key: str, value: list[int]) -> None:
            if key == "tt.divisibility" and handle.data.size == 1 and handle.data.item() % value[0]:
                place = ":".join(map(str, _caller()))
                raise BoundsError(f"{self._kernel}: no multiple of {value[0]} at {place}")
            original(handle, key, value)

        return call

    def access(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps what reads or writes."""
        names = list(inspect.signature(original).parameters)
        word = "reads" if name in _READS else "writes"
        pointer = next(name for name in names if name in ("ptr", "ptrs"))

        def call(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            pointers = given[pointer]
            mask = np.ones(pointers.data.shape, bool)
            if "mask" in given:
                mask = np.broadcast_to(given["mask"].data, mask.shape)
            self._look(given["self"], word, pointers, mask)
            if name == "create_masked_load" and given["other"] is None:
                given["other"] = _nothing(pointers, mask)
            return original(**given)

        return call

    def _look(self, builder: Any, word: str, pointers: Any, mask: np.ndarray) -> None:
        at = _caller()
        site = self.checked.sites.setdefault(at, Site())
        addresses = pointers.data[mask]
        site.lanes += mask.size
        site.kept_out += mask.size - addresses.size
        element = pointers.get_element_ty()
        # The interpreter reads a bool as the byte that it is.
        width = max(1, element.primitive_bitwidth // 8)
        fitting = [origin for origin in _origins(pointers) if origin.itemsize == width]
        missed = np.ones(addresses.shape, bool)
        for origin in fitting:
            missed &= origin.missed(addresses)
        if not missed.any():
            return
        address = int(addresses[missed][0])
        what = f"memory of no {element} among its tensors"
        if fitting:
            what = " or ".join(origin.described(address) for origin in fitting)
        place = f"{Path(at[0]).name}:{at[1]}"
        program = ", ".join(map(str, builder.grid_idx))
        raise BoundsError(f"{self._kernel}, program ({program}), {place} {word} {what}")


def _nothing(pointers: Any, mask: np.ndarray) -> Any:
    """The values of a lane that was kept out, and was promised nothing."""
    kind = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(kind)
    values = np.zeros(mask.shape, dtype)
    values.view(np.uint8 if dtype == np.bool_ else f"u{dtype.itemsize}")[...] = (
        # All ones are a NaN; no integer of a kernel is as large as the other.
        1 if dtype == np.bool_ else (1 << 8 * dtype.itemsize - kind.is_int()) - 1
    )
    return TensorHandle(values, kind)


def _caller() -> tuple[str, int]:
    """The line of the kernel, or of its function, that is running."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_KERNELS):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _patches(checker: _Checker) -> Iterator[tuple[object, str, Any]]:
    for name, original in inspect.getmembers(InterpreterBuilder, inspect.isfunction):
        if name in (*_READS, "create_masked_store"):
            yield InterpreterBuilder, name, checker.access(name, original)
        elif name.startswith("create_"):
            yield InterpreterBuilder, name, checker.carry(original)
    yield GridExecutor, "__call__", checker.launch(GridExecutor.__call__)
    yield interpreter, "_implicit_cvt", checker.convert(interpreter._implicit_cvt)
    yield TensorHandle, "set_attr", checker.promise(TensorHandle.set_attr)


@contextmanager
def checked_bounds() -> Iterator[Checked]:
    """Raises a BoundsError in whatever launches a kernel in the block, before the access."""
    with _Arguments() as arguments, ExitStack() as stack:
        checker = _Checker(arguments)
        for target, name, replacement in list(_patches(checker)):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield checker.checked
