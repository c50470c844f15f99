"""The operators that a call hands to PyTorch's dispatcher, and those that launch a kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Ops that are two kernels: the parts of a large batch, or of a tensor, are added in a second one.
TWO_KERNELS = ("modality_scores", "grad_stats")


class Launches(TorchDispatchMode):
    """Counts the operators that compute something, by name; views and allocations do not.

    Attributes:
        operators: How often each of these was called.
        calls: Of any operator, views and allocations too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.calls = 0
        self._more = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if not func.is_view and "empty" not in func._opname:
            # An op is the same op where its gradients come in a table.
            self.operators[func._opname.replace("_table", "")] += 1
        if func._opname == "update_grads_table_":
            # To take the stream on is a second, tiny kernel on a GPU, unless blocks are counted.
            alone = args[-2] is True and args[-1] is None
            self._more += alone and func._overloadname == "cuda"
        if func._opname == "modulation_factors_table":
            self._more += args[0] is not None  # the statistics, before what is decided from them
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        """The kernels of all operators, each of mmfuse's with as many as it has at most."""
        second = sum(self.operators[name] for name in TWO_KERNELS)
        return self.operators.total() + second + self._more


def launches_of(call: Callable[[], object]) -> Launches:
    with Launches() as counted:
        call()
    return counted
