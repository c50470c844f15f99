"""Fresh random inputs for the parity tests, and the same in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

# Around Philox blocks (4), vectors (8, 16, 32), and the backends' chunks.
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 127, 128, 129, 1023, 1024, 1025]
CHUNK_EDGES = [4095, 4096, 4097, 8191, 8193, 16383, 16385, 65535, 65536, 65537]


def gradients(
    sizes: Sequence[int], dtype: torch.dtype, device: str, *, odd_address: bool = False
) -> list[Tensor]:
    """One tensor per size; with odd_address each starts one element into its memory."""
    out = []
    for i, n in enumerate(sizes):
        spread = 10.0 ** (i % 5 - 2)
        values = (torch.randn(n + 1) * spread + 0.3 * spread).to(dtype).to(device)
        out.append(values[1:] if odd_address else values[:n].clone())
    return out


def like(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Random tensors of the same shapes on the same device."""
    return [
        torch.randn(t.shape).to(t.device, dtype or t.dtype) * (0.5 + 0.1 * (i % 3))
        for i, t in enumerate(tensors)
    ]


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values in float64 on the CPU: the tensors' own rounding is not an error."""
    return [t.detach().to("cpu", torch.float64, copy=True) for t in tensors]


def strided_views(device: str) -> dict[str, Tensor]:
    return {
        "transposed": torch.randn(33, 17, device=device).t(),
        "channels_last": torch.randn(4, 5, 6, 7, device=device).to(
            memory_format=torch.channels_last
        ),
        "every second": torch.randn(1001, device=device)[::2],
        "column": torch.randn(40, 9, device=device)[:, 2],
        "permuted": torch.randn(3, 4, 5, device=device).permute(2, 0, 1),
    }


def strided(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    x, y = torch.randn(33, 17, device=device), torch.randn(17, 33, device=device)
    memory = torch.randn(33 * 17 + 1, device=device)
    return {
        "transposed": (x, y.t()),
        "columns": (torch.randn(33, 34, device=device)[:, ::2], x),
        "rows": (torch.randn(66, 17, device=device)[1::2], x),
        "one problem for all": (x, y.t()[:1].expand(33, 17)),
        "one number for a problem": (x, y.t()[:, :1].expand(33, 17)),
        "odd address": (memory[1:].view(33, 17), x),
    }
