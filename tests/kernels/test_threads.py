"""Small work stays on the calling thread; beside busy cores another one may come too late.

A call that some 100 µs on one thread are enough for, and that has more elements than PyTorch gives
a thread of its own. OpenMP starts a thread when it is first needed, so that a process that has none
yet tells who asks for one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import samples

ROOT = Path(__file__).resolve().parents[2]
TASKS = Path("/proc/self/task")

# A child for each op, so that one does not find the threads of another.
SCRIPT = """
import json, os, sys, traceback
import samples, torch
from mmfuse import ops

def large():
    grads, one = [torch.zeros(2**22)], torch.full((1,), 0.5)
    return lambda: ops.update_grads_(grads, one, backend="cpu")

calls = {name: module.short for name, module in samples.MODULES.items()}
found = {}
for name in ["large", *calls]:
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            torch.set_num_threads(1)
            with ops.use_backend("cpu"):
                call = large() if name == "large" else calls[name]("cpu")
                call()
                before = len(os.listdir("/proc/self/task"))
                torch.set_num_threads(4)
                call()
            os.write(write, str(len(os.listdir("/proc/self/task")) - before).encode())
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-2000:])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found[name] = pipe.read()
    os.wait()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def started() -> dict[str, str]:
    """How many threads a call has started, by the op's name; or the traceback of its failure."""
    if not TASKS.is_dir():
        pytest.skip("there is no /proc/self/task to count threads in")
    paths = [ROOT, ROOT / "tests" / "support"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_every_op_has_a_short_call() -> None:
    assert [name for name, module in samples.MODULES.items() if not hasattr(module, "short")] == []


@pytest.mark.parametrize("name", samples.MODULES)
def test_short_calls_start_no_thread(started: dict[str, str], name: str) -> None:
    assert started[name] == "0"


def test_large_calls_do(started: dict[str, str]) -> None:
    assert int(started["large"]) >= 1
