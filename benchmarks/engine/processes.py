"""Processes of one thread each that agree on a group, and what is counted and timed in them."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Counter:
    """Counts calls of torch.distributed.all_reduce, which DDP and FSDP2 themselves do not use.

    FSDP2 gathers and scatters shards for a method's further passes; that is not counted.
    """

    def __init__(self) -> None:
        self.calls = self.numbers = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts for a while."""
        original = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.numbers += tensor.numel()
            return original(tensor, *args, **kwargs)

        dist.all_reduce = counted
        try:
            yield
        finally:
            dist.all_reduce = original


class OwnTime:
    """Time inside of some functions, less that inside of others which they call.

    Attributes:
        seconds: The sum so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def count(self, target: Any, *names: str) -> None:
        """Counts the time in these methods of an object."""
        for name in names:
            setattr(target, name, self._timed(getattr(target, name), 1.0))

    def leave_out(self, target: Any, *names: str) -> None:
        """Takes the time in these away again."""
        for name in names:
            setattr(target, name, self._timed(getattr(target, name), -1.0))

    def _timed(self, function: Callable[..., Any], sign: float) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            # A part that is left out counts only where it is called from what is counted.
            counts = sign > 0 or self._depth > 0
            self._depth += sign > 0
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += sign * counts * (time.perf_counter() - start)
                self._depth -= sign > 0

        return timed


def _work(target: Callable[..., Any], rank: int, size: int, folder: str, arguments: Any) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
        )
    result = target(*arguments)
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    if size > 1:
        dist.destroy_process_group()


def in_processes(target: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Runs the target in new processes, one for each tuple of arguments; returns what they return.

    Raises:
        RuntimeError: one of them has failed; it has printed why.
    """
    size = len(arguments)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_work, args=(target, rank, size, folder, mine))
            for rank, mine in enumerate(arguments)
        ]
        for process in processes:
            process.start()
        # One that fails leaves the others waiting for it.
        while any(process.is_alive() for process in processes):
            if any(process.exitcode not in (None, 0) for process in processes):
                for process in processes:
                    process.kill()
            processes[0].join(0.05)
        for process in processes:
            process.join()
        failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
        if failed:
            raise RuntimeError(f"{target.__name__} has failed in process {failed[0]} of {size}")
        return [pickle.loads((Path(folder) / f"{r}.pickle").read_bytes()) for r in range(size)]
