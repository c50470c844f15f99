"""One build for every x86-64 machine: each instruction set gives the same results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfuse import _native

ROOT = Path(__file__).resolve().parents[2]

# Bits of every kernel's results on fixed inputs of awkward sizes.
SCRIPT = """
import torch, mmfuse
from mmfuse import ops
torch.manual_seed(0)
print(mmfuse._native.build_info()["simd"])
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    grads = [torch.randn(n).to(dtype) for n in (1, 31, 4097, 70001)]
    ops.update_grads_(grads, torch.rand(4), noise_std=torch.rand(4), stream=mmfuse.NoiseStream(1))
    stats = ops.grad_stats(grads)
    print(*(float(g.double().sum()) for g in grads), *stats.mean.tolist(), *stats.m2.tolist())
scores = ops.modality_scores([torch.randn(65, 309), torch.randn(65, 6)], torch.arange(65) % 6)
print(*scores.prob.tolist(), *scores.log_prob.tolist())
"""


def run(simd: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "MMFUSE_SIMD": simd},
        capture_output=True,
        text=True,
        check=False,
    )


def levels() -> list[str]:
    info = _native.build_info()
    return [] if info is None else list(info["simd_built"])


@pytest.mark.slow
def test_levels_agree() -> None:
    results = {}
    for level in levels():
        done = run(level, "-c", SCRIPT)
        if done.returncode and "cannot run here" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0] == level
        results[level] = [[float(x) for x in line.split()] for line in lines[1:]]
    assert "generic" in results
    for level, rows in results.items():
        for row, reference in zip(rows, results["generic"], strict=True):
            # Sums of 70,001 elements, each within the noise contract of the other level's.
            assert row == pytest.approx(reference, rel=1e-5, abs=1e-2), level


@pytest.mark.slow
def test_generic_code_passes_the_parity_tests() -> None:
    names = ["update_grads", "grad_stats", "modality_scores", "scale_grad"]
    files = ["tests/test_noise.py", *(f"tests/ops/test_{name}.py" for name in names)]
    done = run(
        "generic",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "cpu-cpu",
        *files,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_an_impossible_level_is_an_error() -> None:
    done = run("sse9", "-c", "import mmfuse, torch; mmfuse.ops.grad_stats([torch.ones(3)])")
    assert done.returncode == 1
    assert "RuntimeError: mmfuse: MMFUSE_SIMD=sse9 cannot run here; this machine" in done.stderr
    # Importing never fails, so that the report can say it.
    done = run("sse9", "-m", "mmfuse")
    assert done.returncode == 0, done.stderr
    assert "none: mmfuse: MMFUSE_SIMD=sse9 cannot run here" in done.stdout
