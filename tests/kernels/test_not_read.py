"""A gradient that stays as it is is not read: this process forbids it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
NUMBER = 9001  # more than a chunk

# A page that cannot be read stands for the first gradient.
SCRIPT = """
import ctypes, mmap, sys
import every_kernel, torch
from mmfuse import NoiseStream, ops

backend, how = sys.argv[1:]
if backend == "cuda":
    every_kernel.load_shim()
count = {number}
memory = mmap.mmap(-1, 4 * count)
closed = torch.frombuffer(memory, dtype=torch.float32, count=count)
libc = ctypes.CDLL(None, use_errno=True)
length = -(-4 * count // mmap.PAGESIZE) * mmap.PAGESIZE
assert libc.mprotect(ctypes.c_void_p(closed.data_ptr()), ctypes.c_size_t(length), 0) == 0
one, none = torch.tensor([1.0, 0.5]), torch.zeros(2)
ways = {{
    "plain": {{}},
    "noise": {{"noise_std": none, "stream": NoiseStream(3)}},
    "pull": {{"pull": none, "params": [closed, torch.ones(count)]}},
    "finite": {{"finite": torch.ones((), dtype=torch.bool)}},
}}
for name in how.split():
    grads = [closed, torch.ones(count)]
    ops.update_grads_(grads, one, backend=backend, **ways[name])
    assert grads[1].eq(0.5).all()
print("not read")
"""


def run(backend: str, how: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(number=NUMBER), backend, how],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a GPU's memory no page can be closed")
@pytest.mark.skipif(sys.platform != "linux", reason="closes a page of memory")
@pytest.mark.parametrize("backend", ["cpu", "cuda", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_scale_of_one_reads_nothing(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    done = run(backend, "plain" if backend == "triton" else "plain noise pull")
    assert done.stdout == "not read\n", f"{done.returncode} {done.stderr[-1000:]}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="as above")
@pytest.mark.skipif(sys.platform != "linux", reason="as above")
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_read_would_be_seen(backend: str) -> None:
    """`finite` asks for a look at every gradient."""
    done = run(backend, "finite")
    assert "not read" not in done.stdout and done.returncode == -signal.SIGSEGV
