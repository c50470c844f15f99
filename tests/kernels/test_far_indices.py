"""Indices and grids of tensors that no machine here could hold: Triton's kernels, interpreted.

Nothing is read or written: the addresses are noted, and each element that is read is a 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mmfuse import triton as ours
from mmfuse.triton import keep_state, logit_divergence, modality_scores, shared_information

pytestmark = pytest.mark.skipif(not ours.INTERPRETED, reason="the kernels run on the GPU")

MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)


class Accesses(NamedTuple):
    """Addresses, in the order of a kernel's lines, of lanes that the mask lets through."""

    read: list[np.ndarray]
    written: list[np.ndarray]


@contextmanager
def far_away(program: int = 0) -> Iterator[Accesses]:
    """Launches in the block begin at this program of their first axis."""
    found = Accesses([], [])

    def place(builder: Any, x: int, y: int, z: int) -> None:
        builder.grid_idx = (program + x, y, z)

    def note(target: list[np.ndarray], pointers: Any, mask: Any) -> None:
        target.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])

    def load(builder: Any, pointers: Any, mask: Any, *_: object) -> TensorHandle:
        note(found.read, pointers, mask)
        kind = pointers.get_element_ty()
        ones = np.ones(pointers.data.shape, interpreter._get_np_dtype(kind))
        return TensorHandle(ones, kind)

    def store(builder: Any, pointers: Any, value: Any, mask: Any, *_: object) -> None:
        note(found.written, pointers, mask)

    replaced = {"set_grid_idx": place, "create_masked_load": load, "create_masked_store": store}
    with mock.patch.multiple(InterpreterBuilder, **replaced):
        yield found


def elements(addresses: np.ndarray, tensor: Tensor) -> list[int]:
    """The elements, counted from the tensor's first, that begin at these addresses."""
    distances = addresses.astype(np.int64) - tensor.data_ptr()
    assert not (distances % tensor.itemsize).any()
    return (distances // tensor.itemsize).tolist()


# Six numbers of each row are more than 2^31, and so are the rows themselves.
@pytest.mark.parametrize(("rows", "tile"), [(500_000_000, 3), (2**31 + 11, 2**29 + 1)])
@pytest.mark.parametrize("kind", range(3))
def test_numbers_of_logits_rows(kind: int, rows: int, tile: int) -> None:
    logits, value, numbers = torch.zeros(1, 2), torch.zeros(1), torch.zeros(1)
    block = list(range(4 * tile, 4 * tile + 4))
    blocks = {"KIND": kind, "PER_ROW": True, "BLOCK_ROWS": 4, "BLOCK_CLASSES": 16}
    pairs = (logits,), (logits,), (2,), (2,), (2,)
    of_kinds = [[k * rows + row for row in block] for k in range(6)]
    with far_away(tile) as found:
        logit_divergence._logit_divergence_kernel[(1, 1)](
            *pairs, value, None, numbers, rows, -(-rows // 4), 1, **blocks
        )
    *written, last = found.written
    assert [elements(addresses, numbers) for addresses in written] == of_kinds
    assert elements(last, value) == block
    with far_away(tile) as found:
        logit_divergence._logit_divergence_backward_kernel[(1, 1)](
            (logits,), (None,), *pairs, value, numbers, rows, **blocks
        )
    assert [elements(addresses, numbers) for addresses in found.read[:6]] == of_kinds
    assert elements(found.written[0], logits) == [2 * row + c for row in block for c in range(2)]


# The last rows but a few of those that an int32 can count, and more.
@pytest.mark.parametrize("rows", [2**31 - 3, 2**31 + 11])
def test_scores_of_rows(rows: int) -> None:
    logits, labels = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    prob, log_prob, weights = torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    # The last tile of the second of two outer rows.
    last = (rows - 1) // 4
    with far_away(-(-rows // 4) + last) as found:
        modality_scores._sample_scores_kernel[(1, 1)](
            *((logits,), (2,), (0,), (2,), labels, (0, 0, 0), None, None, -100),
            *(prob, log_prob, weights, rows, 2 * rows),
            COLUMNS=0,
            KIND=modality_scores.INDICES.value,
            WIDEST=0,
            BLOCK_ROWS=4,
            BLOCK_CLASSES=16,
        )
    for addresses, tensor in zip(found.written, (prob, log_prob, weights), strict=True):
        assert elements(addresses, tensor) == list(range(rows + 4 * last, 2 * rows))


def test_a_state_of_many_elements() -> None:
    state, finite = torch.zeros(1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)
    size, block = 2**31 + 5, keep_state.BLOCK_SIZE
    with far_away(2**31 // block) as found:
        keep_state._keep_state_kernel[(1,)](
            *(state, state, *[None] * 14, size, *[0] * 7, finite, None, 0), BLOCK_SIZE=block
        )
    assert [elements(addresses, state) for addresses in found.written] == [list(range(2**31, size))]


@pytest.mark.parametrize(("variables", "problems"), [(2, 64 * 65_535 + 1), (300, 2)])
def test_a_grid_of_many_problems_or_variables(
    monkeypatch: pytest.MonkeyPatch, variables: int, problems: int
) -> None:
    """A GPU refuses more programs than so many on an axis."""
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(shared_information, "_shared_information_kernel", Kernel())
    monkeypatch.setattr(shared_information, "row_ranges", lambda *_: None)
    monkeypatch.setattr(shared_information, "count_tuples", lambda *_: (None, None))
    data = [torch.zeros(problems, 1, dtype=torch.float16)] * (variables + 1)
    shared_information.shared_information(data, 5, 2)
    (grid,) = grids
    assert all(size <= most for size, most in zip(grid, MOST_PROGRAMS, strict=False))
