"""Tensors of more than 2^31 elements: every index must be 64 bits wide."""

from __future__ import annotations

import os

import pytest
import tolerances
import torch

from mmfuse import NoiseStream, ops

ELEMENTS = 2**31 + 11
GIB = 2**30


def update_and_look_at_both_ends(device: str, backend: str) -> None:
    grad = torch.ones(ELEMENTS, dtype=torch.bfloat16, device=device)
    grad[-3:] = 5.0
    stats = ops.grad_stats([grad], backend=backend)
    assert stats.numel.tolist() == [ELEMENTS]
    # Three elements deviate by 4 from a mean of 1 + 12 / n.
    assert float(stats.m2) == pytest.approx(48.0, rel=1e-4)
    stream = NoiseStream(1, device)
    half = torch.full((1,), 0.5, device=device)
    ops.update_grads_([grad], half, noise_std=half, stream=stream, backend=backend)
    for start in (0, 2**31 - 8, ELEMENTS - 8):
        part = slice(start, start + 8)
        z = 0.5 * stream.normal(8, 0, start, dtype=torch.float64).cpu()
        scaled = torch.full((8,), 0.5, dtype=torch.float64)
        if start == ELEMENTS - 8:
            scaled[-3:] = 2.5
        expected = scaled + z
        zero = torch.zeros((), dtype=torch.float64)
        bound = tolerances.updated_grad(
            torch.bfloat16, expected, scaled, zero, torch.tensor(0.5), 2 * z
        )
        tolerances.assert_within(grad[part], expected, bound, f"elements from {start}")


def available_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < 8 * GIB, reason="needs 8 GiB of free memory")
def test_on_the_cpu() -> None:
    update_and_look_at_both_ends("cpu", "cpu")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_the_gpu(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("needs 40 GiB of free GPU memory")
    update_and_look_at_both_ends("cuda", backend)
