"""Properties that only a GPU can show: streams, a second device, and the CPU's noise."""

from __future__ import annotations

from typing import Any

import pytest
import samples
import torch
from comparing import copied, outcome
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mmfuse import NoiseStream, ops
from mmfuse.ops._registry import OPS

pytestmark = pytest.mark.gpu

BACKENDS = ["reference", "triton", "cuda"]
# Some ten milliseconds: longer than a call takes to be launched.
_CYCLES = 20_000_000


def poisoned(arguments: Any) -> Any:
    """The same shapes; numbers that would show in every result."""

    def poison(x: Tensor) -> Tensor:
        # Labels, seeds and masks stay what they are: others might be out of range.
        return x.detach().clone().fill_(torch.nan) if x.is_floating_point() else x.clone()

    return tree_map_only(Tensor, poison, arguments)


def delayed(stream: torch.cuda.Stream, source: Any, target: Any) -> None:
    """Fills `target` on the stream, after a while."""
    torch.cuda._sleep(_CYCLES)
    for new, old in zip(tree_leaves(source), tree_leaves(target), strict=True):
        if isinstance(new, Tensor):
            old.copy_(new)
            old.record_stream(stream)


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_on_a_stream_of_ones_own(backend: str, op: str) -> None:
    """A kernel on any other stream would run before its inputs are there."""
    overload = getattr(getattr(torch.ops.mmfuse, op), backend)
    for arguments in samples.arguments("cuda")[op]:
        expected = outcome(overload, copied(arguments))
        late = poisoned(arguments)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            delayed(stream, arguments, late)
            found = outcome(overload, late)
        stream.synchronize()
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_on_a_second_device(backend: str, op: str) -> None:
    """The first one is current meanwhile."""
    overload = getattr(getattr(torch.ops.mmfuse, op), backend)
    with torch.cuda.device(0):
        for arguments in samples.arguments("cuda:1")[op]:
            there = tree_map_only(Tensor, lambda x: x.detach().to("cuda:0"), arguments)
            expected = outcome(overload, there)
            found = outcome(overload, copied(arguments))
            assert torch.cuda.current_device() == 0
            for x, y in zip(found, expected, strict=True):
                assert x.device.index == 1
                torch.testing.assert_close(x.to("cuda:0"), y, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_noise_is_that_of_the_cpu(backend: str) -> None:
    """They agree to the contract's 1e-5·(1 + |z|), element for element."""
    sizes, ids, offsets = [1, 7, 4096, 100_003], [3, 0, 2**32 - 1, 12], [0, 5, 2**33 + 2, 1]
    seed = -(2**62) - 7
    on_gpu, on_cpu = NoiseStream(seed, "cuda"), NoiseStream(seed)
    for stream in (on_gpu, on_cpu):
        stream.advance(41)
    grads = [torch.zeros(n, device="cuda") for n in sizes]
    ones = torch.ones(len(sizes), device="cuda")
    placed = on_gpu.place(ids, offsets)
    ops.update_grads_(grads, ones, noise_std=ones, stream=placed, backend=backend)
    for grad, n, i, offset in zip(grads, sizes, ids, offsets, strict=True):
        z = on_cpu.normal(n, i, offset, dtype=torch.float64)
        assert ((grad.cpu().double() - z).abs() <= 1e-5 * (1 + z.abs())).all()
