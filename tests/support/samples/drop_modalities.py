"""drop_modalities: features of several widths and dtypes, rows without elements."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import NoiseStream, ops

from ._inputs import DTYPES, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    a, b = torch.randn(2, 4, 3, device=device).unbind()
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    two, k = torch.rand(2, device=device), torch.tensor(0.5, device=device)
    mixed = [a.half(), b.double(), k.expand(4), a[:, :0]]
    no_rows = [t[:0] for t in mixed]
    keep = torch.tensor([[True, False, True, True]] * 4, device=device)
    state = NoiseStream(3, device).state
    return {
        "drop_modalities": [
            ([a, b], two, state, [0, 1], [0, 0], None),
            (leaves, two, state, [7, 2], [5, 2**31 + 1], k),
            (mixed, two.repeat(2), state, [0, 1, 2, 3], [0] * 4, k.double()),
            (no_rows, two.repeat(2), state, [0, 1, 2, 3], [1] * 4, None),
        ],
        "drop_modalities_backward": [
            ([a, b], keep[:2], None),
            (mixed, keep, k.double()),
            (no_rows, keep[:, :0], k),
        ],
    }


def small(device: str) -> Small:
    features, q = list(torch.randn(2, 9, 33, device=device)), torch.rand(2, device=device)
    stream = NoiseStream(3, device)
    return lambda: ops.drop_modalities(features, q, stream)


def short(device: str) -> Small:
    features, q = list(torch.randn(3, 40, 512, device=device)), torch.rand(3, device=device)
    stream, leaves = NoiseStream(3, device), [x.requires_grad_() for x in features]

    def call() -> object:
        dropped = ops.drop_modalities(leaves, q, stream).features
        return torch.autograd.grad(dropped, leaves, features)

    return call


def case(inputs: Inputs) -> list[Tensor]:
    """A chunk has 4,096 elements, or rows without elements."""
    written: list[Tensor] = []
    widths = (40, 33) if inputs.interpreted else (40, 33, 47, 1, 0, 4096 + 24, 5003)
    few = [
        inputs.normal(19, width, dtype=dtype, offset=offset).requires_grad_()
        for dtype in DTYPES
        for offset in (0, 1)
        for width in widths
    ]
    # A table of parameters holds 64.
    many = [t.view(3, 1).requires_grad_() for t in inputs.many(20 if inputs.interpreted else 70)]
    for features, scale in ((few, inputs.vector(1.5)[0]), (few, None), (many, None)):
        q = torch.full((len(features),), 0.4, device=inputs.device)
        stream = inputs.stream(len(features) if scale is None else None)
        dropped, keep = ops.drop_modalities(features, q, stream, scale=scale)
        back = [torch.ones_like(d) for d in dropped]
        written += [*dropped, keep, *torch.autograd.grad(dropped, features, back)]
    return written


def compiled(inputs: Inputs) -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for with_scale, *modalities in (
        (True, (f32, 512), (f32, 512)),
        (False, (f32, 512), (f32, 512)),
        (False, (bf16, 768), (f16, 309), (f32, 8)),
        (True, (bf16, 8192), (f64, 1), (f64, 640)),
    ):
        x = [inputs.normal(3, width, dtype=dtype).requires_grad_() for dtype, width in modalities]
        scale = inputs.vector(1.5)[0] if with_scale else None
        q = torch.full((len(x),), 0.4)
        features = ops.drop_modalities(x, q, inputs.stream(), scale=scale).features
        torch.autograd.grad(features, x, [torch.ones_like(t) for t in x])
