"""Who is measured: `official`, `foreach`, `compile`, and the backends of mmfuse that run here.

And `plain`, a training step without its method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import _compile
import _foreach
import _mmfuse
import _official
import _official_information
import _official_training
import _plain
import torch
from _cases import Case
from _inputs import Inputs
from _measure import Prepared
from _parity import PLAIN
from _workloads import Workload

from mmfuse.ops._preference import PREFERENCE
from mmfuse.ops._registry import OPS
from mmfuse.triton import INTERPRETED

_OTHERS = {
    PLAIN: (_plain,),
    "official": (_official, _official_information, _official_training),
    "foreach": (_foreach,),
    "compile": (_compile,),
}
_LARGEST_REFERENCE_NOISE = 2**26


def provider_names(device: torch.device) -> list[str]:
    """All providers for a device; the fastest backend last.

    The CUDA kernels' host shim and Triton's interpreter are for tests: on the CPU neither is here.
    """
    return [*_OTHERS, *reversed(PREFERENCE[device.type])]


def why_not(name: str, case: Case, workload: Workload, device: torch.device) -> str | None:
    """The reason why a provider is not measured, or None."""
    if name in _OTHERS:
        if function_of(name, case) is None:
            return "has no such function"
        if name == "compile" and workload.channels_last and case.noisy:
            return "its noise goes by the order in memory"
        return _compile.why_missing(device) if name == "compile" else None
    reason = why_no_backend(name, case.ops, device)
    if reason is not None:
        return reason
    if name == "reference" and case.noisy and workload.elements > _LARGEST_REFERENCE_NOISE:
        return "its noise is integer arithmetic in PyTorch: minutes a call at this size"
    return None


def function_of(name: str, case: Case) -> Callable[..., Any] | None:
    """What a provider does for a case, if it does it."""
    modules = _OTHERS.get(name, (_mmfuse,))
    return next((getattr(m, case.name) for m in modules if hasattr(m, case.name)), None)


def why_no_backend(name: str, ops: Sequence[str], device: torch.device) -> str | None:
    """The reason why a backend cannot run these ops, or None."""
    if name == "triton" and INTERPRETED:
        return "Triton's interpreter is not timed"
    reasons = (OPS[op].why_missing(name, device.type) for op in ops)
    return next((reason for reason in reasons if reason is not None), None)


def prepare(name: str, case: Case, inputs: Inputs) -> Prepared:
    """The call to check and to time, with what must happen before each."""
    arguments = (inputs,) if name in _OTHERS else (inputs, name)
    return Prepared(
        partial(function_of(name, case), *arguments),
        partial(inputs.restore, replaced=name == "official"),
        compiled=name == "compile",
    )
