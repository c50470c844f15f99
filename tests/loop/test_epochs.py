"""EpochWindow: the epochs in which a method acts."""

from __future__ import annotations

import pytest

from mmfuse.loop.epochs import EpochWindow


class Method(EpochWindow):
    def __init__(self, starts: int, ends: int | None) -> None:
        self._set_window(starts, ends)


@pytest.mark.parametrize(
    ("starts", "ends", "acts"),
    [(0, None, [0, 1, 2, 3]), (1, 2, [1, 2]), (2, 2, [2]), (3, None, [3]), (5, 9, [])],
)
def test_both_ends_are_included(starts: int, ends: int | None, acts: list[int]) -> None:
    method = Method(starts, ends)
    assert method.modulating == (starts == 0)  # epoch 0, before the first set_epoch
    found = []
    for epoch in range(4):
        method.set_epoch(epoch)
        if method.modulating:
            found.append(epoch)
    assert found == acts


def test_a_window_that_ends_before_it_starts() -> None:
    with pytest.raises(ValueError, match="ends=1 is before starts=2"):
        Method(2, 1)
