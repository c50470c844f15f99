"""Tensors for the cases, the same ones at every run, and the names that samples share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfuse import NoiseStream

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)
#: CUDA has kernels for short lists and for long ones in these dtypes.
NARROW = (torch.float32, torch.float16, torch.bfloat16)
SEED = 20_26

#: Arguments of overloads, by the operator's name.
Samples = dict[str, list[tuple[Any, ...]]]
#: A call that is counted.
Small = Callable[[], object]


def table_of(grads: Sequence[Tensor]) -> Tensor:
    """The table that mmfuse._C makes of contiguous or channels_last tensors, without mmfuse._C.

    The builds for sanitizers have kernels alone; csrc/glue/table.h has the columns.
    """
    kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    rows = []
    for i, grad in enumerate(grads):
        order = (1, 1) if grad.is_contiguous() else (grad.shape[1], grad[0, 0].numel())
        rows.append([grad.data_ptr(), grad.numel(), kinds.index(grad.dtype), i, *order, 0, 0])
    return torch.tensor(rows, dtype=torch.int64)


class Inputs:
    """Random tensors on a device; the same ones at every run.

    Args:
        device: Their device.
        backend: Which kernels will read them.
    """

    def __init__(self, device: str, backend: str) -> None:
        self.device = device
        self.backend = backend
        self._generator = torch.Generator().manual_seed(SEED)
        #: Triton's interpreter takes milliseconds for what is one instruction elsewhere.
        self.interpreted = backend == "triton" and device == "cpu"

    def placed(self, values: Tensor, offset: int = 0) -> Tensor:
        """The values on the device, `offset` elements behind an address that suits vectors."""
        whole = torch.empty(values.numel() + offset, dtype=values.dtype, device=self.device)
        # All of it: what lies before is read by nobody, but initcheck would see it copied.
        whole[:offset] = 0
        part = whole[offset:]
        part.copy_(values.flatten())
        return part.view(values.shape)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
        """Standard normal deviates."""
        return self.placed(torch.randn(shape, generator=self._generator).to(dtype), offset)

    def lists(
        self, sizes: Sequence[int], count: int, *dtypes: torch.dtype, offset: int = 0
    ) -> list[list[Tensor]]:
        """`count` lists of tensors of these sizes; list k has the k-th dtype."""
        return [
            [self.normal(n, dtype=dtype, offset=offset) for n in sizes]
            for _, dtype in zip(range(count), dtypes, strict=True)
        ]

    def many(self, count: int, size: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Many tiny tensors, most of them not aligned, that share one allocation."""
        return list(self.normal(count * size, dtype=dtype).split(size))

    def beyond_short(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """Three lists of one tensor more than CUDA's short tables hold, which is 128."""
        return [self.many(2 if self.interpreted else 129, 3, dtype) for _ in range(3)]

    def sixteenths(self, *shape: int, most: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Multiples of 1/16 from 0 to `most`, both ends in each row: sums of them are exact."""
        values = torch.randint(0, 16 * most + 1, shape, generator=self._generator)
        values[..., 0], values[..., 1] = 0, 16 * most
        return self.placed((values / 16).to(dtype), offset)

    def mask(self, *shape: int) -> Tensor:
        """The values that are there: seven of ten."""
        return self.placed(torch.rand(shape, generator=self._generator) < 0.7)

    def stream(self, count: int | None = None) -> NoiseStream:
        """A stream of noise, or one whose tensors start within their Philox blocks."""
        stream = NoiseStream(SEED, self.device)
        if count is None:
            return stream
        return stream.place(list(range(7, 7 + count)), [2**32 + 3 + 5 * t for t in range(count)])

    def vector(self, *values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Coefficients."""
        return self.placed(torch.tensor(values, dtype=dtype))


def mirrors(
    inputs: Inputs, sizes: Sequence[int], offset: int
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Gradients of all dtypes with parameters and anchors: of the same dtype, then of others."""
    for shift in (0, 1):
        lists: list[list[Tensor]] = [[], [], []]
        for i, dtype in enumerate(DTYPES):
            other = DTYPES[(i + shift) % len(DTYPES)]
            found = inputs.lists(sizes, 3, dtype, other, dtype, offset=offset)
            for target, tensors in zip(lists, found, strict=True):
                target.extend(tensors)
        yield lists[0], lists[1], lists[2]
