"""Processes with a gloo group between them, started once and kept for many tests.

A test gives a function of its module and arguments; every rank calls ``function(rank, *arguments)``
and its result comes back, pickled by value. A rank that raises ends all of them, because the others
may wait for it in a collective; the next call starts new ones.
"""

from __future__ import annotations

import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120.0


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while (request := pipe.recv_bytes()) != b"":
        try:
            function, arguments = pickle.loads(request)
            torch.manual_seed(0)
            reply = (True, function(rank, *arguments))
        except Exception:
            reply = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))
    dist.destroy_process_group()


class Ranks:
    """`size` processes that form one group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = get_context("spawn")
        self.processes, self._pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Every rank's result of ``function(rank, *arguments)``."""
        request = pickle.dumps((function, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(request)
        results: dict[int, Any] = {}
        end = monotonic() + TIMEOUT
        while len(results) < self.size:
            open_pipes = [p for r, p in enumerate(self._pipes) if r not in results]
            ready = wait(open_pipes, timeout=max(0.0, end - monotonic()))
            if not ready:
                self.close()
                missing = [r for r in range(self.size) if r not in results]
                raise TimeoutError(f"ranks {missing} did not answer within {TIMEOUT} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    succeeded, result = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    succeeded, result = False, "the process has ended"
                if not succeeded:
                    self.close()
                    raise AssertionError(f"rank {rank} of {self.size}:\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(self.size)]

    @property
    def alive(self) -> bool:
        return bool(self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self.processes, self._pipes = [], []
        self._folder.cleanup()


_known: dict[int, Ranks] = {}


def ranks(size: int) -> Ranks:
    """The kept processes, or new ones."""
    if size not in _known or not _known[size].alive:
        _known[size] = Ranks(size)
    return _known[size]


def close_all() -> None:
    for kept in _known.values():
        kept.close()
    _known.clear()
