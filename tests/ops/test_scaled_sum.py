"""scaled_sum: strided inputs, and what it does not take; parity is in test_op_contract.py."""

from __future__ import annotations

import pytest
import torch
from cells import Cell

from mmfuse import ops


def test_strided(cell: Cell) -> None:
    a, b = torch.randn(4, 5, device=cell.device), torch.randn(5, 4, device=cell.device).t()
    k = torch.tensor(2.0, device=cell.device)
    # A power of two is not rounded, so that one rounding is left.
    assert torch.equal(ops.scaled_sum(a, b, k, backend=cell.backend), a + 2 * b)


def test_errors() -> None:
    a, k = torch.ones(3), torch.tensor(1.0)
    with pytest.raises(TypeError, match="of one dtype"):
        ops.scaled_sum(a, a.double(), k)
    with pytest.raises(ValueError, match="one shape"):
        ops.scaled_sum(a, a[:2], k)
