"""A step finds the gradients of one backward pass, or says that it does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from balancing import LOGITS_ONLY
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mmfuse
from mmfuse import METHODS, GradientMethod

LABELS = torch.tensor([0, 1, 2, 0])


class Model(nn.Module):
    """Two encoders and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleDict({"audio": nn.Linear(5, 3), "visual": nn.Linear(4, 3)})

    def forward(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        inputs = {
            n: torch.randn(4, d, generator=generator) for n, d in (("audio", 5), ("visual", 4))
        }
        return {n: self.encoders[n](x) for n, x in inputs.items()}


def backward(model: Model, *names: str) -> dict[str, Tensor]:
    logits = model()
    sum(z.square().sum() for n, z in logits.items() if n in (names or logits)).backward()
    return {n: z.detach() for n, z in logits.items()}


def made(name: str, model: Model, **keywords: Any) -> GradientMethod:
    method = METHODS[name](dict(model.encoders), **keywords)
    method.set_epoch(0)
    return method


def state(method: GradientMethod) -> list[Tensor]:
    return [t.clone() for t in (*method._state.values(), method.stream.state)]


NO_GRADIENT = r"no parameter of the encoder of '{}' has a gradient: the backward pass comes before"


@pytest.mark.parametrize("name", LOGITS_ONLY)
class TestNoGradient:
    """Scores look plausible, and nothing would be changed: an error, before anything is."""

    def check(self, method: GradientMethod, logits: dict[str, Tensor], who: str) -> None:
        before = state(method)
        with pytest.raises(RuntimeError, match=NO_GRADIENT.format(who)):
            method.step(logits, LABELS)
        assert all(torch.equal(a, b) for a, b in zip(state(method), before, strict=True))

    def test_before_the_backward_pass(self, name: str) -> None:
        model = Model()
        self.check(made(name, model), model(), "audio")

    def test_after_zero_grad(self, name: str) -> None:
        model = Model()
        logits = backward(model)
        model.zero_grad()
        self.check(made(name, model), logits, "audio")

    def test_of_one_encoder_that_the_loss_does_not_reach(self, name: str) -> None:
        model = Model()
        logits = backward(model, "audio")
        self.check(made(name, model), logits, "visual")

    def test_encoders_of_a_copy(self, name: str) -> None:
        model = Model()
        method = made(name, copy.deepcopy(model))
        self.check(method, backward(model), "audio")

    def test_it_is_said_in_every_step(self, name: str) -> None:
        model = Model()
        method = made(name, model)
        for _ in range(2):
            self.check(method, model(), "audio")

    def test_a_frozen_encoder_is_none(self, name: str) -> None:
        """Freezing says that it takes no part."""
        model = Model()
        model.encoders["visual"].requires_grad_(False)
        method = made(name, model)
        assert method.step(backward(model), LABELS).finite
        model.encoders["visual"].requires_grad_(True)
        model.zero_grad()
        self.check(method, backward(model, "audio"), "visual")


TWICE = r"have been changed by this method already: call step\(\) once for each backward pass"


@pytest.mark.parametrize("name", LOGITS_ONLY)
class TestTwice:
    """A second step on the same gradients would apply the factor twice."""

    def test_is_refused(self, name: str) -> None:
        model = Model()
        method = made(name, model)
        logits = backward(model)
        method.step(logits, LABELS)
        before = [p.grad.clone() for p in model.parameters()], state(method)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=TWICE):
                method.step(logits, LABELS)
        assert all(
            torch.equal(p.grad, g) for p, g in zip(model.parameters(), before[0], strict=True)
        )
        assert all(torch.equal(a, b) for a, b in zip(state(method), before[1], strict=True))

    @pytest.mark.parametrize("set_to_none", [True, False])
    @pytest.mark.parametrize("passes", [[1, 1, 1], [1, 3, 2, 1]], ids=str)
    def test_new_backward_passes_are_not(
        self, name: str, passes: list[int], set_to_none: bool
    ) -> None:
        """The allocator may give the next gradient the place of the last."""
        model = Model()
        method = made(name, model)
        for count in passes:
            for _ in range(count):
                logits = backward(model)
            method.step(logits, LABELS)
            model.zero_grad(set_to_none=set_to_none)

    def test_two_methods_on_one_gradient_are_not(self, name: str) -> None:
        model = Model()
        one, other = made(name, model), made(name, model)
        logits = backward(model)
        one.step(logits, LABELS)
        other.step(logits, LABELS)


class TestTensorsThatGetNoGradient:
    """They are refused where they are passed in, by their names."""

    def test_of_a_state_dict(self) -> None:
        model = Model()
        encoders = {n: list(net.state_dict().values()) for n, net in model.encoders.items()}
        with pytest.raises(
            TypeError, match=r"encoders\['audio'\]\[0\] is a tensor that requires no"
        ):
            mmfuse.OGM(encoders)

    def test_results_of_operations(self) -> None:
        weights = [torch.ones(3, requires_grad=True) for _ in range(2)]
        encoders = {"audio": weights[:1], "visual": [weights[1] * 2]}
        with pytest.raises(
            TypeError, match=r"encoders\['visual'\]\[0\] is the result of an operation"
        ):
            mmfuse.MLB(encoders)

    def test_a_frozen_parameter_and_a_plain_leaf_are_welcome(self) -> None:
        frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        leaf = torch.ones(3, requires_grad=True)
        assert len(mmfuse.OGM({"audio": [frozen], "visual": [leaf]}).modalities.parameters) == 2


def test_mmpareto_with_a_loss_that_does_not_reach_an_encoder() -> None:
    model = Model()
    method = mmfuse.MMPareto(dict(model.encoders))
    logits = model()
    losses = {name: z.square().sum() for name, z in logits.items()}
    model.encoders["visual"].requires_grad_(True)
    audio = {name: logits["audio"].square().sum() for name in logits}
    with pytest.raises(RuntimeError, match=NO_GRADIENT.format("visual")):
        method.backward(logits["audio"].sum(), unimodal_losses=audio)
    model.zero_grad()
    logits = model()
    losses = {name: z.square().sum() for name, z in logits.items()}
    assert method.backward(sum(z.sum() for z in logits.values()), unimodal_losses=losses).finite


def _sharded_steps(rank: int) -> list[str]:
    """A second step on the same gradients, on ones that a backward pass has added to, and again."""
    model = Model()
    for net in model.encoders.values():
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    method = made("OGM", model, stream=mmfuse.NoiseStream(1))
    found = []
    for again in (False, True, False):
        if not again:
            logits = backward(model)
        try:
            method.step(logits, LABELS)
            found.append("")
        except RuntimeError as error:
            found.append(str(error)[:40])
    return found


def test_of_sharded_parameters() -> None:
    for found in ranks(2).run(_sharded_steps):
        assert found == ["", "these gradients have been changed by thi", ""]
