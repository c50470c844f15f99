"""The base of everything that is measured, and the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch

from .inputs import Inputs
from .workloads import WORKLOADS, Workload

#: The cases by name, in the order of the files.
CASES: dict[str, Case] = {}

Made = TypeVar("Made", bound="type[Case]")


class Case(ABC):
    """One thing to measure, and everybody who can do it.

    A provider is a method that takes the inputs: `plain`, a training step without its method;
    `official`, the released sequence of calls; `foreach`, the best eager PyTorch we can write;
    `compile`, torch.compile of the reference. `mmfuse` takes the name of a backend as well. One
    that is missing is not measured.

    Attributes:
        name: Its name in `--cases`.
        title: Its name in the report.
        kind: The kind of workload that it runs on.
        ops: The mmfuse ops that a backend needs for it.
        passes: How often at least one operand's worth of bytes is read or written; 0 where bytes
            are not what takes the time.
        operand: The attribute of the inputs that says how many bytes one operand has.
        encoders: How many encoders it needs.
        noisy: True if it draws noise.
        autograd: True if it runs a backward pass.
        half: True if it also runs below float32.
        main: True if a run that has to be short measures it first.
        named_only: True if it is measured only where a plan or `--cases` names it.
        workloads: Those that nobody else runs on.
    """

    name: str
    title: str
    kind: str
    ops: tuple[str, ...] = ()
    passes: int = 0
    operand: str = "nbytes"
    encoders: int = 1
    noisy: bool = False
    autograd: bool = False
    half: bool = True
    main: bool = False
    named_only: bool = False
    workloads: ClassVar[tuple[Workload, ...]] = ()

    @abstractmethod
    def make(
        self, workload: Workload, dtype: torch.dtype, device: torch.device, **options: Any
    ) -> Inputs:
        """The inputs."""

    @abstractmethod
    def check(self, provider: str, i: Any, result: Any) -> None:
        """The gate: compares a provider's result with the reference.

        Raises:
            ParityError: it is wrong.
        """

    def provider(self, name: str) -> Callable[..., Any] | None:
        """A provider's method, if it has one; the backends' is `mmfuse`."""
        known = ("plain", "official", "foreach", "compile")
        return getattr(self, name if name in known else "mmfuse", None)

    def takes(self, dtype: torch.dtype) -> bool:
        """True if the case can run with data of this dtype."""
        return self.half or dtype.itemsize >= 4

    def fits(self, workload: Workload, select: str = "all") -> bool:
        """True if the case can run on this workload."""
        if self.kind != workload.kind:
            return False
        if self.kind != "gradients":
            return True
        left = [e for e in workload.encoders if select == "all" or any(len(s) == 4 for s in e)]
        return len(left) == len(workload.encoders) >= self.encoders

    def floor_bytes(self, inputs: Inputs) -> int:
        """The fewest bytes that must move: each operand read once, each result written once."""
        return self.passes * getattr(inputs, self.operand)


def register(made: Made) -> Made:
    """Adds a case, and the workloads of its own."""
    if made.name in CASES:
        raise ValueError(f"there are two cases {made.name}")
    CASES[made.name] = made()
    WORKLOADS.update({workload.name: workload for workload in made.workloads})
    return made
