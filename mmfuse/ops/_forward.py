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


def check_forward(method: str, state: Tensor, consequence: str) -> None:
    """Raises a RuntimeError in a backward pass; compiled, whenever it runs.

    Args:
        method: Whose forward pass is repeated.
        state: A tensor that it keeps, of which nothing changes.
        consequence: The end of "called in a backward pass, as activation checkpointing does, ...".
    """
    compiled = torch.compiler.is_compiling()
    if not compiled and torch._C._current_graph_task_id() == -1:
        return
    text = (
        f"{method} is called in a backward pass, as activation checkpointing does, {consequence}; "
        f"leave {method} outside of the checkpointed part"
    )
    if not compiled:
        raise RuntimeError(text)
    torch.ops.mmfuse.check_forward(state, text)


def in_forward(flag: Tensor) -> Tensor:
    """The flag; in compiled code that runs in a backward pass, False."""
    if not torch.compiler.is_compiling():
        return flag
    found: Tensor = flag & torch.ops.mmfuse.runs_forward(flag)
    return found
