"""Gradients read in one call of compiled code, against the same looked at one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cells import Cell
from dispatched import Launches
from torch import Tensor, nn

import mmfuse
from mmfuse import _native
from mmfuse.loop._reading import read_each
from mmfuse.loop.modalities import Modalities

needs_module = pytest.mark.skipif(
    _native.read_gradients is None, reason="mmfuse._C was not built for this Python"
)
LABELS = torch.arange(8) % 6
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


def parameters(count: int = 6) -> list[nn.Parameter]:
    torch.manual_seed(3)
    shapes = [(16, 8), (5,), (4, 3, 3, 3), (1,), (), (2, 1)]
    made = [nn.Parameter(torch.randn(shapes[i % 6])) for i in range(count)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def names(given: list[nn.Parameter]) -> list[str]:
    return [f"p{i}" for i in range(len(given))]


def quick(given: list[nn.Parameter]) -> tuple | None:
    """Gradients, places or None for all, places of those that wait, whether wide, table, pairs."""
    assert _native.read_gradients is not None
    return _native.read_gradients(given)


def order(tensor: Tensor) -> list[int]:
    """Channels and spatial size where it is in channels_last, else 1 and 1."""
    return [1, 1] if tensor.is_contiguous() else [tensor.shape[1], tensor[0, 0].numel()]


def assert_as_looked_at(given: list[nn.Parameter]) -> None:
    """Reading at once finds the same as one by one, and the table is of these very gradients."""
    found, each = quick(given), read_each(given, names(given))
    assert found is not None
    grads, ids, waiting, wide, table, paired = found
    assert not paired
    assert [id(g) for g in grads] == [id(g) for g in each.grads]
    assert ids == (None if len(each.ids) == len(given) else each.ids)
    assert (waiting, wide) == (each.waiting, each.dtype == torch.float64)
    assert (each.device is None) == (not grads)
    rows = [
        [g.data_ptr(), g.numel(), CODES[g.dtype], i, *order(g), 0, 0]
        for i, g in zip(each.ids, each.grads, strict=True)
    ]
    assert table.tolist() == rows


@needs_module
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_shapes(dtype: torch.dtype) -> None:
    given = parameters()
    for p in given[1:]:
        p.data = p.data.to(dtype)
        p.grad = torch.randn_like(p)
    assert_as_looked_at(given)


@needs_module
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (1, 2, 5, 1), (3, 2, 2, 3, 2), (4, 3, 1, 1)])
def test_channels_last(shape: tuple[int, ...]) -> None:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    given = parameters()
    p = nn.Parameter(torch.randn(shape).to(memory_format=last))
    p.grad = torch.randn(shape).to(memory_format=last)
    given.insert(2, p)
    assert_as_looked_at(given)


@needs_module
@pytest.mark.parametrize("without", [[0], [5], [2, 3], [0, 1, 4], [0, 1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("how", ["none", "frozen", "both"])
def test_some_have_no_gradient_or_are_frozen(without: list[int], how: str) -> None:
    given = parameters()
    for n, i in enumerate(without):
        if how == "none" or (how == "both" and n % 2):
            given[i].grad = None
        else:
            given[i].requires_grad_(False)
    assert_as_looked_at(given)


@needs_module
def test_an_empty_parameter_does_not_wait_for_its_gradient() -> None:
    given = [*parameters(), nn.Parameter(torch.empty(0, 3))]
    assert_as_looked_at(given)


class Wrapped(Tensor):
    """A tensor of another type."""


def imaginary_part() -> Tensor:
    found = torch.ones((), dtype=torch.complex64).conj().imag
    assert found.is_neg() and found.is_contiguous()
    return found


OTHERS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(8, 16).t(),
    "expanded": lambda: torch.randn(16, 1).expand(16, 8),
    "strided": lambda: torch.randn(16, 16)[:, ::2],
    "permuted": lambda: torch.randn(4, 3, 3, 3).permute(0, 2, 3, 1),
    "channels first": lambda: torch.randn(3, 4, 3, 2).transpose(0, 1),
    "long rows": lambda: torch.ones(1, 2, 1024, 1024).to(memory_format=torch.channels_last),
    "sparse": lambda: torch.randn(16, 8).to_sparse(),
    "subclass": lambda: torch.randn(16, 8).as_subclass(Wrapped),
    "parameter": lambda: nn.Parameter(torch.randn(16, 8)),
    "on meta": lambda: torch.empty(16, 8, device="meta"),
    "empty": lambda: torch.empty(0, 8),
    "negated": imaginary_part,
    "complex": lambda: torch.randn(16, 8, dtype=torch.complex64),
}


@needs_module
@pytest.mark.parametrize("kind", OTHERS)
def test_what_has_to_be_looked_at_is_left(kind: str) -> None:
    """The method looks at gradients one by one then, which raises the errors and makes copies."""
    for place in (0, 3, 6):
        given = parameters()
        grad = OTHERS[kind]()
        other = nn.Parameter(torch.empty_like(grad, layout=torch.strided))
        other.grad = grad
        given.insert(place, other)
        assert quick(given) is None
        del given[place]
        assert quick(given) is not None


@needs_module
def test_a_default_device_is_not_the_tables() -> None:
    given = parameters()
    with torch.device("meta"), Launches() as counted:
        found = quick(given)
    assert found is not None and found[4].device == torch.device("cpu")
    assert counted.calls == 0  # reading is no operator


@needs_module
def test_a_table_is_freed_with_its_tensor() -> None:
    given = parameters()
    found = quick(given)
    assert found is not None
    kept = found[4][1:].clone(), found[4][1:]
    del found
    for _ in range(100):
        quick(given)
    assert torch.equal(*kept)


@needs_module
def test_the_error_of_a_parameter_comes_through() -> None:
    class Broken:
        @property
        def requires_grad(self) -> bool:
            raise LookupError("this one")

    read = _native.read_gradients
    assert read is not None
    with pytest.raises(LookupError, match="this one"):
        read([*parameters(1), Broken()])


def balancing(cell: Cell, noise: bool = True) -> tuple[mmfuse.OGM, list[nn.Parameter]]:
    given = [nn.Parameter(p.detach().to(cell.device)) for p in parameters(12)]
    nets = {"audio": given[:6], "visual": given[6:]}
    stream = mmfuse.NoiseStream(7, cell.device)
    return mmfuse.OGM(nets, noise=noise, stream=stream, backend=cell.backend), given


def step(method: mmfuse.OGM, device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    shown = {n: torch.randn(8, 6, generator=generator).to(device) for n in ("audio", "visual")}
    method.step(shown, LABELS.to(device))


def draw(given: list[nn.Parameter], seed: int, change: Callable[[int, nn.Parameter], None]) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(given):
        p.grad = torch.randn(p.shape, generator=generator).to(p)
        change(i, p)


def to_dtype(i: int, p: nn.Parameter) -> None:
    dtype = DTYPES[i % 4]
    p.data, p.grad = p.data.to(dtype), None
    p.grad = torch.full_like(p, 0.5 + i)


def to_layout(i: int, p: nn.Parameter) -> None:
    if p.dim() > 1:
        p.grad = p.grad.transpose(0, 1).contiguous().transpose(0, 1)


def to_channels_last(i: int, p: nn.Parameter) -> None:
    if p.dim() == 4:
        p.grad = p.grad.to(memory_format=torch.channels_last)


def to_size(i: int, p: nn.Parameter) -> None:
    p.grad = None
    p.data = torch.ones(3 + i, device=p.device)
    p.grad = torch.linspace(1, 2, 3 + i, device=p.device)


def at_the_same_address(i: int, p: nn.Parameter) -> None:
    p.grad.fill_(1.5 + i)
    p.grad.data = p.grad.view(-1).view(torch.bfloat16)[: p.numel()].view(p.shape)


def in_place(i: int, p: nn.Parameter) -> None:
    p.grad.set_(torch.full((p.numel() + 2,), 0.25 * i, device=p.device)[2:].view(p.shape))


def none_of_some(i: int, p: nn.Parameter) -> None:
    if i % 3 == 1:
        p.grad = None


def freeze_some(i: int, p: nn.Parameter) -> None:
    p.requires_grad_(i % 4 != 2)


CHANGES = {
    "nothing": lambda i, p: None,
    "dtype": to_dtype,
    "layout": to_layout,
    "channels last": to_channels_last,
    "size": to_size,
    "address": at_the_same_address,
    "storage": in_place,
    "none": none_of_some,
    "frozen": freeze_some,
}


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_of_the_step_before_is_believed(cell: Cell, change: str, noise: bool) -> None:
    """After usual steps the gradients change their kind, and then change it back."""
    results = []
    for quickly in (True, False):
        method, given = balancing(cell, noise)
        if not quickly:
            active = method.modalities.active
            method.modalities.active = lambda missing=(), eager=False, kept=None, a=active: a(
                missing
            )
        for seed, changed in enumerate(["nothing", change, "nothing"]):
            for p in given:
                p.requires_grad_(True)
                if changed == "nothing" and p.dtype != torch.float32:
                    p.grad, p.data = None, p.data.float()
            draw(given, seed, CHANGES[changed])
            before = [None if p.grad is None else p.grad.clone() for p in given]
            step(method, cell.device)
            touched = [
                p.requires_grad and not torch.equal(p.grad, b)
                for p, b in zip(given, before, strict=True)
                if b is not None
            ]
            assert sum(touched) >= 4
            results.append([None if p.grad is None else p.grad.clone() for p in given])
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


def test_a_parameter_that_is_replaced_is_named() -> None:
    nets = {n: nn.Linear(3, 2) for n in ("audio", "visual")}
    method = mmfuse.OGM(nets, noise=False)
    for net in nets.values():
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    step(method, "cpu")
    old = nets["audio"].weight
    nets["audio"].weight = nn.Parameter(torch.ones(2, 3))
    nets["audio"].weight.grad, old.grad = torch.ones(2, 3), None
    with pytest.raises(ValueError, match=r"encoders\['audio'\].weight is new"):
        step(method, "cpu")


def test_the_table_is_of_the_gradients_that_it_came_with() -> None:
    nets = {n: parameters() for n in ("audio", "visual")}
    modalities = Modalities(nets)
    first = modalities.active(eager=True)
    if first.table is None:
        pytest.skip("mmfuse._C was not built for this Python")
    kept = first.table.clone()
    for p in modalities.parameters:
        p.grad = torch.randn_like(p)
    second = modalities.active(eager=True)
    assert torch.equal(first.table, kept)
    assert second.table[:, 0].tolist() == [g.data_ptr() for g in second.grads]
    assert first.table[:, 0].tolist() == [g.data_ptr() for g in first.grads]
