"""`python -m mmfuse --check`: every operator on every backend that runs here, on a few numbers."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .noise import NoiseStream
from .ops._registry import BACKENDS, OPS, Op

# A share of a result's largest number. Sums of at most 74 float32 numbers are off by less than a
# tenth of it; a wrong index or a missing term is off by far more.
TOLERANCE = 1e-4


class Checked(NamedTuple):
    """How one operator on one backend and device compares with the reference on the CPU.

    Attributes:
        op: The operator.
        backend: Its backend.
        device: The device of its arguments.
        error: Largest difference, as a share of the largest number; None where there is none.
        problem: The reason why it is wrong; None if it is right.
    """

    op: str
    backend: str
    device: str
    error: float | None
    problem: str | None


def check(names: Collection[str] | None = None) -> Iterator[Checked]:
    """Compares operators, all unless named, of every backend that runs here with the reference."""
    own = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu", *([own.type] if own is not None else [])]
    for op in (op for name, op in OPS.items() if names is None or name in names):
        arguments = example(op)
        expected = _results(op, "reference", arguments, "cpu")
        for backend, device in itertools.product(BACKENDS, devices):
            itself = backend == "reference" and device == "cpu"
            if not itself and op.why_missing(backend, device) is None:
                yield _compared(op, backend, device, arguments, expected)


def example(op: Op) -> tuple[Any, ...]:
    """An operator's example, which lies beside its reference."""
    ids = itertools.count()

    def normal(*shape: int) -> Tensor:
        return NoiseStream(1, "cpu").normal(math.prod(shape), next(ids)).reshape(shape)

    module = importlib.import_module(f"mmfuse.reference.{op.module}")
    found: tuple[Any, ...] = module.examples(normal)[op.name]
    return found


def _compared(
    op: Op, backend: str, device: str, arguments: tuple[Any, ...], expected: list[Tensor]
) -> Checked:
    try:
        found = _results(op, backend, arguments, device)
    except Exception as error:
        return Checked(op.name, backend, device, None, f"{type(error).__name__}: {error}")
    worst = 0.0
    for got, right in zip(found, expected, strict=True):
        if got.shape != right.shape or got.dtype != right.dtype:
            kinds = (f"{x.dtype} {list(x.shape)}" for x in (got, right))
            problem = " in the place of ".join(kinds)
            return Checked(op.name, backend, device, None, problem)
        worst = max(worst, _difference(got.cpu(), right))
    if worst == math.inf:
        return Checked(op.name, backend, device, None, "NaN or infinite in other places")
    wrong = f"off by {worst:.1e} of its largest number" if worst > TOLERANCE else None
    return Checked(op.name, backend, device, worst, wrong)


def _results(op: Op, backend: str, arguments: tuple[Any, ...], device: str) -> list[Tensor]:
    """All that a call returns, and all arguments as it has left them."""
    own = [_copied(argument, device) for argument in arguments]
    with torch.no_grad():
        returned = op.overloads[backend](*own)
    return list(_tensors([returned, own]))


def _copied(argument: Any, device: str) -> Any:
    if isinstance(argument, Tensor):
        return argument.to(device, copy=True)
    if isinstance(argument, (list, tuple)):
        return [_copied(part, device) for part in argument]
    return argument


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _difference(got: Tensor, right: Tensor) -> float:
    """The largest difference of finite numbers; infinite if NaN or infinity stand elsewhere."""
    a, b = got.double(), right.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    largest = b[b.isfinite()].abs().max().item() if bool(b.isfinite().any()) else 0.0
    found = (torch.where(same, 0.0, a - b).abs().max() / max(largest, 1e-30)).item()
    return math.inf if math.isnan(found) else found
