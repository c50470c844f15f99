"""MMPareto's rule on numbers; its two gradients are in tests/loop/test_two_gradients.py."""

from __future__ import annotations

import math

import pytest
import torch
from cells import Cell
from torch import Tensor, nn

import mmfuse
from mmfuse.methods.mmpareto import min_norm_weight


@pytest.mark.parametrize("what", ["scores", "ratios", "coefficients"])
def test_numbers_of_ones_own_are_refused(what: str) -> None:
    nets = {n: torch.nn.Linear(2, 2) for n in ("a", "b")}
    losses = {n: net(torch.ones(1, 2)).sum() for n, net in nets.items()}
    mmpareto = mmfuse.MMPareto(nets)
    with pytest.raises(TypeError, match=rf"MMPareto\.backward takes no {what}"):
        mmpareto.backward(sum(losses.values()), unimodal_losses=losses, **{what: {"a": 1, "b": 1}})
    assert all(p.grad is None for net in nets.values() for p in net.parameters())


def test_the_shortest_vector() -> None:
    for _ in range(20):
        g1, g2 = torch.randn(2, 4, dtype=torch.float64)
        if g1 @ g2 > 0:
            g2 = -g2
        k = min_norm_weight(g1 @ g1, g1 @ g2, g2 @ g2)
        shares = torch.linspace(0, 1, 1001, dtype=torch.float64)
        lengths = (shares[:, None] * g1 + (1 - shares[:, None]) * g2).norm(dim=1)
        assert (k * g1 + (1 - k) * g2).norm() <= lengths.min() + 1e-12
        assert 0 < k < 1


def test_a_gradient_of_zero_gives_all_the_weight_to_itself() -> None:
    one, zero = torch.ones(()), torch.zeros(())
    torch.testing.assert_close(min_norm_weight(zero, zero, one), torch.tensor(0.999))
    torch.testing.assert_close(min_norm_weight(one, zero, zero), torch.tensor(0.001))


def set_gradients(nets: dict[str, nn.Linear], joint: Tensor, unimodal: Tensor) -> Tensor:
    """A joint loss with this gradient of both weights, and the unimodal losses."""
    return sum((net.weight * joint).sum() for net in nets.values()), {
        name: (net.weight * unimodal).sum() for name, net in nets.items()
    }


def made(cell: Cell, **options: object) -> tuple[mmfuse.MMPareto, dict[str, nn.Linear]]:
    nets = {n: nn.Linear(3, 2, bias=False, device=cell.device) for n in ("a", "b")}
    return mmfuse.MMPareto(nets, backend=cell.backend, **options), nets


def test_gradients_that_agree_are_added(cell: Cell) -> None:
    method, nets = made(cell, gamma=2.0)
    joint, unimodal = torch.rand(2, 2, 3, device=cell.device)
    loss, losses = set_gradients(nets, joint, unimodal)
    out = method.backward(loss, unimodal_losses=losses)
    assert out.coefficients.tolist() == [0.5, 0.5] and (out.cosines > 0).all()
    for net in nets.values():
        torch.testing.assert_close(net.weight.grad, 2.0 * (joint + unimodal))


def test_opposite_gradients_cancel_and_nothing_is_made_of_the_rounding(cell: Cell) -> None:
    """H is 0 up to rounding, g1 + g2 is not: the release divides the one by the other."""
    method, nets = made(cell)
    joint = torch.rand(2, 3, device=cell.device) + 0.5
    loss, losses = set_gradients(nets, joint, -0.3 * joint)
    out = method.backward(loss, unimodal_losses=losses)
    torch.testing.assert_close(out.cosines.cpu(), -torch.ones(2, dtype=out.cosines.dtype))
    for net in nets.values():
        assert net.weight.grad.abs().max() < 1e-5
    assert out.finite


def test_three_modalities_and_a_frozen_one(cell: Cell) -> None:
    nets = {n: nn.Linear(3, 2, bias=False, device=cell.device) for n in ("a", "b", "c")}
    nets["c"].weight.requires_grad_(False)
    method = mmfuse.MMPareto(nets, backend=cell.backend)
    joint = torch.rand(2, 3, device=cell.device)
    trained = {n: net for n, net in nets.items() if n != "c"}
    loss, losses = set_gradients(trained, joint, joint)
    zero = torch.zeros((), device=cell.device)
    out = method.backward(loss, unimodal_losses={**losses, "c": zero})
    assert out.coefficients.shape == (3,) and out.finite
    assert nets["c"].weight.grad is None
    for net in trained.values():
        torch.testing.assert_close(net.weight.grad, 3.0 * joint)


