"""Any type of device: the reference runs there, in float32 where it lacks float64."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
import torch.distributed as dist
from balancing import KINDS, WITH_MORE, balance, make, see, show, start
from no_float64 import DEVICE, OnDevice, back, device_without_float64, moved
from ranks import ranks
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import mmfuse.triton
from mmfuse import _devices, ops
from mmfuse.__main__ import report
from mmfuse.loop.passes import scoring
from mmfuse.loop.shards import merge_stats
from mmfuse.loop.state import State
from mmfuse.ops import _registry
from mmfuse.ops._registry import OPS, active_backend

SIZES = {"audio": 5, "visual": 7}
LABELS = torch.tensor([0, 1, 2, 0, 1, 1])
# A float32 sum of n terms is off by n roundings at most, n·2⁻²⁴ of the largest; n is below 2¹².
ROUNDINGS = 2.0**-12


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Asserts equality within the roundings of float32 sums, and of the result's own dtype."""
    if not expected.is_floating_point():
        assert torch.equal(found, expected)
        return
    assert found.dtype != torch.float64
    largest = float(expected.nan_to_num(0, 0, 0).abs().max()) if expected.numel() else 0.0
    bound = max(ROUNDINGS, 2 * torch.finfo(found.dtype).eps)
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=bound, atol=bound * largest, equal_nan=True
    )


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op(op: str) -> None:
    call = OPS[op].overloads["reference"]
    for arguments in samples.arguments("cpu")[op]:
        there = moved(arguments)
        here = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, back(there))
        with torch.no_grad():
            with device_without_float64():
                results = call(*there)
            expected = call(*here)
        assert all(isinstance(x, OnDevice) for x in tree_leaves(results) if isinstance(x, Tensor))
        ours, theirs = tree_leaves((back(results), back(there))), tree_leaves((expected, here))
        for found, wanted in zip(ours, theirs, strict=True):
            if isinstance(wanted, Tensor):
                assert_near(found, wanted)


