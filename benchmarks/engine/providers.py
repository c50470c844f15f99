"""The providers: `official`, `foreach`, `compile`, and the backends of mmfuse that run here.

And `plain`, a training step without its method.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from mmfuse.ops._preference import PREFERENCE
from mmfuse.ops._registry import BACKENDS, OPS
from mmfuse.triton import INTERPRETED

from . import compiled
from .case import Case
from .gate import PLAIN
from .inputs import Inputs
from .measure import Prepared
from .workloads import Workload

REFERENCE = "reference"
OTHERS = (PLAIN, "official", "foreach", "compile")
_LARGEST_REFERENCE_NOISE = 2**26


def provider_names(device: torch.device) -> list[str]:
    """All providers for a device; the fastest backend last.

    The CUDA kernels' host shim and Triton's interpreter are for tests: on the CPU neither is here.
    """
    return [*OTHERS, *reversed(PREFERENCE[device.type])]


def why_not(name: str, case: Case, workload: Workload, device: torch.device) -> str | None:
    """The reason why a provider is not measured, or None."""
    if case.provider(name) is None:
        return "has no such function"
    if name == "compile":
        if workload.channels_last and case.noisy:
            return "its noise goes by the order in memory"
        return compiled.why_missing(device)
    if name not in BACKENDS:
        return None
    reason = why_no_backend(name, case.ops, device)
    if reason is not None:
        return reason
    if name == REFERENCE and case.noisy and workload.elements > _LARGEST_REFERENCE_NOISE:
        return "its noise is integer arithmetic in PyTorch: minutes a call at this size"
    return None


def why_no_backend(name: str, ops: Sequence[str], device: torch.device) -> str | None:
    """The reason why a backend cannot run these ops, or None."""
    if name == "triton" and INTERPRETED:
        return "Triton's interpreter is not timed"
    reasons = (OPS[op].why_missing(name, device.type) for op in ops)
    return next((reason for reason in reasons if reason is not None), None)


def prepare(name: str, case: Case, inputs: Inputs) -> Prepared:
    """The call to check and to time, with what must happen before each."""
    arguments = (inputs, name) if name in BACKENDS else (inputs,)
    return Prepared(
        partial(case.provider(name), *arguments),
        partial(inputs.restore, replaced=name == "official"),
        compiled=name == "compile",
    )
