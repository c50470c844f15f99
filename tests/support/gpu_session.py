"""The tests' order on a GPU, and the end of a worker that has lost the device.

After an illegal access every later call of CUDA in the process fails, so that one bad kernel would
turn all tests of its worker red. The worker ends instead, and pytest-xdist starts another in its
place. The test that was to run next counts as failed by the crash; `make gpu` runs what failed once
more.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

CODE = 86
# On a GPU that is lent for minutes, what says the most comes first.
FIRST = ("test_gpu.py", "test_cuda_graph.py", "test_update_grads.py", "test_grad_stats.py")


def turn(item: pytest.Item) -> int:
    """A test's place: those of the reference, which is PyTorch's own kernels, are last."""
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    # A backend's name, or cells.Cell.
    if any(str(value) == "reference" or value == ("reference", "cuda") for value in parameters):
        return len(FIRST) + 1
    return FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST)


def is_lost() -> bool:
    """True if this process can no longer use its GPU."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def replace_worker_with_a_lost_device(nodeid: str) -> None:
    """Ends a worker of pytest-xdist before its next test, if its device is lost."""
    if "PYTEST_XDIST_WORKER" in os.environ and is_lost():
        # The error was reported with the test before.
        print(f"{nodeid}: the GPU is lost to this process, which ends", file=sys.stderr, flush=True)
        os._exit(CODE)
