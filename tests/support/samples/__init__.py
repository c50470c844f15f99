"""The arguments that the tests run each op on: one module for each, found by the op's name.

A new op is a new file here; test_op_contract.py, every_kernel.py, .ci/compile_triton.py and
.ci/instructions.py go through all of them. In a module are, by these names,

* `arguments(device)`: of each operator of the op, those of its overloads: usual, empty, of several
  dtypes and layouts, with every optional part present;
* `case(inputs)`: calls such that each kernel of each backend is launched, in all its variants; it
  returns what they have written;
* `small(device)`: a call of the public op, on few numbers: what the host does for it is counted;
* `short(device)`: a call, with its backward pass, of whose kernels each takes at most 100 µs on one
  thread, on more than one chunk of numbers: it may start no other thread;

and where they are needed

* `undefined(device)`: arguments whose result is NaN;
* `bounds`: of an operator, how far its outputs may be from the reference in float64: a function of
  the arguments and of the outputs. Without one `tolerances.whole_case` is the bound;
* `compiled(inputs)`: calls that launch what is compiled for GPUs ahead of time, where that is less
  than all that `case` launches.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from ._inputs import SEED, Inputs, Samples

__all__ = ["BOUNDS", "CASES", "MODULES", "SEED", "Inputs", "Samples", "arguments", "undefined"]

Case = Callable[[Inputs], list[Tensor]]
Bound = Callable[[Sequence[Any], Sequence[Tensor]], Sequence[Tensor]]

#: Modules by the op's name, which is that of its file in every backend's folder.
MODULES: dict[str, ModuleType] = {
    info.name: importlib.import_module(f"{__name__}.{info.name}")
    for info in pkgutil.iter_modules(__path__)
    if not info.name.startswith("_")
}
CASES: dict[str, Case] = {name: module.case for name, module in MODULES.items()}
#: Bounds by the operator's name.
BOUNDS: dict[str, Bound] = {
    operator: bound
    for module in MODULES.values()
    for operator, bound in getattr(module, "bounds", {}).items()
}


def arguments(device: str) -> Samples:
    """Arguments of every operator's overloads."""
    return _gathered("arguments", device)


def undefined(device: str) -> Samples:
    """Arguments of some operators' overloads, whose result is NaN."""
    return _gathered("undefined", device)


def _gathered(kind: str, device: str) -> Samples:
    found: Samples = {}
    for module in MODULES.values():
        if hasattr(module, kind):
            found |= getattr(module, kind)(device)
    return found
