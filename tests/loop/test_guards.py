"""Gradients that a step must not change again: the errors, and all loops in which there are none.

Warnings are errors here, as in all tests.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from balancing import CONSTANT, LOGITS_ONLY
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adam, AdamW, Optimizer

import mmfuse
from mmfuse import METHODS
from mmfuse.loop._guards import ends_of
from mmfuse.methods import _ogm_backward

LABELS = torch.tensor([0, 1, 2, 0])


@pytest.fixture(autouse=True)
def _anew() -> None:
    _ogm_backward._latest = None


class Model(nn.Module):
    """Two encoders of two layers each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)) for n in ("audio", "visual")}
        )

    def forward(self, *names: str) -> dict[str, Tensor]:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
        return {n: net(x) for n, net in self.encoders.items() if n in (names or self.encoders)}


def loss_of(logits: dict[str, Tensor]) -> Tensor:
    return torch.stack([z.square().sum() for z in logits.values()]).sum()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def made(name: str, model: Model, **keywords: Any) -> Any:
    method = METHODS[name](dict(model.encoders), **keywords)
    method.set_epoch(0)
    return method


class Loop:
    """A training loop, one step of which a test can put together from its parts."""

    def __init__(self, way: str, model: Model, forward: Callable[[], Any] | None = None) -> None:
        self.model, self.way, self.forward = model, way, forward or model
        self.method = made("MMPareto" if way == "two gradients" else "OGM", model)

    def balance(self, scale: float = 1.0) -> None:
        """The backward pass, and everything until the optimizer's step."""
        logits = self.forward()
        loss = scale * loss_of(logits)
        if self.way == "ogm_backward":
            mmfuse.ogm_backward(loss, dict(self.model.encoders), logits, LABELS)
        elif self.way == "two gradients":
            own = {name: scale * z.square().sum() for name, z in logits.items()}
            self.method.backward(loss, unimodal_losses=own)
        elif self.way == "backward":
            self.method.backward(loss, logits, LABELS)
        else:
            loss.backward()
            self.method.step(logits, LABELS)


WAYS = ["backward", "step", "ogm_backward", "two gradients"]
every_way = pytest.mark.parametrize("way", WAYS)
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.01, foreach=False),
    "nesterov": lambda p: SGD(p, 0.01, momentum=0.9, nesterov=True, foreach=True),
    "fused": lambda p: SGD(p, 0.01, fused=True),
    "adam": lambda p: Adam(p, 0.01, foreach=False),
    "adamw": lambda p: AdamW(p, 0.01, foreach=True),
}


def by_hand(how: Callable[[Tensor], object]) -> Callable[[Model], None]:
    def zero(model: Model) -> None:
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    how(p.grad)

    return zero


ZEROES: dict[str, Callable[[Model], object]] = {
    "to none": lambda model: model.zero_grad(),
    "in place": lambda model: model.zero_grad(set_to_none=False),
    "zero_": by_hand(lambda grad: grad.zero_()),
    "mul_": by_hand(lambda grad: grad.mul_(0)),
    "fill": by_hand(lambda grad: grad.__setitem__(slice(None), 0.0)),
}


