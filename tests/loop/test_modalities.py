"""Encoders to parameter lists, and tensors of the methods along them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mmfuse
from mmfuse.loop.modalities import Modalities, per_tensor
from mmfuse.ops._tensors import by_device


def test_iterables_and_generators_of_parameters() -> None:
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    modalities = Modalities({"a": a.parameters(), "b": [b.weight]})
    assert [id(p) for p in modalities.parameters] == [id(p) for p in (a.weight, a.bias, b.weight)]
    assert modalities.parameter_names == [
        "encoders['a'][0]",
        "encoders['a'][1]",
        "encoders['b'][0]",
    ]


def test_tied_weights_within_an_encoder_count_once() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    modalities = Modalities({"a": [a.weight, a.weight], "b": b})
    assert len(modalities.parameters) == 3


@pytest.mark.parametrize(
    ("select", "dims"),
    [("all", {1, 2, 4}), ("matrix", {2, 4}), ("conv", {4}), (lambda p: p.dim() == 1, {1})],
)
def test_selection(select, dims: set[int]) -> None:
    nets = {n: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2)) for n in "ab"}
    assert {p.dim() for p in Modalities(nets, select).parameters} == dims


def test_spreading_coefficients_over_tensors() -> None:
    nets = {n: nn.Linear(2, 2) for n in "abc"}
    modalities = Modalities(nets)
    for p in (*nets["a"].parameters(), nets["c"].bias):
        p.grad = torch.ones_like(p)
    nets["b"].requires_grad_(False)
    active = modalities.active()
    assert active.ids == [0, 1, 5]
    assert per_tensor(torch.tensor([1.0, 2.0, 3.0]), active.modality).tolist() == [1.0, 1.0, 3.0]


def test_grouping_by_device() -> None:
    tensors = [torch.ones(1), torch.ones(1, device="meta"), torch.ones(1)]
    assert by_device(tensors) == {torch.device("cpu"): [0, 2], torch.device("meta"): [1]}


def test_tensors_on_two_devices_each_get_their_own_numbers() -> None:
    """A meta tensor stands for the second device: it has no numbers, the others' must be right."""
    stream = mmfuse.NoiseStream(3)
    plain = [torch.randn(100) for _ in range(2)]
    mixed = [plain[0].clone(), torch.randn(7, device="meta"), plain[1].clone()]
    w = [torch.randn_like(g) for g in mixed]
    w0 = [torch.randn_like(g) for g in mixed]
    vectors = [torch.rand(3) for _ in range(3)]
    mmfuse.ops.update_grads_(
        mixed,
        vectors[0],
        params=w,
        anchors=w0,
        pull=vectors[1],
        noise_std=vectors[2],
        stream=stream,
    )
    pick = torch.tensor([0, 2])
    mmfuse.ops.update_grads_(
        plain,
        vectors[0][pick],
        params=w[::2],
        anchors=w0[::2],
        pull=vectors[1][pick],
        noise_std=vectors[2][pick],
        stream=stream.place([0, 2]),
    )
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[2], plain[1])


@pytest.mark.gpu
def test_cpu_and_gpu_tensors_in_one_call() -> None:
    grads = [torch.randn(10), torch.randn(20, device="cuda"), torch.randn(30)]
    expected = [g.cpu() * k for g, k in zip(grads, (0.5, 0.25, 2.0), strict=True)]
    stats = mmfuse.ops.grad_stats(grads)
    torch.testing.assert_close(stats.mean, torch.stack([g.cpu().mean() for g in grads]))
    finite = torch.ones((), dtype=torch.bool)
    squares = [g.cpu().square().sum() for g in grads]
    found = torch.empty(3)
    mmfuse.ops.update_grads_(grads, torch.tensor([0.5, 0.25, 2.0]), finite=finite, sq_norm=found)
    torch.testing.assert_close(found, torch.stack(squares))
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g.cpu(), e)
    assert bool(finite)


def test_a_module_dict_is_a_mapping_of_encoders() -> None:
    encoders = nn.ModuleDict({"audio": nn.Linear(3, 2), "visual": nn.Linear(4, 2)})
    found = Modalities(encoders)
    assert found.names == ("audio", "visual")
    assert [id(p) for p in found.parameters] == [id(p) for p in encoders.parameters()]
    for made in mmfuse.METHODS.values():
        if issubclass(made, mmfuse.GradientMethod):
            for method in (made, getattr(made, "official", made)):
                assert method(encoders, select="all").modalities.names == ("audio", "visual")
