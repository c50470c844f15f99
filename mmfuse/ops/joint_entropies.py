"""joint_entropies: exact joint histograms and the entropies of all their margins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._devices import WIDE
from .._numbers import whole
from ..reference.joint_entropies import entropies
from ._arguments import check_sequence
from ._registry import Op
from ._tensors import FLOATING, check_dense, promoted

#: Most bins for pairs and for triples: the counts of one problem then fit a GPU's shared memory or
#: its L2 cache.
MAX_BINS = {2: 256, 3: 32}

#: Why variables must have one shape.
PAIRED = "the values are paired"


class JointEntropies(NamedTuple):
    """Histograms of Q pairs or triples of variables, of P problems each.

    Attributes:
        entropies: [Q, P, 2^order − 1] float64, or float32 on a device that lacks it, in nats. Entry
            k belongs to the variables whose bits are set in k + 1: for a pair H(0), H(1), H(0,1);
            for a triple H(0), H(1), H(0,1), H(2), H(0,2), H(1,2), H(0,1,2). NaN where the data of
            the problem have no finite range.
        counts: [Q, P, bins^order] int64; the first variable's bin is the slowest index. Zeros where
            the entropies are NaN.
    """

    entropies: Tensor
    counts: Tensor


def _fake(
    data: Sequence[Tensor], tuples: Sequence[int], order: int, bins: int
) -> tuple[Tensor, Tensor]:
    first = data[0]
    shape = (len(tuples) // order, first.shape[0])
    counts = torch.empty(*shape, bins**order, dtype=torch.int64, device=first.device)
    wide = WIDE[first.device.type]
    entropies = torch.empty(*shape, 2**order - 1, dtype=wide, device=first.device)
    return entropies, counts


_op = Op(
    "joint_entropies",
    "(Tensor[] data, int[] tuples, int order, int bins) -> (Tensor, Tensor)",
    _fake,
)


def joint_entropies(
    data: Sequence[Tensor],
    tuples: Sequence[Sequence[int]],
    bins: int,
    *,
    names: Sequence[str] | None = None,
    present: Tensor | None = None,
    backend: str | None = None,
) -> JointEntropies:
    """Joint histograms of pairs or triples of variables, and the entropies of all their margins.

    The bins are those of NumPy 2, whose edges have the data's precision: `bins` equal ones over
    each row's own range, closed on the left, the last one on both sides, constant data widened by
    0.5 to either side. The counts are exact. Nothing is differentiable. (If a range is so narrow
    that its step is subnormal, NumPy's edges may not ascend, and its counts mean nothing; here a
    value goes to the last bin that begins at or below it.)

    Equivalent to, for each pair (x, y) of rows::

        counts = numpy.histogram2d(x, y, bins)[0]
        H = lambda c: -sum(p * numpy.log(p) for p in c[c > 0] / c.sum())
        H(counts.sum(1)), H(counts.sum(0)), H(counts)

    Args:
        data: K variables [P, N]: P problems with N values each, on one device; float16, bfloat16,
            float32 or float64. Half precision counts as the float32 numbers it holds; mixed dtypes
            are promoted.
        tuples: Q pairs, or Q triples, of indices into `data`.
        bins: Number of bins for each variable: at most 256 for pairs, 32 for triples.
        names: The variables' names in errors; by default ``data[k]``.
        present: [P, N] bool, which of the paired values count; what the others hold does not
            matter. None for all. No number of it is read by the host.
        backend: Name of a backend; None for the best one.

    Returns:
        `JointEntropies`.

    Raises:
        TypeError: a variable is sparse, integer or complex, or `present` no bool tensor.
        ValueError: the variables or `present` differ in shape or device, hold no values, or `bins`
            or `tuples` are out of range.
    """
    if not isinstance(data, (list, tuple)):
        check_sequence("data", data)
    if not isinstance(tuples, (list, tuple)):
        check_sequence("tuples", tuples, "tuples")
    order = _order_of(tuples, len(data))
    bins = check_bins(bins, MAX_BINS[order])
    names = names or [f"data[{k}]" for k in range(len(data))]
    ready = paired_rows(names, data)
    flat = [k for members in tuples for k in members]
    if present is not None:
        check_mask(present, ready[0])
        ready = [_filled(x, present) for x in ready]
    found = JointEntropies(*_op(backend, ready[0].device, ready, flat, order, bins))
    return found if present is None else _without_the_filled(found, present, order, bins)


def check_mask(present: Tensor, values: Tensor) -> None:
    """Checks which of the paired values count.

    Raises:
        TypeError: it is no dense bool tensor.
        ValueError: it is not of the values' shape and device.
    """
    if not isinstance(present, Tensor) or present.dtype is not torch.bool:
        kind = present.dtype if isinstance(present, Tensor) else type(present).__name__
        raise TypeError(f"present must be a bool tensor, got {kind}")
    check_dense("present", present)
    if present.shape != values.shape or present.device != values.device:
        raise ValueError(
            f"present must be like the values, {list(values.shape)} on {values.device}, got "
            f"{list(present.shape)} on {present.device}"
        )


def _filled(x: Tensor, present: Tensor) -> Tensor:
    """The values with the smallest that counts in place of those that do not; 0 if none counts."""
    least = torch.where(present, x, torch.inf).amin(1, keepdim=True)
    found = torch.where(present, x, torch.where(least == torch.inf, 0.0, least).to(x.dtype))
    return found.contiguous()  # it takes over the mask's layout


def _without_the_filled(
    found: JointEntropies, present: Tensor, order: int, bins: int
) -> JointEntropies:
    """Takes out of the counts what `_filled` has put in: all of it lies in one cell.

    That cell is in the lowest bin of each variable that is not empty, since it has its smallest
    value.
    """
    counts = found.counts
    cube = counts.unflatten(-1, [bins] * order)
    cell = torch.zeros_like(counts[..., 0])
    for k in range(order):
        margin = cube.sum([2 + other for other in range(order) if other != k])
        cell = cell * bins + (margin > 0).to(torch.int64).argmax(-1)
    # A problem with a value that is not finite has counts of 0, and keeps them.
    extra = (~present).sum(1) * (counts.sum(-1) > 0)
    counts = counts.scatter_add(-1, cell.unsqueeze(-1), -extra.unsqueeze(-1))
    return JointEntropies(entropies(counts, order, bins), counts)


def are_usual(data: Sequence[Tensor]) -> bool:
    """True if the kernels can take the variables as they are: nearly all calls are like that."""
    first = data[0]
    if False in [isinstance(x, Tensor) for x in data] or first.dim() != 2 or first.numel() == 0:
        return False
    if first.layout is not torch.strided or first.dtype not in FLOATING:
        return False
    kinds = {(x.dtype, x.shape, x.device, x.layout, x.requires_grad) for x in data}
    usual = (first.dtype, first.shape, first.device, first.layout, False)
    return kinds == {usual} and False not in [x.is_contiguous() for x in data]


def paired_rows(names: Sequence[str], data: Sequence[Tensor]) -> list[Tensor]:
    """The variables, contiguous, of one dtype and without a gradient; errors call them by names.

    Raises:
        TypeError: a variable is sparse, integer or complex.
        ValueError: they differ in shape or device, are not [P, N], or hold no values.
    """
    # Usual arguments cost the least; only others are looked at one by one.
    if are_usual(data):
        return list(data)
    rows = promoted(names, data, PAIRED, "[P, N]", 2)
    check_not_empty(names[0], rows[0])
    return [x.detach().contiguous() for x in rows]


def check_not_empty(name: str, values: Tensor) -> None:
    """Raises a ValueError if there is nothing to count."""
    if values.numel() == 0:
        raise ValueError(f"{name} is empty ({list(values.shape)}); there is nothing to count")


def _order_of(tuples: Sequence[Sequence[int]], count: int) -> int:
    for q, members in enumerate(tuples):
        if not isinstance(members, (list, tuple)):
            check_sequence(f"tuples[{q}]", members, "integers")
    orders = {*map(len, tuples)}
    if orders != {2} and orders != {3}:
        raise ValueError(f"tuples must hold pairs or triples of indices, got {list(tuples)}")
    for members in tuples:
        if any(not 0 <= whole("tuples", k) < count for k in members):
            raise ValueError(f"tuples must index the {count} variables, got {tuple(members)}")
    return orders.pop()


def check_bins(bins: int, most: int, least: int = 1, name: str = "bins") -> int:
    """The number of bins, as Python's own integer.

    Raises:
        TypeError: it is no integer.
        ValueError: it is out of range.
    """
    found = whole(name, bins)
    if not least <= found <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {found}")
    return found
