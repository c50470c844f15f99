"""A step recorded once and replayed: by a CUDA graph, or on the CPU by what stands in for one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recording(TorchDispatchMode):
    """Every operator, and the tensors it was called on and has returned.

    A replay calls the same operators on the same tensors and writes the results to where they were
    then, as a CUDA graph does with its addresses. Whatever a step keeps in Python, or puts in
    a new tensor that the next step is to read, stays as it was when it was recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        # `torch.tensor(values)`: the copy from the host would make a capture fail.
        assert func.name() != "aten::lift_fresh", "the step makes a tensor from values of the host"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, _tensors(out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self._calls:
            for result, now in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                if result.data_ptr() != now.data_ptr():  # neither a view nor updated in place
                    result.copy_(now)


def _tensors(out: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


class Captured:
    """Records a step, and has then run it once.

    The step must have been run before, as CUDA graphs want it, and works on tensors that stay
    where they are.

    Attributes:
        result: The step's result; later replays overwrite the tensors in it.
    """

    def __init__(self, step: Callable[[], Any], device: str) -> None:
        if device == "cuda":
            # An earlier test's graphs and memory must not be given back in the midst of a capture.
            gc.collect()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.result = step()
            self.replay = graph.replay
            self.replay()  # a capture runs nothing
        else:
            recording = _Recording()
            with recording:
                self.result = step()
            self.replay = recording.replay
