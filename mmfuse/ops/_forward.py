"""Operators that compiled code asks, whenever it runs, whether a backward pass runs around it.

A checkpointed forward pass is repeated in the backward pass. Compiled code cannot know it where it
is traced, and would draw, count and decide once more in silence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._registry import _library

# The state stands for what the caller is about to change: without it nothing would keep the call.
_library.define("check_forward(Tensor(a!) state, str text) -> ()")
_library.define("runs_forward(Tensor state) -> Tensor")


def in_backward() -> bool:
    """True if a backward pass runs in this thread."""
    return torch._C._current_graph_task_id() != -1


def _check_forward(state: Tensor, text: str) -> None:
    if in_backward():
        raise RuntimeError(text)


def _runs_forward(state: Tensor) -> Tensor:
    return torch.full((), not in_backward(), device=state.device)


_library.impl("check_forward", _check_forward, "CompositeExplicitAutograd")
_library.impl("runs_forward", _runs_forward, "CompositeExplicitAutograd")
torch.library.register_fake("mmfuse::check_forward", lambda state, text: None, lib=_library)
torch.library.register_fake(
    "mmfuse::runs_forward",
    lambda state: torch.empty((), dtype=torch.bool, device=state.device),
    lib=_library,
)


def check_forward(state: Tensor, text: str) -> None:
    """Raises a RuntimeError with this text in a backward pass; compiled, whenever it runs.

    Args:
        state: A tensor that the caller keeps, of which nothing changes.
        text: Of the error.
    """
    torch.ops.mmfuse.check_forward(state, text)


def runs_forward(state: Tensor) -> Tensor:
    """0-d bool: False in a backward pass; compiled, whenever it runs."""
    found: Tensor = torch.ops.mmfuse.runs_forward(state)
    return found