class Net(nn.Module):
    """Two encoders and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(d, 4), nn.Tanh()) for n, d in SIZES.items()}
        )
        self.head = nn.Linear(8, 3)


def train(
    kind: str, device: torch.device, way: str | None = None
) -> tuple[list[Any], list[Tensor]]:
    """The results of a few steps, and gradients and state after each."""
    model = Net()
    inputs = {n: torch.randn(6, d).to(device) for n, d in SIZES.items()}
    labels = LABELS.to(device)
    model.to(device)
    stream = mmfuse.NoiseStream(3, device)
    options = {}
    if way == "criterion":
        weight = torch.tensor([0.5, 1.0, 2.0]).to(device)
        options["criterion"] = nn.CrossEntropyLoss(weight=weight)
    method = make(kind, dict(model.encoders), stream=stream, **options)
    if isinstance(method, nn.Module):
        method.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results, values = [], []
    for _ in range(3):
        start(method)
        optimizer.zero_grad()
        features = {n: net(inputs[n]) for n, net in model.encoders.items()}
        seen = see(model.head, features, inputs, labels)
        if way is not None:
            seen |= {"way": way}
        results.append(balance(method, show(method, model.head, seen)))
        values += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        state = method.state_dict()
        values += [x.clone() for x in tree_leaves(state) if isinstance(x, Tensor)]
        optimizer.step()
    method.load_state_dict(method.state_dict())
    return results, values


def in_turns(device: torch.device) -> tuple[list[Any], list[Tensor]]:
    """MLA: turns, in one of which nobody has the modality, and its fusion."""
    model, values, results = Net(), [], []
    inputs = {n: torch.randn(6, d).to(device) for n, d in SIZES.items()}
    head = nn.Linear(4, 3).to(device)
    model.to(device)
    mla = mmfuse.MLA(head, batches=2).to(device)
    here = {"audio": LABELS.to(device) != 0, "visual": LABELS.to(device) > 5}
    for _ in range(2):
        for told in ({}, here):
            for name, net in model.encoders.items():
                head.zero_grad()
                feature = net(inputs[name]).detach()
                head(feature).square().mean().backward()
                results.append(mla.step(feature, present=told.get(name)))
                values += [mla.projector.clone(), mla.turns.clone(), head.weight.grad.clone()]
    logits = {n: head(net(inputs[n])).detach() for n, net in model.encoders.items()}
    for told in (None, here):
        values += [*mla.fuse(logits, present=told)]
    values += [*mla.fuse(logits, criterion=nn.BCEWithLogitsLoss())]
    mla.load_state_dict(mla.state_dict())
    return results, values


def between_epochs(device: torch.device) -> tuple[list[Any], list[Tensor]]:
    """ReLearning: weights and a reset, with masks and without."""
    model, results = Net().to(device), []
    relearning = mmfuse.ReLearning(dict(model.encoders))
    generator = torch.Generator().manual_seed(1)
    labels = LABELS.to(device)
    here = {n: labels != m for m, n in enumerate(SIZES)}
    for told in (None, here):
        splits = []
        for _ in range(2):
            found = {n: torch.randn(6, 4, generator=generator).to(device) for n in SIZES}
            splits += [found, labels]
        more = {"train_present": told, "val_present": told}
        out = relearning.weights(*splits, **more, cluster=lambda x: (x.mean(1) > 0).long())
        with torch.no_grad():
            for p in model.encoders.parameters():
                p.add_(1.0)
        relearning.reset(out.coefficients)
        results.append(out)
    relearning.load_state_dict(relearning.state_dict())
    return results, [p.detach().clone() for p in model.parameters()]


EVERY = [
    *((kind, None) for kind in KINDS),
    *((kind, way) for kind, way in WITH_MORE if way != "scores"),
    ("MLA", None),
    ("ReLearning", None),
]


@pytest.mark.parametrize(("kind", "way"), EVERY)
def test_every_method(kind: str, way: str | None) -> None:
    """Steps, state and monitors, with the noise stream on the device."""
    others: dict[str, Any] = {"MLA": in_turns, "ReLearning": between_epochs}
    call = others.get(kind, partial(train, kind, way=way))
    torch.manual_seed(5)
    with device_without_float64() as device:
        found, values = call(device)
    torch.manual_seed(5)
    with mmfuse.use_backend("reference"):
        expected, wanted = call(torch.device("cpu"))
    assert any(x.device == DEVICE for x in values)
    assert len(values) == len(wanted)
    for a, b in zip(back(values), wanted, strict=True):
        assert_near(a, b)
    for one, other in zip(found, expected, strict=True):
        for field in dataclasses.fields(one):
            a, b = (tree_leaves(getattr(r, field.name)) for r in (one, other))
            for x, y in zip(back(a), b, strict=True):
                if isinstance(y, Tensor):
                    assert_near(x.detach(), y.detach())


def test_every_method_of_the_catalogue_is_there() -> None:
    tried = {KINDS[kind].method if kind in KINDS else kind for kind, _ in EVERY}
    assert tried == set(mmfuse.METHODS)


def test_what_is_known_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are tried, once; the state comes back in float64 from a device without it."""
    assert [_devices.has_float64(d) for d in ("cpu", "cuda", "meta", "mps")] == [1, 1, 1, 0]
    tried = []
    monkeypatch.setattr(_devices, "_computes", lambda kind: bool(tried.append(kind)))
    monkeypatch.delitem(_devices.WIDE, "hpu", raising=False)
    for _ in range(2):
        assert _devices.narrowed(torch.float64, torch.device("hpu")) == torch.float32
    assert tried == ["hpu"]
    monkeypatch.delitem(_devices.WIDE, "hpu")
    assert _devices.narrowed(torch.int64, torch.device("mps")) == torch.int64


