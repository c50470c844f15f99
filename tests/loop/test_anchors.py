"""Anchors: the copies of the parameters, and the parts in which the loop works with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from balancing import ANCHORED, make
from cells import Cell
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mmfuse
from mmfuse import _native
from mmfuse.loop import anchors
from mmfuse.loop.modalities import Active, Modalities
from mmfuse.loop.shards import whole_state
from mmfuse.ops import GradStats
from mmfuse.ops._eager import Eager


def test_statistics_of_parts_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors kept on the CPU are taken in parts, the first of which says where the result is."""
    home = torch.device("meta")

    def on(device: torch.device) -> GradStats:
        return GradStats(*(torch.ones(2, device=device) for _ in range(5)))

    kept = anchors.Anchors()
    parts: list[tuple[slice, list[Any]]] = [(slice(0, 2), []), (slice(2, 4), [])]
    monkeypatch.setattr(kept, "parts", lambda active: iter(parts))
    found = iter([on(home), on(torch.device("cpu"))])
    monkeypatch.setattr(anchors, "grad_stats", lambda *args, **kwargs: next(found))
    stats = kept.stats(Active([], [], [], (), []), None)
    assert all(field.device == home and field.shape == (4,) for field in stats)


def test_a_copy_stays_where_it_was_taken() -> None:
    net = nn.Linear(3, 2)
    kept = anchors.Anchors(torch.bfloat16)
    kept.take(list(net.parameters()))
    addresses = [a.data_ptr() for a in kept.tensors]
    assert [a.dtype for a in kept.tensors] == [torch.bfloat16] * 2
    with torch.no_grad():
        net.weight += 1
    assert torch.equal(kept.tensors[0], (net.weight - 1).to(torch.bfloat16))
    kept.take(list(net.parameters()))
    assert torch.equal(kept.tensors[0], net.weight.to(torch.bfloat16))
    assert [a.data_ptr() for a in kept.tensors] == addresses


@pytest.mark.parametrize("kind", [mmfuse.InfoReg, mmfuse.ReLearning])
def test_copies_that_an_evaluation_has_taken_can_be_taken_again(kind: Any) -> None:
    """PyTorch refused to write into a tensor that was made in inference mode."""
    nets = {n: nn.Linear(3, 2) for n in ("audio", "visual")}
    if kind is mmfuse.ReLearning:
        with torch.inference_mode():
            method = kind(nets)
        method.load_state_dict(method.state_dict())
        return
    method = kind(nets)
    with torch.inference_mode():
        method.set_epoch(0)
    with torch.no_grad():
        nets["audio"].weight += 1
    method.set_epoch(1)
    assert torch.equal(method.anchors.tensors[0], nets["audio"].weight)


def test_what_does_not_fit_is_named() -> None:
    net = nn.Linear(3, 2)
    modalities = Modalities({"audio": net, "visual": nn.Linear(3, 2)}, "all")
    kept = anchors.Anchors()
    kept.take(modalities.parameters)
    nn.init.ones_(net.weight)
    for p in modalities.parameters:
        p.grad = torch.ones_like(p)
    kept.check(modalities.active(), modalities.parameter_names)
    state = kept.state_dict(modalities)
    with pytest.raises(ValueError, match="the state holds 3 anchors, the encoders have 4"):
        kept.load_state_dict({"tensors": state["tensors"][:3]}, modalities)
    kept.tensors[0] = torch.zeros(5, 5)
    with pytest.raises(ValueError, match=r"had shape \[5, 5\] at set_epoch and now has \[2, 3\]"):
        kept.check(modalities.active(), modalities.parameter_names)