@every_way
class TestLoopsThatAreRight:
    """They raise and warn of nothing."""

    @pytest.mark.parametrize("zero", ZEROES)
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_zeroed_before_each_step(self, way: str, optimizer: str, zero: str) -> None:
        loop = Loop(way, Model())
        step = OPTIMIZERS[optimizer](loop.model.parameters())
        for _ in range(4):
            ZEROES[zero](loop.model)
            loop.balance()
            step.step()

    @pytest.mark.parametrize("set_to_none", [True, False])
    @pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
    def test_clipped(self, way: str, clip: Callable[..., object], set_to_none: bool) -> None:
        loop = Loop(way, Model())
        step = SGD(loop.model.parameters(), 0.01)
        for _ in range(4):
            loop.balance()
            clip(loop.model.parameters(), 1e-3)
            step.step()
            step.zero_grad(set_to_none=set_to_none)

    @pytest.mark.parametrize("set_to_none", [True, False])
    @pytest.mark.parametrize("fused", [True, False])
    def test_with_a_scaler_that_skips_a_step(
        self, way: str, fused: bool, set_to_none: bool
    ) -> None:
        loop = Loop(way, Model())
        step = SGD(loop.model.parameters(), 0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        for factor in (1.0, float("inf"), 1.0, 1.0):
            step.zero_grad(set_to_none=set_to_none)
            loop.balance(factor * scaler.get_scale())
            if not fused:
                scaler.unscale_(step)
            scaler.step(step)
            scaler.update()

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_in_a_closure(self, way: str, set_to_none: bool) -> None:
        loop = Loop(way, Model())
        step = torch.optim.LBFGS(loop.model.parameters(), 1e-3, max_iter=3)

        def closure() -> Tensor:
            step.zero_grad(set_to_none=set_to_none)
            loop.balance()
            return loss_of(loop.model()).detach()

        for _ in range(2):
            step.step(closure)

    def test_with_an_own_way_to_zero_that_pytorch_does_not_count(self, way: str) -> None:
        """The gradients say so themselves where there is a look before; else it warns, once."""
        loop = Loop(way, Model())
        for step in range(4):
            for p in loop.model.parameters():
                if p.grad is not None:
                    p.grad.data.zero_()
            if way == "step" and step == 1:
                with pytest.warns(RuntimeWarning, match="a backward pass seems to have added"):
                    loop.balance()
            else:
                loop.balance()

    def test_of_other_losses_before_it(self, way: str) -> None:
        loop = Loop(way, Model())
        for _ in range(3):
            loop.model.zero_grad(set_to_none=False)
            x = torch.randn(4, 5, requires_grad=True)
            out = loop.model.encoders["audio"](x).square().sum()
            (slope,) = torch.autograd.grad(out, x, create_graph=True)
            (out + slope.square().sum()).backward()
            loss_of(loop.model()).backward()
            loop.balance()

    @pytest.mark.parametrize("set_to_none", [True, False])
    @pytest.mark.parametrize("layer", [0, 1, 2])
    def test_of_an_optimizer_that_has_a_part_of_the_parameters(
        self, way: str, layer: int, set_to_none: bool
    ) -> None:
        """Gradients of the other layers grow, and nobody uses them.

        A step knows those of the first and of the last layer: if both grow, it warns, once.
        """
        model = Model()
        for net in model.encoders.values():
            net.append(nn.Linear(3, 3))
        loop = Loop(way, model)
        part = [p for net in model.encoders.values() for p in net[layer].parameters()]
        step = SGD(part, 0.01)
        for turn in range(4):
            step.zero_grad(set_to_none=set_to_none)
            if (way, layer, turn) == ("step", 1, 1):
                with pytest.warns(RuntimeWarning, match="a backward pass seems to have added"):
                    loop.balance()
            else:
                loop.balance()
            step.step()

    def test_a_modality_that_is_frozen_later(self, way: str) -> None:
        if way == "two gradients":
            pytest.skip("its unimodal loss would have no gradient")
        loop = Loop(way, Model())
        loop.balance()
        loop.model.encoders["visual"].requires_grad_(False)  # its gradients stay
        step = SGD(loop.model.encoders["audio"].parameters(), 0.01)
        for _ in range(3):
            step.zero_grad()
            loop.balance()
            step.step()


def test_two_methods_with_a_backward_pass_each() -> None:
    """In turn, on the same encoders; or the second one on what the first has left."""
    model = Model()
    one, other = (made(name, model) for name in CONSTANT[:1] * 2)
    for set_to_none in (True, False):
        for method in (one, other, one, other):
            model.zero_grad(set_to_none=set_to_none)
            logits = model()
            method.backward(loss_of(logits), logits, LABELS)
        for _ in range(2):
            model.zero_grad(set_to_none=set_to_none)
            logits = model()
            one.backward(loss_of(logits), logits, LABELS)
            other.step(logits, LABELS)


def test_one_backward_pass_after_others_that_were_observed() -> None:
    """Accumulation may end with `backward`, in place of the last backward pass and `step`."""
    model = Model()
    ogm = made("OGM", model)
    for set_to_none in (True, False):
        for _ in range(2):
            model.zero_grad(set_to_none=set_to_none)
            for _ in range(2):
                logits = model()
                loss_of(logits).backward()
                ogm.observe(logits, LABELS)
            logits = model()
            ogm.backward(loss_of(logits), logits, LABELS)


LEFT = r"the gradients are those that .*'?s? last step has left: a backward pass would add to them"
WAY_OUT = {
    "backward": r"OGM's observe\(...\) in each micro-batch, step\(\) after the last",
    "ogm_backward": r"OGM's observe\(...\) in each micro-batch, step\(\) after the last",
    "two gradients": "MMPareto takes one micro-batch in a step",
}


@pytest.mark.parametrize("way", WAY_OUT)
def test_a_backward_pass_in_each_micro_batch_is_refused(way: str) -> None:
    """The second one would have the first one's gradient changed again; nothing happens."""
    loop = Loop(way, Model())
    for _ in range(2):  # and in each further optimizer step
        loop.model.zero_grad()
        loop.balance()
        before = gradients(loop.model)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"{LEFT}.*{WAY_OUT[way]}"):
                loop.balance()
        assert all(torch.equal(*pair) for pair in zip(gradients(loop.model), before, strict=True))


