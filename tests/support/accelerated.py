"""Processes in which Accelerate works, and the methods that its adapters are tested with."""

from __future__ import annotations

import os

from accelerate.state import AcceleratorState, GradientState
from torch import nn

from mmfuse import OGM, InfoReg, NoiseStream, RedReg


def reset() -> None:
    """Accelerate keeps what the first Accelerator of a process was made with."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def ogm_ge(encoders: dict[str, nn.Module]) -> OGM:
    return OGM(encoders, stream=NoiseStream(3))


def inforeg(encoders: dict[str, nn.Module]) -> InfoReg:
    return InfoReg(encoders, threshold=-10.0)  # the window is open from the third epoch on


def redreg(encoders: dict[str, nn.Module]) -> RedReg:
    # Whoever is ahead is regulated, in every step.
    return RedReg(encoders, epochs=3, threshold=-1e9, agreement=(-2.0, -2.0), stream=NoiseStream(4))


def launched(rank: int) -> None:
    """What a launcher tells Accelerate; the processes and their group are there already."""
    reset()
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in told.items()})
    # Accelerate would ask psutil for a number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def ended() -> None:
    reset()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
