"""keep_state_: all tensors of a state change, or none of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cells import Cell
from torch import Tensor

from mmfuse import ops

YES = torch.ones((), dtype=torch.bool)
with torch.inference_mode():
    INFERRED = torch.ones(2)


def made(device: str, count: int = 5) -> tuple[list[Tensor], list[Tensor]]:
    """States and other values of many dtypes; the lengths go beyond a block's 128."""
    dtypes = (torch.float64, torch.int64, torch.bool, torch.float32, torch.float16)
    state, values = [], []
    for i in range(count):
        x = torch.arange(3 + 140 * i, device=device).to(dtypes[i % len(dtypes)])
        state.append(x)
        values.append(~x if x.dtype is torch.bool else x + 1)
    return [state[0].reshape(3, 1), *state[1:]], [values[0].reshape(3, 1), *values[1:]]


@pytest.mark.parametrize("count", [1, 5, 8, 9, 70])
def test_all_change_or_none(cell: Cell, count: int) -> None:
    """There may be more of them than one launch takes."""
    for finite in (True, False):
        state, values = made(cell.device, count)
        before = [x.clone() for x in state]
        flag = torch.tensor(finite, device=cell.device)
        ops.keep_state_(state, values, flag, backend=cell.backend)
        for now, want in zip(state, values if finite else before, strict=True):
            assert torch.equal(now, want)


# Of every width, and among them those that no kernel can compute with.
DTYPES = [
    *(torch.bool, torch.uint8, torch.int16, torch.uint16, torch.bfloat16, torch.uint32),
    *(torch.uint64, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e8m0fnu),
    *(torch.complex64, torch.complex128),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype(cell: Cell, dtype: torch.dtype) -> None:
    """All bits of it, whatever they mean: a scalar, none, and more than a block has."""
    for shape in ((), (0, 2), (3, 1), (150, 2)):
        state, value = (
            torch.randint(most, (math.prod(shape), dtype.itemsize), dtype=torch.uint8)
            .view(dtype)
            .reshape(shape)
            .to(cell.device)
            for most in ((2, 2) if dtype is torch.bool else (256, 256))
        )
        bits = [x.flatten().view(torch.uint8).tolist() for x in (state, value)]
        flag = torch.tensor(False, device=cell.device)
        for finite, want in ((flag, bits[0]), (~flag, bits[1])):
            ops.keep_state_([state], [value], finite, backend=cell.backend)
            assert state.flatten().view(torch.uint8).tolist() == want


def test_values_that_are_views_of_conjugates(cell: Cell) -> None:
    """Their memory holds other numbers."""
    x = torch.randn(5, dtype=torch.complex128, device=cell.device)
    state = [torch.zeros_like(x), torch.zeros_like(x.imag)]
    ops.keep_state_(state, [x.conj(), x.conj().imag], YES.to(cell.device), backend=cell.backend)
    assert state[0].tolist() == [z.conjugate() for z in x.tolist()]
    assert state[1].tolist() == [-z.imag for z in x.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("where", [None, 0, 127, 128, 400])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_sum_that_is_not_finite(
    cell: Cell, dtype: torch.dtype, where: int | None, bad: float
) -> None:
    cell.skip_slow(where not in (None, 400))
    state, values = made(cell.device)
    before = [x.clone() for x in state]
    sums = torch.full((401,), torch.finfo(dtype).max, dtype=dtype, device=cell.device)
    if where is not None:
        sums[where] = bad
    ops.keep_state_(state, values, YES.to(cell.device), sums, backend=cell.backend)
    for now, want in zip(state, values if where is None else before, strict=True):
        assert torch.equal(now, want)


def test_strided_values_and_the_state_itself(cell: Cell) -> None:
    state = [torch.zeros(3, 2, device=cell.device), torch.ones(2, device=cell.device)]
    values = [torch.arange(6.0, device=cell.device).view(2, 3).T, state[1]]
    versions = [x._version for x in state]
    ops.keep_state_(state, values, YES.to(cell.device), backend=cell.backend)
    assert state[0].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert state[1].tolist() == [1.0, 1.0]
    assert all(x._version > v for x, v in zip(state, versions, strict=True))


def test_without_state_there_is_nothing_to_do() -> None:
    ops.keep_state_([], [], YES)


def test_compiled_in_one_graph(cell: Cell) -> None:
    def step(state: list[Tensor], gain: Tensor) -> Tensor:
        values = [x + gain for x in state]
        ops.keep_state_(state, values, gain > 0, gain.expand(3), backend=cell.backend)
        return state[0] * 2.0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for gain in (1.0, -1.0, torch.inf):
        kept, ours = ([torch.ones(4, device=cell.device) for _ in range(2)] for _ in range(2))
        one = torch.tensor(gain, device=cell.device)
        assert torch.equal(compiled(ours, one), step(kept, one))
        assert all(map(torch.equal, ours, kept))
        assert kept[0].tolist() == [2.0 if gain == 1.0 else 1.0] * 4


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"values": [torch.ones(2)]}, ValueError, "2 tensors of the state but 1 values"),
        ({"values": [torch.ones(2), torch.ones(2)]}, TypeError, r"values\[1\] is torch.float32"),
        (
            {"values": [torch.ones(3), torch.zeros(2).long()]},
            ValueError,
            r"values\[0\] has shape \[3\], state\[0\] \[2\]",
        ),
        (
            {"state": [torch.ones(2, 2)[:, 0], torch.zeros(2).long()]},
            ValueError,
            r"state\[0\] is not contiguous",
        ),
        ({"finite": torch.ones(())}, TypeError, "finite must be a dense 0-d bool tensor"),
        ({"finite": YES.view(1)}, TypeError, "finite must be a dense 0-d bool tensor"),
        ({"finite": YES.to_sparse()}, TypeError, "finite must be a dense 0-d bool tensor"),
        ({"sums": torch.ones(2).to_sparse()}, TypeError, "sums must be dense"),
        (
            {"state": [INFERRED, torch.zeros(2).long()]},
            RuntimeError,
            r"state\[0\] is an inference tensor",
        ),
        ({"finite": YES.to("meta")}, ValueError, r"finite is on meta, state\[0\] on cpu"),
        ({"sums": torch.ones(2).half()}, TypeError, r"sums must be a float32 or float64 tensor"),
        ({"sums": torch.ones(2, 2)}, TypeError, r"sums must be a float32 or float64 tensor"),
    ],
)
def test_bad_input_changes_nothing(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    given: dict[str, Any] = {
        "state": [torch.ones(2), torch.zeros(2, dtype=torch.int64)],
        "values": [torch.zeros(2), torch.ones(2, dtype=torch.int64)],
        "finite": YES,
        "sums": None,
        **change,
    }
    before = [x.clone() for x in given["state"]]
    with pytest.raises(error, match=match):
        ops.keep_state_(**given)
    assert all(map(torch.equal, given["state"], before))
