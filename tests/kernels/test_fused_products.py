"""Compilers may fuse a product with a sum: where equals are compared, no kernel lets them."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu.build import CSRC, FLAGS, HERE, RUNTIME

SOURCES = [
    HERE.parent / "fused_products.cu",
    CSRC / "cuda" / "information_pull_kernel.cu",
    CSRC / "cuda" / "redundancy_pull_kernel.cu",
    *RUNTIME,
]


def printed(folder: Path, *flags: str) -> list[list[str]]:
    """Names and bits of the kernels' results, built with these flags."""
    program = folder / "program"
    include = [f"-I{HERE}", f"-I{CSRC}"]
    command = [os.environ.get("CXX", "g++"), *FLAGS, "-O3", *flags, *include, "-x", "c++"]
    subprocess.run([*command, *map(str, SOURCES), "-o", str(program)], check=True, timeout=500)
    done = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
    return [line.split() for line in done.stdout.splitlines()]


def instructions() -> list[str]:
    """Flags for this processor's fused instructions."""
    if platform.machine() != "x86_64":
        return []
    if " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor does not multiply and add at once")
    return ["-mfma"]


@pytest.mark.slow
def test_fused_products_change_no_comparison(tmp_path: Path) -> None:
    """The CUDA kernels and their formulas, which the C++ kernels share, in the host shim."""
    apart = printed(tmp_path, "-ffp-contract=off")
    fused = printed(tmp_path, "-ffp-contract=fast", *instructions())
    assert len(apart) == 7 * 40
    assert fused == apart
    # The least of all scores is ahead of nobody, itself included.
    gaps = [float.fromhex(value) for name, value in apart if name == "gap"]
    assert gaps.count(0.0) == 3