def test_a_state_narrows_where_it_must_and_widens_again() -> None:
    state = State("OGM", torch.device("cpu"), {"sums": torch.ones(2, dtype=torch.float64)})
    with device_without_float64() as device:
        state.follow(device)
        assert (state["sums"].device, state["sums"].dtype) == (device, torch.float32)
        state.follow(torch.device("cpu"))
    assert (state["sums"].device, state["sums"].dtype) == (torch.device("cpu"), torch.float64)


def test_the_device_refuses_what_the_real_one_does() -> None:
    with device_without_float64() as device:
        x = torch.ones(2, device=device)
        for call in (x.double, lambda: torch.zeros(2, dtype=torch.float64, device=device)):
            with pytest.raises(TypeError, match=r"has no torch.float64"):
                call()
        with pytest.raises(RuntimeError, match="tensors on mps:0 and on cpu"):
            x + torch.ones(2)


class TestBackends:
    """Triton runs if it says so; the reference runs everywhere."""

    def test_types_that_no_kernel_is_for(self) -> None:
        for kind in ("mps", "hpu"):
            assert active_backend("grad_stats", kind) == "reference"
        with pytest.raises(RuntimeError, match="Triton does not run on mps: its active driver"):
            active_backend("grad_stats", "mps", "triton")

    @pytest.mark.parametrize(
        ("target", "wide", "backend"),
        [("xpu", True, "triton"), ("xpu", False, "reference"), ("cuda", True, "reference")],
    )
    def test_xpu(
        self, target: str, wide: bool, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mmfuse.triton, "active_target", lambda: target)
        monkeypatch.setitem(_devices.WIDE, "xpu", torch.float64 if wide else torch.float32)
        op = OPS["grad_stats"]
        monkeypatch.setattr(op, "_chosen", {})
        monkeypatch.setattr(_registry, "_warned", {"triton"})
        assert op.resolve(None, torch.device("xpu", 0)) == backend

    def test_the_report_shows_them(self) -> None:
        lines = report().splitlines()
        assert any(re.fullmatch(r"cpu +yes +reference(, \w+)*", line) for line in lines)
        assert any(line.startswith("mps ") for line in lines)
        assert "Any other type of device has the reference." in lines


def test_the_generator_of_another_device_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Any] = []
    module = SimpleNamespace(
        is_available=lambda: True,
        get_rng_state=lambda *which: ("state", which),
        set_rng_state=lambda state, *which: states.append((state, which)),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    for kind in ("xpu", "mps"):
        device = torch.device(kind, 0)
        which = () if kind == "mps" else (device,)
        with scoring(nn.Linear(1, 1), device):
            states.clear()
        assert states == [(("state", which), which)]


def _merged(rank: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and second moment of a tensor of which each rank has a part, far from zero."""
    _devices.WIDE["cpu"] = wide
    try:
        part = _far_from_zero()[rank::2].contiguous()
        place = SimpleNamespace(groups=(dist.group.WORLD,))
        stats: Any = merge_stats(ops.grad_stats([part], backend="reference"), [place])  # type: ignore[list-item]
    finally:
        _devices.WIDE["cpu"] = torch.float64
    return stats.mean, stats.m2


def _far_from_zero() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 1000 + torch.randn(2048, generator=generator) / 8


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_shards_are_merged_without_float64(wide: torch.dtype) -> None:
    """Σg² − (Σg)²/n in float32 would be off by more than the variance itself."""
    whole = _far_from_zero().double()
    for mean, m2 in ranks(2).run(_merged, wide):
        torch.testing.assert_close(mean.double(), whole.mean().view(1), rtol=2.0**-22, atol=0)
        # A value's distance from the mean is off by a rounding of the mean, 2⁻¹⁵, which is 2⁻¹² of
        # the standard deviation and adds its square.
        expected = (whole - whole.mean()).square().sum().view(1)
        torch.testing.assert_close(m2.double(), expected, rtol=2.0**-12, atol=0)