def masks(cell: Cell, **missing: bool) -> dict[str, Tensor]:
    """Masks of three samples, none of which has a missing modality."""
    return {n: torch.full((3,), not gone, device=cell.device) for n, gone in missing.items()}


def test_a_parameter_that_the_joint_loss_does_not_reach_has_its_unimodal_gradient(
    cell: Cell,
) -> None:
    """It was left without one, and out of the encoder's norms and cosine."""
    _, nets = made(cell)
    joint, unimodal = torch.rand(2, 2, 3, device=cell.device)
    own = nn.Parameter(torch.zeros(4, device=cell.device))
    nets["a"].register_parameter("own", own)
    method = mmfuse.MMPareto(nets, gamma=1.0, backend=cell.backend)
    loss, losses = set_gradients(nets, joint, -0.1 * unimodal)
    losses["a"] = losses["a"] + (2.0 * own).sum()
    out = method.backward(loss, unimodal_losses=losses)
    g1 = torch.cat([joint.flatten(), torch.zeros(4, device=cell.device)]).double()
    g2 = torch.cat([-0.1 * unimodal.flatten(), torch.full_like(own, 2.0)]).double()
    cosine = (g1 @ g2) / (g1.norm() * g2.norm())
    torch.testing.assert_close(out.cosines[0].double(), cosine)
    k = min_norm_weight(g1 @ g1, g1 @ g2, g2 @ g2)
    torch.testing.assert_close(out.coefficients[0].double(), k)
    # A tensor becomes no shorter than the sum of both gradients.
    torch.testing.assert_close(own.grad, torch.full_like(own, max(2.0, 4.0 * (1 - float(k)))))


def test_masks_of_samples_change_nothing(cell: Cell) -> None:
    found = []
    joint, unimodal = torch.rand(2, 2, 3, device=cell.device)
    for more in ({}, {"present": masks(cell, a=False, b=False)}):
        torch.manual_seed(0)
        method, nets = made(cell)
        loss, losses = set_gradients(nets, joint, -0.3 * unimodal)
        if more:
            more["present"]["a"][1:] = False
        out = method.backward(loss, unimodal_losses=losses, **more)
        found.append([out.coefficients, out.cosines, *(n.weight.grad for n in nets.values())])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert (found[0][0] != 0.5).all()


@pytest.mark.parametrize("gradients", ["none", "some"])
def test_a_modality_that_no_sample_has_is_left_alone(cell: Cell, gradients: str) -> None:
    """If its encoder has gradients nonetheless, their sum is what the plain loss gives it."""
    method, nets = made(cell)
    joint, unimodal = torch.rand(2, 2, 3, device=cell.device)
    reached = nets if gradients == "some" else {"a": nets["a"]}
    loss, losses = set_gradients(reached, joint, -0.3 * unimodal)
    empty = torch.full((), torch.nan, device=cell.device)  # the mean over no samples
    gone = masks(cell, a=False, b=True)
    out = method.backward(loss, unimodal_losses={"b": empty, **losses}, present=gone)
    assert out.coefficients[1] == 0.5 and out.coefficients[0] != 0.5
    assert out.cosines[1].isnan() and out.finite
    if gradients == "none":
        assert nets["b"].weight.grad is None
    else:
        torch.testing.assert_close(nets["b"].weight.grad, joint - 0.3 * unimodal)
    # A step without masks is as strict as before, also after one that was not.
    for net in nets.values():
        net.weight.grad = None
    loss, losses = set_gradients({"a": nets["a"]}, joint, unimodal)
    with pytest.raises(RuntimeError, match=r"unimodal_losses\['b'\] does not require grad"):
        method.backward(loss, unimodal_losses={**losses, "b": empty})


def test_wrong_masks_are_named_before_a_backward_pass(cell: Cell) -> None:
    method, nets = made(cell)
    loss, losses = set_gradients(nets, *torch.rand(2, 2, 3, device=cell.device))
    good = masks(cell, a=False, b=False)
    for wrong, error, message in (
        ({"a": good["a"]}, ValueError, "missing"),
        ({**good, "b": good["b"][:2]}, ValueError, r"present\['b'\] must have shape \[3\]"),
        ({**good, "b": good["b"].float()}, TypeError, r"present\['b'\] must be a bool tensor"),
        ([good["a"]], TypeError, "must map"),
    ):
        with pytest.raises(error, match=message):
            method.backward(loss, unimodal_losses=losses, present=wrong)
    assert all(net.weight.grad is None for net in nets.values())


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
def test_bad_options(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be a positive finite number"):
        mmfuse.MMPareto({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}, gamma=gamma)
