"""A provider's call recorded as a CUDA graph: what its replay takes is the device's own time.

An eager call takes its launches too: a step of seven kernels is some 250 µs of the host, whatever
the kernels take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .case import Case
from .cost import Cost
from .inputs import Inputs
from .measure import Call, Prepared

_WARM_UPS = 2


@dataclass(frozen=True)
class Recording:
    """A recorded call.

    Attributes:
        replay: Does again on the device what was recorded, on the same tensors.
        result: The call's result; every replay writes it anew.
    """

    replay: Call
    result: Any


Recorder = Callable[[Prepared], Recording]


def name_of(provider: str) -> str:
    """The name of the samples of a provider's replays."""
    return f"{provider}, replayed"


def recorder_for(device: torch.device) -> Recorder | None:
    """The function that records calls on a device, if there is one."""
    return record_on_cuda if device.type == "cuda" else None


def why_not(provider: str, case: Case, cost: Cost) -> str | None:
    """The reason why a call is not recorded, or None."""
    if case.kind == "training":
        return "its gradients are new tensors in every step"
    if provider == "official" and case.kind == "gradients":
        return "it puts new tensors in the place of its gradients"
    # A failed recording costs more than its time, see `record_on_cuda`.
    if cost.host_syncs:
        return f"it waits for the device ({cost.host_syncs} times)"
    return None


def record_on_cuda(prepared: Prepared) -> Recording:
    """Records a call in a CUDA graph, after some on a stream of their own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            prepared.restore()
            prepared.call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = prepared.call()
    except Exception:
        # PyTorch's generator would go on taking everything for a part of the recording.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        raise
    return Recording(graph.replay, result)


def checked_replay(
    provider: str, case: Case, inputs: Inputs, prepared: Prepared, record: Recorder
) -> Prepared:
    """Records a call, and compares what a replay gives with the reference.

    Raises:
        ParityError: the replay's result is wrong.
    """
    recording = record(prepared)
    # A result that a replay does not write must not look as if it had been.
    with torch.no_grad():
        for leaf in tree_leaves(recording.result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf.fill_(torch.nan)
    prepared.restore()
    recording.replay()
    case.check(provider, inputs, recording.result)
    return Prepared(recording.replay, prepared.restore, queued=True)
