"""FSDP2 where a module called first keeps its parameters gathered after a forward pass.

Only a backward pass shards them again, so that whatever writes to parameters between another pass
and the next forward pass would write in vain: the copies of before are what that pass uses.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import TwoEncoders
from parallel import SAME
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import mmfuse
from mmfuse.loop.passes import evaluating, scoring, training
from mmfuse.loop.shards import whole_state

CPU, ROWS, STEPS = torch.device("cpu"), 8, 3
KINDS: dict[str, Callable[..., AbstractContextManager[None]]] = {
    "scoring": scoring,
    "evaluating": evaluating,
    "training": training,
}


class Net(TwoEncoders):
    """It has several ways through its encoders."""

    def features(self, audio: Tensor, visual: Tensor) -> dict[str, Tensor]:
        return {"audio": self.audio_net(audio), "visual": self.visual_net(visual)}

    def encode(self, audio: Tensor, visual: Tensor) -> Tensor:
        """For `register_fsdp_forward_method`, which wants no method that `forward` calls."""
        return torch.stack([self.audio_net(audio), self.visual_net(visual)])

    def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
        return self.head(torch.cat(list(self.features(audio, visual).values()), 1))


def made(rank: int, sharded: bool, parts: bool = False) -> Net:
    """The model as one unit, or its encoders and its head as one each."""
    torch.manual_seed(3)
    model = Net().double()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (model.audio_net, model.visual_net, model.head) if parts else (model,):
            fully_shard(part, mesh=mesh)
    return model


def data(step: int, rank: int, sharded: bool) -> tuple[Tensor, ...]:
    """The whole batch, or a rank's half of it."""
    generator = torch.Generator().manual_seed(70 + step)
    labels = torch.randint(0, 3, (ROWS,), generator=generator)
    audio, visual = (torch.randn(ROWS, n, generator=generator).double() for n in (5, 7))
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    return tuple(x[half] if sharded else x for x in (audio + labels.unsqueeze(1), visual, labels))


def whole(tensors: Any) -> list[Tensor]:
    found: list[Tensor] = whole_state([t.detach() for t in tensors])
    return found


def masked(rank: int, sharded: bool) -> list[Tensor]:
    """The scores come from passes between the backward pass and the optimizer's step."""
    model = made(rank, sharded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=False)
    ogm = mmfuse.OGM(model.encoders, noise=False)
    for step in range(STEPS):
        audio, visual, labels = data(step, rank, sharded)
        optimizer.zero_grad()
        F.cross_entropy(model(audio, visual), labels).backward()
        ogm.step(mmfuse.unimodal_outputs(model, {"audio": audio, "visual": visual}), labels)
        optimizer.step()
    return whole(model.parameters())


def test_masked_passes_leave_no_old_weights() -> None:
    expected = masked(0, False)
    for found in ranks(2).run(masked, True):
        torch.testing.assert_close(found, expected, **SAME)


def monitored(rank: int, sharded: bool) -> list[Tensor]:
    """RedReg calls encoders that are units of their own, of which no other is above."""
    model = made(rank, sharded, parts=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=False)
    options: dict[str, Any] = {"epochs": 1, "threshold": -1e9, "agreement": (-2.0, -2.0)}
    redreg = mmfuse.RedReg(model.encoders, stream=mmfuse.NoiseStream(1), window=2, **options)
    redreg.set_epoch(0)
    for step in range(STEPS):
        audio, visual, labels = data(step, rank, sharded)
        optimizer.zero_grad()
        features = model.features(audio, visual)
        logits = {name: z[:, :3].detach() for name, z in features.items()}
        joint = model.head(torch.cat(list(features.values()), 1))
        F.cross_entropy(joint, labels).backward()
        redreg.step(logits, labels, features, {"audio": audio, "visual": visual})
        optimizer.step()
    return whole(model.parameters())


def test_a_monitor_leaves_no_old_weights() -> None:
    expected = monitored(0, False)
    for found in ranks(2).run(monitored, True):
        # Noise is of float32, in vectors of 8, which round otherwise at another offset.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)


def headed(rank: int, sharded: bool, recorded: bool) -> list[Tensor]:
    """A head that is a unit of its own, called for logits after the backward pass."""
    model = made(rank, sharded, parts=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=False)
    ogm = mmfuse.OGM(model.encoders, noise=False)
    for step in range(STEPS):
        audio, visual, labels = data(step, rank, sharded)
        optimizer.zero_grad()
        features = model.features(audio, visual)
        F.cross_entropy(model.head(torch.cat(list(features.values()), 1)), labels).backward()
        with torch.set_grad_enabled(recorded):
            alone = {name: z.detach() for name, z in features.items()}
            logits = mmfuse.unimodal_logits(model.head, alone)
        ogm.step(logits, labels)
        optimizer.step()
    return whole(model.parameters())


