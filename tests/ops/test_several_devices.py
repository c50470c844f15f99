"""Lists of tensors on several devices, and the index tensors that lead there and back.

One device under two names stands in for two. The tests show that the results are those of one
device, and that a step can be captured in a CUDA graph and waits for nothing.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from cells import Cell
from no_sync import no_host_sync
from replay import Captured
from torch import Tensor

from mmfuse import NoiseStream, ops
from mmfuse.ops import GradStats, _tensors

SIZES = [5, 0, 70, 9]
# The second device's tensors stand among the first one's.
GROUPS = [[0, 3], [1, 2]]


@pytest.fixture
def two_devices(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict(zip((torch.device(cell.device), cell.device), GROUPS, strict=True))
    for name in ("mmfuse.ops.update_grads", "mmfuse.ops.grad_stats"):
        module = importlib.import_module(name)
        one = module.by_device
        monkeypatch.setattr(
            module, "by_device", lambda g, one=one: names if len(g) == len(SIZES) else one(g)
        )


class Lists:
    """Gradients, parameters and anchors, and one step with everything that update_grads_ takes."""

    def __init__(self, cell: Cell, anchored: bool = True) -> None:
        self.backend = cell.backend
        made = torch.Generator().manual_seed(4)

        def on_device(*size: int) -> Tensor:
            return torch.randn(*size, generator=made).to(cell.device)

        self.sources, self.params, self.anchors = ([on_device(n) for n in SIZES] for _ in range(3))
        if not anchored:
            self.anchors = None
        self.grads = [torch.empty_like(g) for g in self.sources]
        self.scale, self.pull, self.std = on_device(3, len(SIZES)).unbind(0)
        self.stream = NoiseStream(7, cell.device).place([4, 0, 9, 2], [0, 0, 6, 1])
        self.finite = torch.ones((), dtype=torch.bool, device=cell.device)
        self.sq_norm = torch.empty(len(SIZES), dtype=torch.float64, device=cell.device)

    def step(self) -> GradStats:
        for grad, source in zip(self.grads, self.sources, strict=True):
            grad.copy_(source)
        ops.update_grads_(
            self.grads,
            self.scale,
            params=self.params,
            anchors=self.anchors,
            pull=self.pull,
            noise_std=self.std,
            stream=self.stream,
            finite=self.finite,
            sq_norm=self.sq_norm,
            backend=self.backend,
        )
        self.stream.advance()
        return ops.grad_stats(self.grads, self.params, self.anchors, backend=self.backend)

    def seen(self, stats: GradStats) -> list[Tensor]:
        return [t.clone() for t in (*self.grads, self.sq_norm, self.finite, *stats)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def expected_steps(cell: Cell, count: int, anchored: bool) -> list[list[Tensor]]:
    """The results of each step on one device."""
    lists = Lists(cell, anchored)
    return [lists.seen(lists.step()) for _ in range(count)]


@pytest.mark.parametrize("anchored", [False, True], ids=["second", "anchored"])
def test_two_devices_give_what_one_gives(
    cell: Cell, request: pytest.FixtureRequest, anchored: bool
) -> None:
    expected = expected_steps(cell, 4, anchored)
    assert not torch.equal(expected[0][2], expected[1][2])  # the noise is another in each step
    request.getfixturevalue("two_devices")
    lists = Lists(cell, anchored)
    assert_same(lists.seen(lists.step()), expected[0])
    captured = Captured(lists.step, cell.device)
    assert_same(lists.seen(captured.result), expected[1])
    for step in expected[2:]:
        captured.replay()
        assert_same(lists.seen(captured.result), step)


def test_two_devices_do_not_wait(cell: Cell, two_devices: None) -> None:
    lists = Lists(cell)
    lists.step()
    with no_host_sync(cell.device):
        lists.step()


def test_a_gradient_that_is_not_finite(cell: Cell, two_devices: None) -> None:
    lists = Lists(cell)
    lists.sources[2][1] = torch.inf
    lists.step()
    assert not lists.finite
    assert [bool(g.isfinite().all()) for g in lists.grads] == [True, True, False, True]


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tensors, "_kept", {})
    monkeypatch.setattr(_tensors, "_kept_for_graphs", {})


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Plays the capture of a CUDA graph, as far as the index tensors see."""
    state = [False]
    monkeypatch.setattr(_tensors, "_capturing", lambda device: state[0])
    return state


CPU = torch.device("cpu")


def fill(start: int, count: int = 3 * _tensors._MOST_KEPT) -> None:
    for i in range(start, start + count):
        _tensors.index_tensor((i,), CPU)


@pytest.mark.usefixtures("nothing_kept")
class TestKeptTensors:
    def test_made_once(self) -> None:
        first = _tensors.index_tensor((2, 0, 1), CPU)
        assert _tensors.index_tensor((2, 0, 1), CPU) is first
        assert (first.tolist(), first.dtype) == ([2, 0, 1], torch.int64)
        half = _tensors.kept_tensor((2, 0, 1, 0.5), (2, 2), torch.float64, CPU)
        assert (half.tolist(), half.dtype) == ([[2.0, 0.0], [1.0, 0.5]], torch.float64)

    def test_those_used_last_are_kept(self) -> None:
        used = _tensors.index_tensor((0,), CPU)
        for i in range(3 * _tensors._MOST_KEPT):
            _tensors.index_tensor((1, i), CPU)
            assert _tensors.index_tensor((0,), CPU) is used
        assert len(_tensors._kept) == _tensors._MOST_KEPT

    def test_what_a_graph_has_seen_is_never_dropped(self, capturing: list[bool]) -> None:
        seen = _tensors.index_tensor((0,), CPU)
        capturing[0] = True
        assert _tensors.index_tensor((0,), CPU) is seen
        capturing[0] = False
        fill(1)
        assert _tensors.index_tensor((0,), CPU) is seen
        capturing[0] = True
        for _ in range(1000):
            assert _tensors.index_tensor((0,), CPU) is seen
        assert len(_tensors._kept_for_graphs) == 1
        assert len(_tensors._kept) == _tensors._MOST_KEPT

    @pytest.mark.parametrize(
        "index", [(), (3,), (0, 0, 1, 1, 1), (2, 0, 1), (2**40, 2**40, -1)], ids=str
    )
    def test_first_needed_in_a_capture(self, capturing: list[bool], index: tuple[int, ...]) -> None:
        capturing[0] = True
        captured = Captured(lambda: _tensors.index_tensor(index, CPU), "cpu")
        captured.result.zero_()  # the graph's memory may be anything between its replays
        captured.replay()
        assert (captured.result.tolist(), captured.result.dtype) == (list(index), torch.int64)
        # A tensor that only a replay fills is of no use to anyone else.
        assert _tensors.index_tensor(index, CPU) is not captured.result
        capturing[0] = False
        assert _tensors.index_tensor(index, CPU) is not captured.result
        assert _tensors.index_tensor(index, CPU).tolist() == list(index)
