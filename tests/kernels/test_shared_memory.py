"""Dynamic shared memory that a kernel must ask for: more than 48 KiB with its own variables."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.launches import kernels_shim
from torch import Tensor

from mmfuse import ops

# Bins of histograms in float64 that one block holds. The first takes 49,152 or 48,688 bytes, which
# are free only in a kernel without variables of its own; the third less than the second, whose
# permission must stay: another thread may be about to launch with it.
BINS = {"soft_histogram": (64, 80, 70), "joint_entropies": (106, 120, 110)}


def histogram(op: str, bins: int, device: str, backend: str) -> Tensor:
    x = torch.arange(400.0, dtype=torch.float64, device=device).view(2, 200)
    if op == "soft_histogram":
        return ops.soft_histogram(x, x.flip(1), bins, backend=backend)
    return ops.joint_entropies([x, x.flip(1)], [(0, 1)], bins, backend=backend).counts[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", BINS)
def test_kernels_ask_for_shared_memory_that_is_just_not_free(op: str, device: str) -> None:
    if device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("the kernels run on the GPU, not in the shim")
        kernels_shim().forget_permissions()
    for bins in BINS[op]:
        expected = histogram(op, bins, device, "reference")
        torch.testing.assert_close(histogram(op, bins, device, "cuda"), expected)
