"""One table for every op: its schema, its fake, and which backend implements it.

Each op `name` is one torch.library operator with one overload per backend
(``torch.ops.mmfuse.grad_stats.cpu``). The schema is written once and does not need the compiled
library; `mmfuse._native` and the Triton folder only add implementations.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import _native
from .._devices import has_float64
from ._derivatives import (
    no_record,
    no_second_derivative,
    no_vmap,
    refuse_tangents,
    transformed_call,
)
from ._eager import Eager, Formula, differentiable_call
from ._preference import preferred

BACKENDS = ("reference", "cpu", "triton", "cuda")


_library = torch.library.Library("mmfuse", "DEF")
_forced: str | None = None
_warned: set[str] = set()


class Op:
    """An op of the grid: a row with one cell per backend.

    Args:
        name: The op's name, and the name of its file in every backend's folder.
        schema: Arguments and returns in PyTorch's schema language, without the name.
        fake: The shape function, shared by all backends.
        module: File name in the backends' folders, when it is not `name`.
        table: The schema of the same op on a table of gradients, which the compiled backends have.
        public: Name of the public op, when it is not `name` without "_backward".
    """

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable[..., Any],
        *,
        module: str | None = None,
        table: str | None = None,
        public: str | None = None,
    ) -> None:
        self.name = name
        self.schema = schema
        self.module = module or name
        self._reasons: dict[str, str] = {}
        self.overloads: dict[str, Any] = {}
        self._chosen: dict[tuple[str | None, torch.device], str] = {}
        self._kernels: dict[tuple[str, str | None, torch.device], Callable[..., Any]] = {}
        self._formula: tuple[Formula, Formula] | None = None
        #: The op's name in errors: the operator of a backward pass has its op's name.
        self.public = public or name.removesuffix("_backward")
        for backend in BACKENDS:
            _library.define(f"{name}.{backend}{schema}")
            qualified = f"mmfuse::{name}.{backend}"
            torch.library.register_fake(qualified, fake, lib=_library)
            self.overloads[backend] = getattr(getattr(torch.ops.mmfuse, name), backend)
            self._register_derivatives(backend)
        for backend in ("reference", "triton"):
            self._register_python(backend)
        self._tables: dict[tuple[str, str | None, torch.device], Callable[..., Any] | None] = {}
        self._of_tables: dict[str, Any] = {}
        for backend in ("cpu", "cuda") if table is not None else ():
            # Eager calls alone come here: no fake, no derivative. A name of its own, for PyTorch
            # aborts at exit where the overloads of one operator differ in their arguments.
            on_table = f"{name.rstrip('_')}_table{'_' * name.endswith('_')}"
            _library.define(f"{on_table}.{backend}{table}")
            packet = getattr(torch.ops.mmfuse, on_table)
            self._of_tables[backend] = getattr(packet, backend)
        OPS[name] = self

    def _register_python(self, backend: str) -> None:
        """Registers `mmfuse.<backend>.<module>.<name>`; keeps the reason if it cannot."""
        try:
            module = importlib.import_module(f"mmfuse.{backend}.{self.module}")
        except ImportError as error:
            self._reasons[backend] = str(error)
            return
        _library.impl(
            f"{self.name}.{backend}", getattr(module, self.name), "CompositeExplicitAutograd"
        )

    def _register_derivatives(self, backend: str) -> None:
        """Registers what PyTorch's dispatcher does with gradients, tangents and batches.

        Calls of `torch.ops.mmfuse` and of compiled code come here; `__call__` does without it.
        """
        overload = self.overloads[backend]
        arguments = enumerate(overload._schema.arguments)
        self._written = [i for i, a in arguments if a.alias_info and a.alias_info.is_write]

        def autograd(keyset: Any, *args: Any) -> Any:
            def below(*args: Any) -> Any:
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

            self._check_recordable(args)
            if self._formula and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                if torch._C._are_functorch_transforms_active():
                    raise RuntimeError(
                        f"{overload} has no gradient under torch.func; call "
                        f"mmfuse.ops.{self.public}, which has one"
                    )
                return differentiable_call(below, args, *self._formula, backend)
            with torch._C._AutoDispatchBelowAutograd():
                return below(*args)

        def batched(*args: Any) -> Any:
            raise no_vmap(self.public)

        _library.impl(f"{self.name}.{backend}", autograd, "Autograd", with_keyset=True)
        _library.impl(f"{self.name}.{backend}", batched, "FuncTorchBatched")

    def _check_recordable(self, args: tuple[Any, ...]) -> None:
        """Raises an error where a derivative would be lost, other than documented."""
        written = [args[i] for i in self._written]
        if forward_ad._current_level >= 0:  # within a dual level
            if self._formula is not None:
                refuse_tangents(self.public, args)
            refuse_tangents(self.public, written, written=True)
        if written and torch.is_grad_enabled() and torch._C._any_requires_grad(*written):
            raise no_record(self.public)

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[..., Any]
    ) -> None:
        """Gives every overload the same gradient formula; `backward` gets the overload's name.

        Without one an op's results are constants, with neither gradient nor tangent. A formula
        that is to be differentiated calls ops by their `Op`, or plain PyTorch.
        """
        self._formula = (backward, setup_context)

    def register_no_second_derivative(self) -> None:
        """Makes derivatives of this op, which is the backward pass of another, an error."""
        self._formula = no_second_derivative(self.public)

    def why_missing(self, backend: str, device: str | torch.device | None = None) -> str | None:
        """The reason why this cell cannot run, or None when it can.

        Args:
            backend: One of `BACKENDS`.
            device: The tensors' device; None asks whether it runs on any device. Of GPUs,
                "cuda" is the current one.
        """
        if backend in self._reasons:
            return self._reasons[backend]
        where = torch.device(device) if device is not None else None
        kind = where.type if where is not None else None
        if backend in ("cpu", "cuda"):
            reason = _native.why_missing(backend)
            if reason is not None:
                return reason
            qualified = f"mmfuse::{self.name}.{backend}"
            kinds = (kind,) if kind else ("cpu", "cuda")
            if not any(_has_kernel(qualified, k) for k in kinds):
                return f"the {backend} backend has no {self.name} for {kind or 'any'} tensors"
        if backend == "cuda" and kind in ("cuda", None):
            return _why_not_on_gpu(where)
        if backend == "triton" and kind is not None:
            return _why_not_triton(kind)
        return None

    def resolve(self, backend: str | None, device: torch.device) -> str:
        """Chooses the backend for tensors on `device`.

        Raises:
            ValueError: `backend` is not the name of a backend.
            RuntimeError: the named backend is not available; the message says why.
        """
        # One GPU may be too old for kernels that another one runs: the index belongs to the key.
        key = (backend if backend is not None else _forced, device)
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = self._choose(key[0], device.type, device.index)
        return chosen

    def _choose(self, named: str | None, device_type: str, index: int | None) -> str:
        device = torch.device(device_type, index) if index is not None else device_type
        if named is not None:
            if named not in BACKENDS:
                raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {named!r}")
            reason = self.why_missing(named, device)
            if reason is not None:
                raise RuntimeError(f"backend {named!r} is not available for {self.name}: {reason}")
            return named
        order = preferred(self.name, device_type)
        reasons = {candidate: self.why_missing(candidate, device) for candidate in order}
        best = next(candidate for candidate in order if reasons[candidate] is None)
        if best != order[0]:
            _warn_slow(best, order[0], reasons[order[0]])
        return best

    # A graph holds the choice, not the looking: as torch.compiler.assume_constant_result says it,
    # which imports the compiler.
    _choose._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _kernel(self, backend: Eager, device: torch.device) -> Callable[..., Any]:
        """The overload itself, without the Python around it."""
        named = str(backend) or None  # a plain text: what is chosen is kept, and serves all calls
        found: Callable[..., Any] = self.overloads[self.resolve(named, device)]._op
        self._kernels[backend, _forced, device] = found
        return found

    def of_table(self, backend: Eager, device: torch.device) -> Callable[..., Any] | None:
        """The kernel that takes a table in the place of a list; None if the backend has none."""
        key = backend, _forced, device
        if key not in self._tables:
            found = None
            overload = self._of_tables.get(self.resolve(str(backend) or None, device))
            if overload is not None and _has_kernel(str(overload.name()), device.type):
                found = overload._op
            self._tables[key] = found
        return self._tables[key]

    def __call__(self, backend: str | None, device: torch.device, *args: Any) -> Any:
        if type(backend) is Eager:
            kernel = self._kernels.get((backend, _forced, device)) or self._kernel(backend, device)
            with torch._C._AutoDispatchBelowAutograd():
                return kernel(*args)
        if torch.compiler.is_compiling():
            # Not `resolve`: what that keeps would be a guard, which the next call breaks.
            named = backend if backend is not None else _forced
            return self.overloads[self._choose(named, device.type, device.index)](*args)
        chosen = self.resolve(backend, device)
        overload = self.overloads[chosen]
        if torch._C._are_functorch_transforms_active():
            if self._formula is None:
                return overload(*args)
            return transformed_call(self.public, overload, args, *self._formula, chosen)
        if self._written or forward_ad._current_level >= 0:
            self._check_recordable(args)
        formula = self._formula
        if formula and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return differentiable_call(overload._op, args, *formula, chosen)
        # Past the autograd key, whose Python kernel costs more than a small op does.
        with torch._C._AutoDispatchBelowAutograd():
            return overload._op(*args)


OPS: dict[str, Op] = {}


def _has_kernel(operator: str, device_type: str) -> bool:
    """True if an operator's overload has a kernel for tensors there."""
    key = "Meta" if device_type == "meta" else device_type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def _why_not_on_gpu(device: torch.device | None) -> str | None:
    """Why the CUDA kernels cannot run on a GPU; with None, on any that is here."""
    if not torch.cuda.is_available():
        return None
    if device is not None and device.index is not None:
        indices = [device.index]
    elif device is not None:
        indices = [torch.cuda.current_device()]
    else:
        indices = list(range(torch.cuda.device_count()))
    reasons = [_native.why_not_on(torch.cuda.get_device_capability(i)) for i in indices]
    return None if None in reasons else reasons[0]