def test_anything_but_a_floating_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="anchor_dtype must be a floating dtype"):
        anchors.Anchors(torch.int8)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "contiguous": (lambda t: t, True),
    "a transposed parameter": (lambda t: t.t().contiguous().t(), False),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_tensors_give_the_numbers_of_checked_ones(
    layout: str, dtype: torch.dtype | None
) -> None:
    torch.manual_seed(1)
    made, plain = LAYOUTS[layout]
    nets = {name: [nn.Parameter(made(torch.randn(9, 7)))] for name in ("audio", "visual")}
    modalities = Modalities(nets)
    kept = anchors.Anchors(dtype)
    kept.take(modalities.parameters)
    results = []
    for checked in (False, True):
        torch.manual_seed(2)
        for p in modalities.parameters:
            p.grad = torch.randn(9, 7)
            p.data.copy_(made(torch.randn(9, 7)))
        active = modalities.active()
        assert active.device is not None
        assert (kept._plain(active) is not None) == plain
        if checked:
            active = active._replace(device=None)
        stats = kept.stats(active, None)
        finite = torch.ones((), dtype=torch.bool)
        squares = torch.full((2,), torch.nan, dtype=torch.float64)
        scale, pull = torch.tensor([0.5, 1.0]), torch.tensor([2.0, 0.0])
        kept.update_(active, scale, pull, finite, None, squares)
        results.append([*stats, squares, finite, *(p.grad for p in modalities.parameters)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_anchors_of_a_dtype_that_kernels_lack_are_refused() -> None:
    modalities = Modalities({name: [nn.Parameter(torch.randn(3))] for name in "ab"})
    for p in modalities.parameters:
        p.grad = torch.ones(3)
    kept = anchors.Anchors(torch.float8_e4m3fn)
    kept.take(modalities.parameters)
    with pytest.raises(TypeError, match=r"anchors\[0\] has dtype torch.float8_e4m3fn"):
        kept.stats(modalities.active(), None)


def test_a_parameter_that_became_strided_is_not_plain() -> None:
    modalities = Modalities({name: [nn.Parameter(torch.randn(9, 7))] for name in "ab"})
    kept = anchors.Anchors()
    kept.take(modalities.parameters)
    for p in modalities.parameters:
        p.grad = torch.ones(9, 7)
    active = modalities.active()
    assert kept._plain(active) is not None
    modalities.parameters[1].data = torch.randn(7, 9).t()
    assert kept._plain(active) is None


needs_module = pytest.mark.skipif(
    _native.read_gradients is None, reason="mmfuse._C was not built for this Python"
)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(3)
    shapes = [(16, 8), (5,), (4, 3, 3, 3), (1,), (), (2, 1)]
    return [nn.Parameter(torch.randn(shapes[i % 6])) for i in range(12)]


def anchored(
    device: str = "cpu", dtype: torch.dtype | None = None, last: bool = False
) -> tuple[Modalities, anchors.Anchors]:
    """Twelve parameters that have moved since their anchors were taken, with gradients."""
    given = [nn.Parameter(p.detach().to(device)) for p in parameters()]
    for p in given if last else ():
        if p.dim() == 4:
            p.data = p.data.to(memory_format=torch.channels_last)
    kept = anchors.Anchors(dtype)
    kept.take(given)
    generator = torch.Generator().manual_seed(11)
    for p in given:
        moved = torch.randn(p.shape, generator=generator).to(device)
        p.data += moved
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
    return Modalities({"audio": given[:6], "visual": given[6:]}), kept


def acted(active: Active, kept: anchors.Anchors, backend: str | None) -> list[Tensor]:
    """Statistics, and what an update makes of the gradients, their squares and `finite`."""
    found = list(kept.stats(active, backend))
    before = [g.clone() for g in active.grads]
    ramp = torch.linspace(0.5, 1.5, len(active.grads), device=active.device)
    finite = torch.ones((), dtype=torch.bool, device=active.device)
    squares = torch.empty(len(active.grads), dtype=torch.float64, device=active.device)
    kept.update_(active, ramp, ramp - 0.75, finite, backend, squares)
    found += [*(g.clone() for g in active.grads), finite, squares]
    for grad, old in zip(active.grads, before, strict=True):
        assert grad.numel() == 1 or not torch.equal(grad, old)
        grad.copy_(old)
    return found


@needs_module
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_anchors_are_read_with_their_gradients(
    cell: Cell, last: bool, dtype: torch.dtype | None, some: bool
) -> None:
    """Numbers are those of lists, also where a parameter has no gradient."""
    modalities, kept = anchored(cell.device, dtype, last)
    if some:
        modalities.parameters[3].grad = modalities.parameters[8].grad = None
    quickly = modalities.active(eager=True, anchors=kept.tensors)
    each = modalities.active()
    assert quickly.paired and not each.paired
    for one, other in zip(
        acted(quickly, kept, Eager(cell.backend)), acted(each, kept, cell.backend), strict=True
    ):
        assert torch.equal(one, other)


@needs_module
def test_the_table_has_parameters_and_anchors() -> None:
    modalities, kept = anchored(dtype=torch.bfloat16, last=True)
    active = modalities.active(eager=True, anchors=kept.tensors)
    assert active.table is not None
    pairs = zip(active.table.tolist(), modalities.parameters, kept.tensors, strict=True)
    for row, parameter, anchor in pairs:
        assert row[6:] == [parameter.data_ptr(), anchor.data_ptr()]
        assert row[2] == CODES[parameter.dtype] << 8 | CODES[torch.bfloat16] << 16
        assert row[4:6] == ([1, 1] if parameter.is_contiguous() else [3, 9])


def other_shape(p: nn.Parameter, kept: list[Tensor]) -> None:
    kept[2] = kept[2].flatten(1)


def other_order(p: nn.Parameter, kept: list[Tensor]) -> None:
    kept[2] = kept[2].to(memory_format=torch.channels_last)


def moved_parameter(p: nn.Parameter, kept: list[Tensor]) -> None:
    p.data = p.data.transpose(2, 3)


def none_yet(p: nn.Parameter, kept: list[Tensor]) -> None:
    kept.clear()


def frozen_until_now(p: nn.Parameter, kept: list[Tensor]) -> None:
    kept[2] = torch.empty(0)


def elsewhere(p: nn.Parameter, kept: list[Tensor]) -> None:
    kept[2] = kept[2].to("meta")


def integers(p: nn.Parameter, kept: list[Tensor]) -> None:
    kept[2] = kept[2].int()


@needs_module
@pytest.mark.parametrize(
    "change",
    [
        other_shape,
        other_order,
        moved_parameter,
        none_yet,
        frozen_until_now,
        elsewhere,
        integers,
    ],
)
def test_pairs_that_are_not_alike_are_looked_at(
    change: Callable[[nn.Parameter, list[Tensor]], None],
) -> None:
    """Gradients still come in a table, and it says that it has no pairs."""
    modalities, kept = anchored()
    assert modalities.active(eager=True, anchors=kept.tensors).paired
    change(modalities.parameters[2], kept.tensors)
    active = modalities.active(eager=True, anchors=kept.tensors)
    assert active.table is not None and not active.paired


@needs_module
def test_a_table_without_pairs_is_refused(cell: Cell) -> None:
    if cell.backend not in ("cpu", "cuda"):
        pytest.skip("it takes lists")
    modalities, _ = anchored(cell.device)
    table, grad = modalities.active(eager=True).table, modalities.parameters[0].grad
    call = getattr(torch.ops.mmfuse.grad_stats_table, cell.backend)
    assert call(table, grad, False)[1].shape == (12,)
    with pytest.raises(RuntimeError, match="this table has no parameters"):
        call(table, grad, True)


@needs_module
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["InfoReg", "RedReg"])
def test_steps_are_those_of_lists(
    cell: Cell, name: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for quickly in (True, False):
        if not quickly:
            monkeypatch.setattr(_native, "read_gradients", None)
        modalities, _ = anchored(cell.device, last=last)
        given = modalities.parameters
        nets = {"audio": given[:6], "visual": given[6:]}
        options = {"forward": {n: nn.Identity() for n in nets}, "threshold": -1.0}
        method = getattr(mmfuse, name)(
            nets, backend=cell.backend, **(options if name == "RedReg" else {})
        )
        method.set_epoch(0)
        if name == "InfoReg":
            method._state["window_open"].fill_(True)
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            for p in given:
                p.data += torch.randn(p.shape, generator=generator).to(p)
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            given[4].grad = None
            shown = {n: torch.randn(8, 6, generator=generator).to(cell.device) for n in nets}
            alike = dict.fromkeys(nets, shown["audio"])  # RedReg pulls where features agree
            more = {"features": alike, "inputs": shown} if name == "RedReg" else {}
            before = [p.grad.clone() for p in given if p.grad is not None]
            method.step(shown, torch.arange(8, device=cell.device) % 6, **more)
            after = [p.grad for p in given if p.grad is not None]
            changed = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
            assert any(changed)
            results.append([*after, *(t.clone() for t in method._state.values())])
    for one, other in zip(results[:3], results[3:], strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


def partly_frozen(rank: int, kind: str) -> list[list[bool]]:
    """Which entries of the state are sharded, where biases are frozen and where they are not.

    The first rank has all of each encoder's tensors, the second an empty part.
    """
    nets = {name: nn.Linear(3, 1) for name in ("audio", "visual")}
    for net in nets.values():
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        net.bias.requires_grad_(False)
    method: Any = make(kind, nets)
    method.set_epoch(0)
    found = []
    for unfrozen in (False, True):
        x, labels = torch.ones(4, 3), torch.arange(4) % 2
        for net in nets.values():
            net.zero_grad()
            net.bias.requires_grad_(unfrozen)
        z = {name: net(x).expand(-1, 2) for name, net in nets.items()}
        sum(each.square().sum() for each in z.values()).backward()
        seen = {"features": z, "inputs": dict.fromkeys(nets, x)}
        more = {name: seen[name] for name in method.rule.need.inputs}
        method.step({name: each.detach() for name, each in z.items()}, labels, **more)
        saved = method.state_dict()["anchors"]["tensors"]
        found.append([isinstance(t, DTensor) for t in saved])
        both: list[Any] = [None, None]
        dist.all_gather_object(both, found)
        assert both[0] == both[1], both
        whole_state(saved)  # of which every rank takes a part
        method.load_state_dict(method.state_dict())
    assert [p.to_local().numel() for p in nets["audio"].parameters()] == ([3, 1], [0, 0])[rank]
    return found


@pytest.mark.parametrize("kind", ANCHORED)
def test_all_ranks_have_the_same_entries_where_some_are_frozen(kind: str) -> None:
    """An empty part of a vector is not what stands for a frozen one."""
    for found in ranks(2).run(partly_frozen, kind):
        assert found == [[True, False] * 2, [True, True] * 2]
