"""info_nce: batches around a tile's edge, rows without elements."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import DTYPES, WIDE, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    a, b = torch.randn(2, 4, 3, device=device).unbind()
    k = torch.tensor(0.5, device=device)
    leaves = [t.clone().requires_grad_() for t in (a, b, k)]
    sums = torch.randn(2, 4, device=device).unbind()
    # In half precision slopes have to be at most 1, as the forward pass's own sums make them.
    s = (a.half().float() @ b.half().float().T) / k
    half_sums = s.logsumexp(1), s.logsumexp(0)
    return {
        "info_nce": [
            (a, b, k),
            (*leaves,),
            (a.half(), b.half(), k),
            (a[:, :0], b[:, :0], k),
        ],
        "info_nce_backward": [
            (k, a, b, k, *sums),
            (k, a.half(), b.half(), k, *half_sums),
            (k, a[:, :0], b[:, :0], k, *sums),
        ],
    }


def undefined(device: str) -> Samples:
    unknown, k = torch.full((2, 3), torch.nan, device=device), torch.tensor(0.5, device=device)
    return {"info_nce": [(unknown, unknown, k)]}


def small(device: str) -> Small:
    a, b = torch.randn(2, 9, 33, device=device)
    temperature = torch.tensor(0.5, device=device)
    return lambda: ops.info_nce(a, b, temperature)


def short(device: str) -> Small:
    # One column: a larger product of matrices is shared out by PyTorch.
    a, b = torch.randn(2, 200, 1, device=device)
    leaves, temperature = [a.requires_grad_(), b], torch.tensor(0.5, device=device)
    return lambda: torch.autograd.grad(ops.info_nce(*leaves, temperature), a)


def case(inputs: Inputs) -> list[Tensor]:
    """A tile has at most 2,048 columns and 2^20 elements; a block of slopes 1,024 columns."""
    written: list[Tensor] = []
    shapes = [(dtype, batch, 5) for dtype in DTYPES for batch in (36, 47, 1)]
    if not inputs.interpreted:
        shapes += [(torch.float32, 2051, 3), (torch.float64, 1032, 3)]
    for dtype, batch, width in shapes:
        a, b = (inputs.normal(batch, width, dtype=dtype).requires_grad_() for _ in "ab")
        temperature = inputs.vector(0.9).to(torch.promote_types(dtype, torch.float32))
        leaf = temperature[0].detach().requires_grad_()
        bound = ops.info_nce(a, b, leaf)
        written += [bound, *torch.autograd.grad(bound, (a, b, leaf))]
    return written


def compiled(inputs: Inputs) -> None:
    """One tile of 2,048 columns, one that has fewer, and a single column, which is a constant."""
    for dtype in WIDE:
        for batch in (2048, 309, 1):
            a, b = (inputs.normal(batch, 3, dtype=dtype).requires_grad_() for _ in "ab")
            ops.info_nce(a, b, inputs.vector(0.9, dtype=dtype)[0]).backward()
