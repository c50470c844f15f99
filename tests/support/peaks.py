"""How much memory a call takes at its peak, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Not getrusage: its peak begins with that of the process which has started this one.
SCRIPT = """
import torch
from mmfuse import ops
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0])
{setup}
before = peak()
{call}
print(peak() - before)
"""


def megabytes(setup: str, call: str) -> float:
    """By how much a call raises the peak; `setup` makes its inputs, and a small call first."""
    script = SCRIPT.format(setup=setup, call=call)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024
