"""State: the small tensors of a method that outlive a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class State(dict[str, Tensor]):
    """Named tensors of fixed shape on one device, changed in place only.

    Args:
        method: Whose state it is, for error texts.
        device: Where the tensors are made.
    """

    def __init__(self, method: str, device: torch.device) -> None:
        super().__init__()
        self.method = method
        self.device = device

    def add(self, name: str, *size: int, dtype: torch.dtype = torch.float64) -> None:
        """Adds a tensor of zeros."""
        self[name] = torch.zeros(size, dtype=dtype, device=self.device)

    def follow(self, device: torch.device) -> None:
        """Moves to where the encoders are now."""
        if self.device != device:
            self.device = device
            self.update({name: tensor.to(device) for name, tensor in self.items()})

    def check(self, saved: Mapping[str, Any], others: Sequence[str]) -> None:
        """Checks that `saved` holds these tensors and the entries `others`.

        Raises:
            ValueError: an entry is missing or has another shape; it is named.
        """
        missing = [name for name in (*self, *others) if name not in saved]
        if missing:
            raise ValueError(f"the state of {self.method} lacks {missing}")
        for name, tensor in self.items():
            loaded = saved[name]
            if not isinstance(loaded, Tensor) or loaded.shape != tensor.shape:
                got = list(loaded.shape) if isinstance(loaded, Tensor) else type(loaded).__name__
                raise ValueError(
                    f"{name!r} in the state of {self.method} must be a tensor of shape "
                    f"{list(tensor.shape)}, got {got}"
                )

    def load(self, saved: Mapping[str, Any]) -> None:
        """Takes over the values."""
        for name, tensor in self.items():
            tensor.copy_(saved[name])


def in_backward() -> bool:
    """Whether a backward pass runs, as it does when a checkpointed forward pass is repeated."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
