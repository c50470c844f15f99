"""Processes in which Accelerate works."""

from __future__ import annotations

import os

from accelerate.state import AcceleratorState, GradientState


def reset() -> None:
    """Accelerate keeps what the first Accelerator of a process was made with."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def launched(rank: int) -> None:
    """Tells Accelerate what a launcher would; the processes and their group are there already."""
    reset()
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in told.items()})
    # Accelerate would ask psutil for a number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def ended() -> None:
    reset()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