@pytest.mark.parametrize("way", WAY_OUT)
def test_gradients_that_nobody_zeroes_are_refused(way: str) -> None:
    loop = Loop(way, Model())
    step = SGD(loop.model.parameters(), 0.01)
    loop.balance()
    step.step()
    with pytest.raises(RuntimeError, match=r"Call zero_grad\(\) after the optimizer's step"):
        loop.balance()


def test_with_updates_too() -> None:
    """There the scores of the last micro-batch alone would decide."""
    model = Model()
    ogm = made("OGM", model, apply_to="update")
    step = SGD(model.parameters(), 0.01)
    ogm.attach(step)
    for _ in range(3):
        step.zero_grad()
        logits = model()
        ogm.backward(loss_of(logits), logits, LABELS)
        step.step()
    logits = model()
    with pytest.raises(RuntimeError, match=LEFT):
        ogm.backward(loss_of(logits), logits, LABELS)


def test_ogm_backward_on_several_models() -> None:
    """One model's gradients say nothing of another's, of whatever size."""
    models = Model(), Model()
    models[1].encoders["visual"].append(nn.Linear(3, 3))
    loops = [Loop("ogm_backward", model) for model in models]
    for _ in range(2):
        for loop in loops:
            loop.model.zero_grad()
            loop.balance()


@pytest.mark.parametrize("name", LOGITS_ONLY)
def test_a_step_in_each_micro_batch_warns_once(name: str) -> None:
    """No error: a new gradient that is copied into the old one looks the same."""
    model = Model()
    method = made(name, model)
    for turn in range(4):
        logits = model()
        loss_of(logits).backward()
        if turn == 1:
            with pytest.warns(RuntimeWarning, match=r"observe\(...\) in each micro-batch"):
                method.step(logits, LABELS)
        else:
            method.step(logits, LABELS)


STALE = r"the gradient of the encoder of '{}' is the one that the last step has changed: .*{}"