@pytest.mark.parametrize("recorded", [False, True])
def test_calls_of_a_head_leave_no_old_weights(recorded: bool) -> None:
    expected = headed(0, False, recorded)
    for found in ranks(2).run(headed, True, recorded):
        torch.testing.assert_close(found, expected, **SAME)


def gathered(model: nn.Module) -> list[bool]:
    return [not isinstance(p, DTensor) for p in model.parameters()]


def through(rank: int, kind: str, way: str) -> list[list[bool]]:
    """Says of each parameter if it is gathered, before and after passes around a backward pass.

    The passes have gradients of which nobody takes any.
    """
    model = made(rank, True)
    register_fsdp_forward_method(model, "encode")
    calls: dict[str, Any] = {
        "module": lambda *x: model(*x),
        "callable": lambda *x: model(*x),
        "method": model.encode,
    }
    subject = model if way == "module" else calls[way]
    audio, visual, labels = data(0, rank, True)
    loss = F.cross_entropy(model(audio, visual), labels)
    found = [gathered(model)]
    with KINDS[kind](subject, CPU):
        calls[way](audio, visual)
    found.append(gathered(model))
    loss.backward()
    found.append(gathered(model))
    with KINDS[kind](subject, CPU):
        calls[way](audio, visual)
        found.append(gathered(model))
    found.append(gathered(model))
    return found


@pytest.mark.parametrize("way", ["module", "callable", "method"])
@pytest.mark.parametrize("kind", KINDS)
def test_units_are_left_as_they_were(kind: str, way: str) -> None:
    """One that the training's own forward pass has gathered is not gathered once more."""
    for found in ranks(2).run(through, kind, way):
        assert [set(each) for each in found] == [{True}, {True}, {False}, {True}, {False}]


def between_epochs(rank: int, sharded: bool) -> list[Tensor]:
    """An evaluation leaves the model gathered; then encoders are copied, and go back."""
    model = made(rank, sharded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=False)
    relearning = mmfuse.ReLearning(model.encoders)
    inforeg = mmfuse.InfoReg(model.encoders, threshold=-1e30)
    inforeg.set_epoch(0)
    audio, visual, labels = data(0, rank, sharded)
    with torch.no_grad():
        model(audio, visual)
    for epoch in range(1, 4):
        inforeg.set_epoch(epoch)
        optimizer.zero_grad()
        out = model(audio, visual)
        F.cross_entropy(out, labels).backward()
        inforeg.step({"audio": out.detach(), "visual": out.detach().flip(1)}, labels)
        optimizer.step()
        with torch.no_grad():
            model(audio, visual)
        relearning.reset({"audio": 0.5, "visual": 0.25})
    anchors = inforeg.anchors.state_dict(inforeg.modalities)["tensors"]
    return [*whole(model.parameters()), *whole(anchors)]


def test_an_evaluation_replaces_no_parameter() -> None:
    expected = between_epochs(0, False)
    for found in ranks(2).run(between_epochs, True):
        torch.testing.assert_close(found, expected, **SAME)


def made_late(rank: int, sharded: bool) -> list[Tensor]:
    """Methods that are made where the parameters are gathered: in a step, and after a pass."""
    model = made(rank, sharded)
    audio, visual, labels = data(0, rank, sharded)
    with torch.no_grad():
        model(audio, visual)
    ogm = mmfuse.OGM(model.encoders, noise=False)
    names = [*ogm.modalities.parameter_names]
    for _ in range(2):
        model.zero_grad()
        out = model(audio, visual)
        logits = {"audio": out.detach(), "visual": out.detach().flip(1)}
        loss = F.cross_entropy(out, labels)
        mmfuse.ogm_backward(loss, model.encoders, logits, labels, noise=False)
    found = whole(p.grad for p in ogm.modalities.parameters)
    assert len(names) == len(found) == 8
    return found


def test_a_method_may_be_made_where_parameters_are_gathered() -> None:
    expected = made_late(0, False)
    for found in ranks(2).run(made_late, True):
        torch.testing.assert_close(found, expected, **SAME)


def differentiable(rank: int, sharded: bool) -> list[Tensor]:
    """A pass that a loss goes through comes first, so that its weights are gathered once more."""
    model = made(rank, sharded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=False)
    for step in range(STEPS):
        audio, visual, labels = data(step, rank, sharded)
        inputs = {"audio": audio, "visual": visual}
        optimizer.zero_grad()
        alone = mmfuse.unimodal_outputs(model, inputs, differentiable=True)
        losses = mmfuse.unimodal_losses(alone, labels)
        (F.cross_entropy(model(audio, visual), labels) + sum(losses.values())).backward()
        optimizer.step()
    return whole(model.parameters())


def test_gradients_of_passes_are_those_of_one_process() -> None:
    expected = differentiable(0, False)
    for found in ranks(2).run(differentiable, True):
        torch.testing.assert_close(found, expected, **SAME)
