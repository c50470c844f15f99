"""Two gradients of each encoder: alone, under DDP and under FSDP2, which average over ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import TwoEncoders
from ranks import ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import mmfuse
from mmfuse.loop.modalities import Modalities
from mmfuse.loop.shards import whole_state
from mmfuse.loop.two_gradients import checked_losses

ROWS, STEPS = 8, 3


class Net(TwoEncoders):
    """With a head of its own for each encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleDict({"audio": nn.Linear(4, 3), "visual": nn.Linear(4, 3)})

    def forward(
        self, audio: Tensor, visual: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        features = {"audio": self.audio_net(audio), "visual": self.visual_net(visual)}
        joint = F.cross_entropy(self.head(torch.cat(list(features.values()), 1)), labels)
        # Against each other, so that there are conflicts.
        signs = {"audio": 1.0, "visual": -1.0}
        return joint, {
            name: F.cross_entropy(signs[name] * self.own[name](f), labels)
            for name, f in features.items()
        }


def make() -> Net:
    torch.manual_seed(3)
    return Net().double()


def data(step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(70 + step)
    labels = torch.randint(0, 3, (ROWS,), generator=generator)
    audio, visual = (torch.randn(ROWS, n, generator=generator).double() for n in (5, 7))
    return audio + labels.unsqueeze(1), visual, labels


def train(rank: int, how: str) -> dict[str, Any]:
    """Parameters, gradients of the last step, and what was decided."""
    model, size = make(), 1
    wrapped: nn.Module = model
    if how != "alone":
        size = dist.get_world_size()
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    if how == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (size,))
        for part in (*model.encoders.values(), model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    method = mmfuse.MMPareto(model.encoders)
    mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    said = []
    for step in range(STEPS):
        optimizer.zero_grad()
        joint, unimodal = wrapped(*(x[mine] for x in data(step)))
        out = method.backward(joint, unimodal_losses=unimodal)
        optimizer.step()
        said.append([out.coefficients, out.cosines])
    gradients = {name: p.grad for name, p in model.named_parameters()}
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return {"said": said, **whole_state({"gradients": gradients, "parameters": parameters})}


# One rank: as where a script for several is started as one process.
@pytest.mark.parametrize(("how", "size"), [("ddp", 2), ("ddp", 1), ("fsdp2", 2), ("fsdp2", 1)])
def test_ranks_are_one_process_with_the_whole_batch(how: str, size: int) -> None:
    alone = train(0, "alone")
    assert any((cosines < 0).any() for _, cosines in alone["said"]), "there are conflicts"
    assert any((cosines > 0).any() for _, cosines in alone["said"])
    for found in ranks(size).run(train, how):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12)


class WithoutSome(Net):
    """Runs an encoder where a sample has its modality; zeros stand for the others' features."""

    def forward(
        self, audio: Tensor, visual: Tensor, labels: Tensor, names: tuple[str, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {"audio": audio, "visual": visual}
        features = {n: self.encoders[n](x) for n, x in inputs.items() if n in names}
        zeros = torch.zeros(len(labels), 4, dtype=torch.float64)
        joint = self.head(torch.cat([features.get(n, zeros) for n in inputs], 1))
        unimodal = {
            n: F.cross_entropy((1.0 if n == "audio" else -1.0) * self.own[n](f), labels)
            for n, f in features.items()
        }
        nothing = torch.full((), torch.nan, dtype=torch.float64)
        return F.cross_entropy(joint, labels), {n: unimodal.get(n, nothing) for n in inputs}


def with_masks(rank: int, gone: bool) -> list[Any]:
    """The second rank has no audio, or none has."""
    torch.manual_seed(3)
    model = WithoutSome().double()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    method = mmfuse.MMPareto(model.encoders)
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    here = torch.full((ROWS // 2,), not (rank or gone))
    present = {"audio": here, "visual": torch.ones_like(here)}
    names = tuple(n for n, mask in present.items() if bool(mask.any()))
    joint, unimodal = wrapped(*(x[mine] for x in data(0)), names)
    out = method.backward(joint, unimodal_losses=unimodal, present=present)
    return [out.coefficients, out.cosines, [p.grad for p in model.audio_net.parameters()]]


@pytest.mark.parametrize("gone", [False, True])
def test_ranks_without_a_modality(gone: bool) -> None:
    """The other modality's gradients reach all; one that no rank has is left alone."""
    first, second = ranks(2).run(with_masks, gone)
    torch.testing.assert_close(first[:2], second[:2], rtol=0, atol=0, equal_nan=True)
    coefficients, cosines, grads = first
    assert bool(cosines[0].isnan()) == gone and not bool(cosines[1].isnan())
    if gone:
        assert coefficients[0] == 0.5 and all(g is None or not bool(g.any()) for g in grads)
        return
    torch.testing.assert_close(grads, second[2], rtol=0, atol=0)
    # The mean over the ranks, of which the second adds nothing to either gradient.
    torch.manual_seed(3)
    model = WithoutSome().double()
    joint, unimodal = model(*(x[: ROWS // 2] for x in data(0)), ("audio", "visual"))
    alone = mmfuse.MMPareto(model.encoders).backward(joint, unimodal_losses=unimodal)
    torch.testing.assert_close(cosines[0], alone.cosines[0], rtol=1e-9, atol=0)
    for grad, p in zip(grads, model.audio_net.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad / 2, rtol=1e-9, atol=1e-12)


def expanded(rank: int) -> list[Tensor]:
    """The gradient of a sum is one number, expanded over the whole weight."""
    nets = nn.ModuleDict({name: nn.Linear(2, 3, bias=False) for name in ("a", "b")})
    wrapped = DistributedDataParallel(nets["a"]), DistributedDataParallel(nets["b"])
    weights = {name: net.weight for name, net in nets.items()}
    joint = sum(net(torch.ones(1, 2)).sum() for net in wrapped)
    unimodal = {name: (rank + 1.0) * weight.sum() for name, weight in weights.items()}
    mmfuse.MMPareto(dict(nets)).backward(joint, unimodal_losses=unimodal)
    return [weight.grad for weight in weights.values()]


def test_gradients_that_are_expanded_views_are_averaged() -> None:
    for grads in ranks(2).run(expanded):
        for grad in grads:  # 1.5 times the sum of 1 and the mean of 1 and 2
            torch.testing.assert_close(grad, torch.full((3, 2), 1.5 * 2.5))


class Branching(Net):
    """Each encoder has two branches of one shape, of which a pass takes one, as with LayerDrop."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_net = nn.ModuleList([nn.Linear(5, 4) for _ in range(2)])
        self.visual_net = nn.ModuleList([nn.Linear(7, 4) for _ in range(2)])

    def forward(
        self, audio: Tensor, visual: Tensor, labels: Tensor, branch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        features = {"audio": self.audio_net[branch](audio), "visual": self.visual_net[0](visual)}
        joint = F.cross_entropy(self.head(torch.cat(list(features.values()), 1)), labels)
        return joint, {n: F.cross_entropy(self.own[n](f), labels) for n, f in features.items()}


def branching(rank: int) -> list[Tensor | None]:
    """The unimodal losses of the two ranks reach different parameters."""
    torch.manual_seed(3)
    model = Branching().double()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    joint, unimodal = wrapped(*(x[mine] for x in data(0)), rank)
    mmfuse.MMPareto(model.encoders).backward(joint, unimodal_losses=unimodal)
    return [p.grad for net in model.encoders.values() for p in net.parameters()]


def test_ranks_whose_losses_reach_different_parameters() -> None:
    torch.manual_seed(3)
    model = Branching().double()
    halves = [slice(rank * ROWS // 2, (rank + 1) * ROWS // 2) for rank in range(2)]
    losses = [model(*(x[half] for x in data(0)), rank) for rank, half in enumerate(halves)]
    joint = sum(loss for loss, _ in losses) / 2
    unimodal = {n: sum(each[n] for _, each in losses) / 2 for n in model.encoders}
    mmfuse.MMPareto(model.encoders).backward(joint, unimodal_losses=unimodal)
    expected = [p.grad for net in model.encoders.values() for p in net.parameters()]
    assert sum(g is not None for g in expected) == 6
    for found in ranks(2).run(branching):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def static(rank: int) -> str:
    model = make()
    wrapped = DistributedDataParallel(model, static_graph=True)
    joint, unimodal = wrapped(*data(0))
    try:
        mmfuse.MMPareto(model.encoders).backward(joint, unimodal_losses=unimodal)
    except RuntimeError as error:
        assert all(p.grad is None for p in model.parameters())
        return str(error)
    return ""


def test_a_static_graph_is_refused() -> None:
    """Its first step reduces what the first of the two backward passes has left: nothing."""
    for message in ranks(2).run(static):
        assert "static_graph=True" in message and "make it without" in message


def by_hand(model: Net, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The formula, tensor by tensor, from gradients of each loss."""
    joint, unimodal = model(*batch)
    total = joint + sum(unimodal.values())
    found = {}
    for name, p in model.named_parameters():
        (found[name],) = torch.autograd.grad(total, p, retain_graph=True)
    for name, net in model.encoders.items():
        parameters = list(net.parameters())
        g1 = torch.autograd.grad(joint, parameters, retain_graph=True)
        g2 = torch.autograd.grad(unimodal[name], parameters, retain_graph=True)
        one, two = (torch.cat([g.flatten() for g in gs]) for gs in (g1, g2))
        k = 0.5
        if one @ two <= 0:
            k = float((two @ two - one @ two) / (one - two).square().sum())
        for key, a, b in zip(dict(net.named_parameters()), g1, g2, strict=True):
            h = 2 * k * a + 2 * (1 - k) * b
            found[f"{name}_net.{key}"] = 1.5 * h * max(1.0, float((a + b).norm() / h.norm()))
    return found


def test_the_formula() -> None:
    model = make()
    expected = by_hand(copy.deepcopy(model), data(0))
    joint, unimodal = model(*data(0))
    mmfuse.MMPareto(model.encoders).backward(joint, unimodal_losses=unimodal)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_gradients_that_were_there_belong_to_the_joint_loss() -> None:
    """They may come from a penalty on the weights, say, with a backward pass of its own."""
    models = [make(), make()]
    joint, unimodal = models[0](*data(0))
    mmfuse.MMPareto(models[0].encoders).backward(
        joint + 0.1 * sum(p.square().sum() for p in models[0].parameters()),
        unimodal_losses=unimodal,
    )
    (0.1 * sum(p.square().sum() for p in models[1].parameters())).backward()
    joint, unimodal = models[1](*data(0))
    mmfuse.MMPareto(models[1].encoders).backward(joint, unimodal_losses=unimodal)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_an_encoder_that_a_unimodal_loss_does_not_reach() -> None:
    model = make()
    joint, unimodal = model(*data(0))
    (plain,) = torch.autograd.grad(joint, model.audio_net[0].weight, retain_graph=True)
    silent = {**unimodal, "audio": torch.zeros((), dtype=torch.float64, requires_grad=True)}
    out = mmfuse.MMPareto(model.encoders).backward(joint, unimodal_losses=silent)
    assert out.coefficients[0] == 0.001 and out.cosines[0].isnan()
    # h = 0.002 g1 is lengthened to |g1|.
    torch.testing.assert_close(model.audio_net[0].weight.grad, 1.5 * plain)


def test_a_unimodal_loss_without_a_gradient() -> None:
    """One made under no_grad would leave its encoder the joint gradient alone, and say nothing."""
    model = make()
    joint, unimodal = model(*data(0))
    broken = {**unimodal, "visual": unimodal["visual"].detach()}
    mmpareto = mmfuse.MMPareto(model.encoders)
    with pytest.raises(RuntimeError, match=r"unimodal_losses\['visual'\] does not require grad"):
        mmpareto.backward(joint, unimodal_losses=broken)
    assert all(p.grad is None for p in model.parameters())
    model.visual_net.requires_grad_(False)  # whose loss needs none
    assert mmpareto.backward(joint, unimodal_losses=broken).finite


def test_losses_that_do_not_fit() -> None:
    modalities = Modalities({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    good = torch.ones(())
    with pytest.raises(TypeError, match=r"unimodal_losses\['a'\] is not a tensor but float"):
        checked_losses(modalities, {"a": 1.0, "b": good})
    with pytest.raises(ValueError, match=r"unimodal_losses\['a'\] must be a scalar, got shape \[2"):
        checked_losses(modalities, {"a": torch.ones(2), "b": good})


def test_a_backward_pass_that_fails_leaves_the_gradients_that_were_there() -> None:
    model = make()
    joint, unimodal = model(*data(0))
    parameters = list(model.audio_net.parameters())
    for p in parameters:
        p.grad = torch.ones_like(p)
    broken = {name: loss.detach() for name, loss in unimodal.items()}
    with pytest.raises(RuntimeError, match="does not require grad"):
        mmfuse.MMPareto(model.encoders).backward(joint, unimodal_losses=broken)
    assert all((p.grad == 1).all() for p in parameters)