@pytest.mark.parametrize("name", LOGITS_ONLY)
class TestAnEncodersOldGradient:
    """It would be changed in every step, and its encoder would learn nothing, or the wrong."""

    def check(self, method: Any, logits: dict[str, Tensor], who: str, way: str) -> None:
        before = [p.grad.clone() for p in method.modalities.parameters]
        state = [t.clone() for t in (*method._state.values(), method.stream.state)]
        for _ in range(2):
            with pytest.raises(RuntimeError, match=STALE.format(who, way)):
                method.step(logits, LABELS)
        after = [p.grad for p in method.modalities.parameters]
        assert all(torch.equal(*pair) for pair in zip(after, before, strict=True))
        now = (*method._state.values(), method.stream.state)
        for a, b in zip(now, state, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("who", ["audio", "visual"])
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_of_an_encoder_that_was_replaced(self, name: str, set_to_none: bool, who: str) -> None:
        """The method holds the old one, which no loss reaches and nobody zeroes."""
        model = Model()
        method = made(name, model)
        for turn in range(2):
            model.zero_grad(set_to_none=set_to_none)
            logits = model()
            loss_of(logits).backward()
            if turn == 0:
                method.step(logits, LABELS)
                model.encoders[who] = copy.deepcopy(model.encoders[who])
        self.check(method, logits, who, "If the encoder has been replaced.* make a new method")

    def test_of_an_encoder_that_the_loss_does_not_reach(self, name: str) -> None:
        model = Model()
        method = made(name, model)
        loss_of(logits := model()).backward()
        method.step(logits, LABELS)
        model.encoders["audio"].zero_grad()
        loss_of(model("audio")).backward()
        self.check(method, logits, "visual", r"call zero_grad\(\) before the backward pass")
        # The ways out that the error names.
        model.encoders["visual"].requires_grad_(False)
        method.step(logits, LABELS)

    def test_of_a_modality_that_no_sample_has(self, name: str) -> None:
        """Its gradient may be an old one: it is left as it is."""
        model = Model()
        method = made(name, model)
        loss_of(logits := model()).backward()
        method.step(logits, LABELS)
        old = gradients(model.encoders["visual"])
        for _ in range(2):
            model.encoders["audio"].zero_grad()
            loss_of(model("audio")).backward()
            here = {n: torch.full((4,), n == "audio") for n in logits}
            method.step(logits, LABELS, present=here)
        now = gradients(model.encoders["visual"])
        assert all(torch.equal(*pair) for pair in zip(now, old, strict=True))

    def test_of_zero_is_no_matter(self, name: str) -> None:
        """PyTorch does not count this way to zero it."""
        model = Model()
        method = made(name, model)
        loss_of(logits := model()).backward()
        for _ in range(3):
            method.step(logits, LABELS)
            model.encoders["audio"].zero_grad()
            for p in model.encoders["visual"].parameters():
                p.grad.data.zero_()
            loss_of(model("audio")).backward()

    def test_of_layers_that_are_left_behind(self, name: str) -> None:
        """The rest of their encoder goes on being trained."""
        model = Model()
        method = made(name, model)
        for turn in range(3):
            for net in model.encoders.values():
                net[1].zero_grad()
            x = torch.ones(4, 5)
            with torch.set_grad_enabled(turn == 0):
                hidden = {n: net[0](x) for n, net in model.encoders.items()}
            loss_of(
                logits := {n: net[1](hidden[n]) for n, net in model.encoders.items()}
            ).backward()
            method.step(logits, LABELS)


def _sharded(rank: int) -> list[str]:
    """Every way to use and misuse `backward` under FSDP2; the errors, where there are some."""
    found = []
    for zero in (None, True, False):
        model = Model()
        for net in model.encoders.values():
            fully_shard(net)
        method = made("OGM", model, stream=mmfuse.NoiseStream(1))
        for _ in range(3):
            if zero is not None:
                model.zero_grad(set_to_none=zero)
            logits = model()
            try:
                method.backward(loss_of(logits), logits, LABELS)
            except RuntimeError as error:
                found.append(str(error)[:30])
                break
    return found


def test_of_sharded_parameters() -> None:
    assert ranks(2).run(_sharded) == [["the gradients are those that O"]] * 2


def _replicated(rank: int, views: bool) -> list[str]:
    """The same under DDP, whose gradients may be views of one buffer, or of one each."""
    found = []
    for cap in (25.0, 1e-5):
        for zero in (True, False, None):
            for way in ("backward", "step"):
                model = Model()
                replica: Any = DistributedDataParallel(
                    model, gradient_as_bucket_view=views, bucket_cap_mb=cap
                )
                loop = Loop(way, model, replica)
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    for _ in range(4):
                        if zero is not None:
                            model.zero_grad(set_to_none=zero)
                        try:
                            loop.balance()
                        except RuntimeError as error:
                            found.append(f"{zero} {way}: {str(error)[:13]}")
                            break
                found += [f"{zero} {way}: {w.message}" for w in seen if "added" in str(w.message)]
    return found


@pytest.mark.parametrize("views", [False, True])
def test_of_replicas(views: bool) -> None:
    assert ranks(2).run(_replicated, views) == [["None backward: the gradients"] * 2] * 2


def test_the_compiler_is_spared() -> None:
    """Eager steps before and after do not matter to a compiled one."""
    model = Model()
    method = made("OGM", model, noise=False)
    compiled = torch.compile(method.step, fullgraph=True, backend="eager")
    for step in (method.step, compiled, compiled, method.step):
        model.zero_grad()
        loss_of(logits := model()).backward()
        step({n: z.detach() for n, z in logits.items()}, LABELS)


def test_ends() -> None:
    assert ends_of((0, 0, 0, 1, 2, 2), 3) == ((0, 0, 2), (1, 3, 3), (2, 4, 5))
    assert ends_of((0, 2), 3) == ((0, 0, 0), (2, 1, 1))
    assert ends_of((), 2) == ()


def test_nothing_is_kept_alive() -> None:
    model = Model()
    method = made("OGM", model)
    loss_of(logits := model()).backward()
    method.step(logits, LABELS)
    model.zero_grad()
    assert all(
        first() is None and last() is None
        for _, _, first, _, _, last, _ in method.modalities.guard.marks
    )
