"""keep_state_: tensors of the dtypes that states have, with and without sums."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import WIDE, Inputs, Samples, Small


def _state(device: str) -> list[Tensor]:
    flags = torch.tensor([True, False], device=device)
    return [torch.rand(2, 3, device=device), torch.arange(2, device=device), flags.clone()]


def _values(state: list[Tensor]) -> list[Tensor]:
    return [~x if x.dtype is torch.bool else x + 1 for x in state]


def arguments(device: str) -> Samples:
    state, sums = _state(device), torch.rand(5, device=device)
    yes = torch.ones((), dtype=torch.bool, device=device)
    wide = [torch.zeros((), dtype=torch.float64, device=device), torch.rand(0, device=device)]
    return {
        "keep_state_": [
            (state, _values(state), yes, None),
            (_state(device), _values(state), yes, sums),
            (_state(device), _values(state), ~yes, sums.double()),
            (wide, [x + 1 for x in wide], yes, sums[:0]),
        ]
    }


def undefined(device: str) -> Samples:
    """Arguments with which nothing changes."""
    state, sums = _state(device), torch.full((5,), torch.nan, device=device)
    yes = torch.ones((), dtype=torch.bool, device=device)
    return {"keep_state_": [(state, _values(state), yes, sums)]}


def small(device: str) -> Small:
    state = _state(device)
    values, finite = _values(state), torch.ones((), dtype=torch.bool, device=device)
    return lambda: ops.keep_state_(state, values, finite)


short = small  # No part of it is ever shared out.


def case(inputs: Inputs) -> list[Tensor]:
    """A launch has 32 tensors or, in Triton, 8; a block has 128 elements."""
    written: list[Tensor] = []
    yes = torch.ones((), dtype=torch.bool, device=inputs.device)
    for sums in (None, *WIDE):
        for bad in (False, True):
            state = [inputs.normal(n) for n in (3, 0, 300)] + inputs.many(40)
            state += [inputs.normal(5) > 0, inputs.normal(2, dtype=torch.float64)]
            state.append(inputs.normal(4).long())
            given = None
            if sums is not None:
                given = inputs.normal(300, dtype=sums)
                given[299] = torch.inf if bad else 1.0
            finite = ~yes if bad and sums is None else yes
            ops.keep_state_(state, _values(state), finite, given)
            written += state
    return written


def compiled(inputs: Inputs) -> None:
    yes = torch.ones((), dtype=torch.bool, device=inputs.device)
    state = [inputs.vector(0.5, dtype=torch.float64), inputs.vector(1.0).long()]
    # Those of InfoReg and of RedReg, a narrow one, flags, and a full launch.
    narrow = [inputs.vector(0.5), yes.clone()]
    five = [state[0].clone() for _ in range(4)] + [state[1].clone()]
    for kept, sums in (
        ([state[0], state[1], state[0].clone()], inputs.vector(1.0, dtype=torch.float64)),
        (five, None),
        (narrow, inputs.vector(1.0)),
        (inputs.many(8), None),
    ):
        ops.keep_state_(kept, _values(kept), yes, sums)