def _why_not_triton(kind: str) -> str | None:
    """Why Triton, which is installed, does not run on tensors on this type of device."""
    triton_package: Any = importlib.import_module("mmfuse.triton")
    if kind == "cpu" and not triton_package.INTERPRETED:
        return "Triton runs on GPUs; on the CPU only with TRITON_INTERPRET=1 set before import"
    if kind in ("cpu", "cuda", "meta"):
        return None
    target = triton_package.active_target()
    if target != kind:
        return f"Triton does not run on {kind}: its active driver is for {target or 'nothing here'}"
    if not has_float64(kind):
        return f"Triton's kernels add up in float64, which this {kind} device lacks"
    return None


def _warn_slow(chosen: str, wanted: str, reason: str | None) -> None:
    if wanted not in _warned:
        _warned.add(wanted)
        warnings.warn(
            f"mmfuse uses its {chosen!r} backend because {wanted!r} is not available ({reason}); "
            "`python -m mmfuse` shows what is.",
            RuntimeWarning,
            stacklevel=4,
        )


class use_backend(AbstractContextManager["use_backend"]):  # noqa: N801 - reads as a function
    """Chooses the backend of every mmfuse op that is not given one.

    Takes effect when called and, used as a context manager, ends with the block::

        mmfuse.use_backend("triton")            # from here on
        with mmfuse.use_backend("reference"):   # for this block
            ...

    The setting is global to the process, not per thread, because the backward pass of PyTorch
    runs in threads of its own.

    Args:
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or None for the best one for
            each tensor's device.

    Raises:
        ValueError: `backend` is none of these.
    """

    def __init__(self, backend: str | None) -> None:
        global _forced
        if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        self._previous = _forced
        self._backend = _forced = backend

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._backend!r})"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._previous


def active_backend(op: str, device: torch.device | str = "cpu", backend: str | None = None) -> str:
    """The name of the backend that `op` runs on, for tensors on `device`.

    Args:
        op: Name of an op, such as "update_grads_".
        device: The tensors' device.
        backend: The name in the call; None for the default.

    Raises:
        ValueError: there is no op or no backend of this name.
        RuntimeError: the named backend is not available; the message says why.
    """
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {op!r}")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device must name a device, got {device!r}") from error
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a text or None, got {type(backend).__name__}")
    if where.type == "cuda" and where.index is None and torch.cuda.is_available():
        where = torch.device("cuda", torch.cuda.current_device())
    return OPS[op].resolve(backend, where)


def grid() -> Iterator[tuple[str, dict[str, str | None]]]:
    """Yields every public op with, for each backend, None or the reason why the cell is off."""
    for name, op in OPS.items():
        yield name, {backend: op.why_missing(backend) for backend in BACKENDS}
