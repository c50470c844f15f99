"""The base of what is measured in processes of its own, where a case brings its own clock."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .case import Case
from .inputs import Inputs
from .measure import Sample
from .workloads import Workload


@dataclass(frozen=True)
class Found:
    """Results of all processes.

    Attributes:
        samples: Name of a kind of step → times; "plain" is a step without a method.
        own: The same names → seconds of an adapter's own code in a step.
        reduced: The same names → numbers that go to the other ranks in a step.
    """

    samples: Mapping[str, Sequence[Sample]]
    own: Mapping[str, float] = field(default_factory=dict)
    reduced: Mapping[str, int] = field(default_factory=dict)


class ProcessCase(Case):
    """Its rows are not providers of one call, but kinds of steps that take turns.

    Their numbers are the tests' of the methods to check; the gate here is about what is reduced.
    """

    half = False
    named_only = True

    def make(self, workload: Workload, *arguments: Any, **options: Any) -> Inputs:
        """Made in the processes.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self.name} makes its inputs in its processes")

    def check(self, provider: str, i: Any, result: Any) -> None:
        """Checks nothing: `measure` does."""

    @abstractmethod
    def measure(self, workload: Workload, seconds: float) -> Found:
        """Times all steps; at least a few rounds, then as many as fit into the seconds.

        Raises:
            ParityError: something was reduced that should not be.
        """
