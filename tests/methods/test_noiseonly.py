"""OGM-GE's noise alone."""

from __future__ import annotations

import pytest
import torch
from cells import Cell
from torch import nn

import mmfuse


def test_it_is_ogm_ge_with_every_coefficient_at_1(cell: Cell) -> None:
    """It adds the gradient's standard deviation times the stream's numbers."""
    nets = {name: nn.Linear(9, 7).to(cell.device) for name in ("audio", "visual", "text")}
    parameters = [p for net in nets.values() for p in net.parameters()]
    logits = {name: (i + 1) * torch.randn(5, 4) for i, name in enumerate(nets)}
    logits = {name: z.to(cell.device) for name, z in logits.items()}
    for p in parameters:
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in parameters]
    labels = torch.randint(0, 4, (5,), device=cell.device)
    stream = mmfuse.NoiseStream(7, cell.device)
    noise = [stream.normal(p.numel(), i).view_as(p) for i, p in enumerate(parameters)]
    out = mmfuse.NoiseOnly(nets, stream=stream, backend=cell.backend).step(logits, labels)
    assert out.coefficients.tolist() == [1.0, 1.0, 1.0]
    assert out.ratios.unique().numel() == 3, "the modalities differ, and nothing follows from it"
    for p, g, z in zip(parameters, before, noise, strict=True):
        torch.testing.assert_close(p.grad, g + g.std() * z, rtol=1e-5, atol=1e-5)
    assert stream.state.tolist() == [7, 1]


def test_outside_of_its_epochs_nothing_happens() -> None:
    nets = {name: nn.Linear(2, 2) for name in ("a", "b")}
    method = mmfuse.NoiseOnly(nets, starts=1)
    method.set_epoch(0)
    for net in nets.values():
        net.weight.grad, net.bias.grad = torch.ones(2, 2), torch.ones(2)
    method.step({name: torch.zeros(1, 2) for name in nets}, torch.zeros(1, dtype=torch.int64))
    assert all((p.grad == 1).all() for net in nets.values() for p in net.parameters())


def test_without_noise_nothing_is_left() -> None:
    with pytest.raises(ValueError, match="noise must be True or a callable"):
        mmfuse.NoiseOnly({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}, noise=False)
