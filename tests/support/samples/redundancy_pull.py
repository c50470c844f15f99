"""redundancy_pull: with a monitor and without, with statistics of tensors and of encoders."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import ops
from mmfuse.ops import GradStats, RedundancyRule, RedundancyState

from ._inputs import WIDE, Inputs, Samples, Small


def _state(device: str, modalities: int = 3, window: int = 2) -> RedundancyState:
    generator = torch.Generator().manual_seed(modalities)

    def random(*shape: int) -> Tensor:
        made = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.1
        return made.to(device)

    steps = torch.arange(modalities, device=device) + window - 1
    return RedundancyState(random(modalities, window + 1), steps, *(random(modalities),) * 3)


def _moments(count: int, device: str, dtype: torch.dtype) -> GradStats:
    numbers = torch.arange(count, device=device).add(1)
    x = numbers.to(dtype)
    return GradStats(numbers, x / 7, x / 3, x / 5 - 0.4, x)


def _flat(stats: GradStats | None) -> list[Tensor | None]:
    return [None] * 4 if stats is None else [stats.numel, stats.mean, stats.m2, stats.dot]


def arguments(device: str) -> Samples:
    three = torch.tensor([0.4, 0.7, 0.2], device=device)
    table = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.3, 0.6], [0.9, 0.1, 0.7]], device=device)
    owner, gate = torch.tensor([1, 0, 1, 1, 2], device=device), torch.ones((), device=device)
    narrow, wide = (_moments(5, device, dtype) for dtype in WIDE)
    shut = gate.double() * 0
    state = _state(device)
    return {
        "redundancy_pull": [
            (three, three, gate, *state, owner, *_flat(narrow), 0.9, 0.6, 0.9, 0.15, True, False),
            (three, None, gate, *state, owner, *_flat(wide), 0.9, 0.6, 0.9, -9.0, False, True),
            (
                three.double(),
                three.double(),
                shut,
                *state,
                owner,
                *_flat(narrow),
                0.0,
                0.6,
                0.9,
                -9.0,
                True,
                True,
            ),
            (table, three, gate, *state, owner, *_flat(None), 0.9, 0.6, 0.9, -9.0, True, False),
            (
                table.double(),
                None,
                gate,
                *state,
                owner[:0],
                *_flat(_moments(0, device, WIDE[1])),
                0.9,
                0.6,
                0.9,
                -9.0,
                True,
                False,
            ),
        ]
    }


def small(device: str) -> Small:
    scores, gate = torch.rand(2, device=device), torch.ones((), device=device)
    state, stats = _state(device, 2, 10), _moments(3, device, torch.float32)
    return lambda: ops.redundancy_pull(scores, scores, gate, state, owner=[0, 1, 1], stats=stats)


short = small  # No part of it is ever shared out.


def case(inputs: Inputs) -> list[Tensor]:
    """A block has 128 modalities or tensors."""
    written: list[Tensor] = []
    count = 4 if inputs.interpreted else 134
    owner, device = [0, 36] * (count // 2), inputs.device
    state, gate = _state(device, 37, 4), torch.ones((), device=device)
    for dtype in WIDE:
        table = inputs.normal(37, 37, dtype=dtype)
        table[36] += 50.0  # it is ahead of all
        table[3, :] = table[0, 5] = torch.nan
        scores = table[:, 36].clone()
        scores[3] = -1.0
        for compared in (scores, table):
            for red in (None, inputs.normal(37, dtype=dtype).abs()):
                for stats, by_encoder in ((None, False), (dtype, False), (dtype, True)):
                    found = ops.redundancy_pull(
                        compared,
                        red,
                        gate,
                        state,
                        RedundancyRule(threshold=-1e9, unbiased=red is None, by_encoder=by_encoder),
                        owner=owner,
                        stats=stats and _moments(count, device, stats),
                    )
                    written += [*found[:3], *found.state, found.scale, found.pull]
    return written


def compiled(inputs: Inputs) -> None:
    device = inputs.device
    state, gate = _state(device, 2, 10), torch.ones((), device=device)
    f32, f64 = WIDE
    for dtype, tables, red, stats, unbiased, by_encoder in (
        (f32, False, f64, f32, True, False),
        (f32, False, None, f32, True, False),
        (f32, False, f64, f32, False, False),
        (f32, False, f64, f32, True, True),
        (f32, True, f64, f32, True, False),
        (f64, False, f64, f64, True, False),
        (f64, True, None, None, False, False),
    ):
        scores = inputs.vector(0.2, 0.3, 0.4, 0.5, dtype=dtype).view(2, 2)
        ops.redundancy_pull(
            scores if tables else scores[0],
            red and inputs.vector(0.1, 0.2, dtype=red),
            gate,
            state,
            RedundancyRule(unbiased=unbiased, by_encoder=by_encoder),
            owner=[0, 1, 1],
            stats=stats and _moments(3, device, stats),
        )
