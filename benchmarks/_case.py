"""What one thing to measure is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _inputs import Inputs
from _workloads import Workload

Check = Callable[[str, Any, Any], None]


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: What `--cases` calls it, and its function in every provider's module.
        title: What the report calls it.
        kind: The kind of workload that it runs on.
        ops: The mmfuse ops that a backend needs for it.
        make: Makes the inputs.
        check: Compares a provider's result with the reference; gets the provider's name, the
            inputs and the result.
        passes: How often at least one operand's worth of bytes is read or written; 0 where bytes
            are not what takes the time.
        operand: The attribute of the inputs that says how many bytes one operand has.
        encoders: How many encoders it needs.
        noisy: Whether it draws noise.
        autograd: Whether it runs a backward pass.
        half: Whether it also runs below float32.
    """

    name: str
    title: str
    kind: str
    ops: tuple[str, ...]
    make: Callable[..., Inputs]
    check: Check
    passes: int
    operand: str = "nbytes"
    encoders: int = 1
    noisy: bool = False
    autograd: bool = False
    half: bool = True

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the case can run with data of this dtype."""
        return self.half or dtype.itemsize >= 4

    def fits(self, workload: Workload, select: str = "all") -> bool:
        """Whether the case can run on this workload."""
        if self.kind != workload.kind:
            return False
        if self.kind != "gradients":
            return True
        left = [e for e in workload.encoders if select == "all" or any(len(s) == 4 for s in e)]
        return len(left) == len(workload.encoders) >= self.encoders

    def floor_bytes(self, inputs: Inputs) -> int:
        """The fewest bytes that must move: each operand read once, each result written once."""
        return self.passes * getattr(inputs, self.operand)
