"""Differences between a kernel's results and the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tolerances
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def compared(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[str]:
    """A line for each output that differs."""
    if len(found) != len(expected):
        return [f"{len(found)} outputs instead of {len(expected)}"]
    return [
        f"output {i}: {why}"
        for i, (x, y) in enumerate(zip(found, expected, strict=True))
        if (why := difference(x, y)) is not None
    ]


def difference(found: Tensor, expected: Tensor) -> str | None:
    """How an output differs by more than `tolerances.whole_case` allows, or None."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        what = f"{found.dtype} {list(found.shape)}"
        return f"is {what} instead of {expected.dtype} {list(expected.shape)}"
    if not found.is_floating_point():
        wrong = int((found != expected).sum())
        return f"{wrong} of {found.numel()} differ" if wrong else None
    error = (found.double() - expected.double()).abs()
    share = error / tolerances.whole_case(expected)
    # A NaN is no smaller than anything; where the reference has one, it is the right result.
    share = share.where(~(found.isnan() & expected.isnan()), 0.0)
    wrong = int((~(share <= 1)).sum())
    if not wrong:
        return None
    where = int(share.nan_to_num(torch.inf).argmax())
    x, y = found.flatten()[where].item(), expected.flatten()[where].item()
    return f"{wrong} of {found.numel()} differ; [{where}] is {x:.8g} instead of {y:.8g}"


def outcome(call: Callable[..., Any], arguments: Any) -> list[Tensor]:
    """The results of a call, and its arguments afterwards: some ops work in place."""
    out = call(*arguments)
    found = [x for x in (*tree_leaves(out), *tree_leaves(arguments)) if isinstance(x, Tensor)]
    return [x.detach() for x in found]


def copied(arguments: Any, device: str | None = None, *, wide: bool = False) -> Any:
    """The arguments anew, without their graphs; elsewhere, or with float64 for each float."""

    def copy(x: Tensor) -> Tensor:
        dtype = torch.float64 if wide and x.is_floating_point() else x.dtype
        return x.detach().to(device or x.device, dtype, copy=True)

    return tree_map_only(Tensor, copy, arguments)
