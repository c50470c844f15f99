"""Parts of training steps: compilation, checkpointing, shared and frozen parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from balancing import (
    DRAWING,
    IN_FORWARD,
    KINDS,
    LEARNING,
    MONITORING,
    NOISY,
    ON_FEATURES,
    ON_GRADIENTS,
    ON_UPDATES,
    STEPPING,
    TWO_GRADIENTS,
    Shown,
    arguments,
    balance,
    joint_loss,
    make,
    prepare,
    see,
    show,
    start,
    strength,
    unimodal_losses,
)
from networks import AudioVisual, batch
from states import differences
from tolerances import (
    UNIT_ROUNDOFF,
    assert_within,
    growth,
    sum_of_products,
)
from tolerances import noise as noise_tolerance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mmfuse
from mmfuse import OGM, InfoReg, NoiseStream, ogm_backward
from mmfuse.ops._registry import OPS

pytestmark = [
    # torch.compile looks for a gradient in tensors that are handed from one graph to the next.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]

U = UNIT_ROUNDOFF[torch.float32]

Data = tuple[Tensor, Tensor, Tensor]


class Parts:
    """A model with every method on it, all from the same seeds, and one forward pass."""

    def __init__(
        self, model: AudioVisual, wrap: Callable[[nn.Module], nn.Module] = lambda net: net
    ) -> None:
        self.model = model = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.encoders = {name: wrap(net) for name, net in model.encoders.items()}
        self.methods = {kind: make(kind, self.encoders, stream=NoiseStream(3)) for kind in KINDS}
        for method in self.methods.values():
            start(method)
            fc = model.fc
            widths = dict.fromkeys(self.encoders, fc.in_features // len(self.encoders))
            prepare(method, widths, fc.out_features, fc.weight.detach())

    @property
    def ogm(self) -> OGM:
        """OGM-GE."""
        return self.methods["OGM-GE"]

    @property
    def inforeg(self) -> InfoReg:
        return self.methods["InfoReg"]

    def see(self, data: Data) -> dict[str, Any]:
        """The forward pass up to where methods act in it."""
        inputs = {"audio": data[0], "visual": data[1]}
        features = {name: net(inputs[name]) for name, net in self.encoders.items()}
        return see(self.model.fc, features, inputs, data[2])

    def show(self, kind: str, data: Data) -> Shown:
        return show(self.methods[kind], self.model.fc, self.see(data))

    def forward(self, data: Data) -> tuple[Tensor, dict[str, Tensor]]:
        """The joint loss, and each modality's logits."""
        seen = self.see(data)
        return self.loss_of(seen["features"], data), seen["logits"]

    def loss_of(self, features: dict[str, Tensor], data: Data) -> Tensor:
        return F.cross_entropy(self.model.fc(torch.cat(list(features.values()), 1)), data[2])

    def step(self, kind: str, data: Data) -> Any:
        """Forward and backward pass with one method; what it has returned."""
        return balance(self.methods[kind], self.show(kind, data))

    def state(self) -> dict[str, Any]:
        """Everything that a step may change, copied."""
        parts = {
            "model": dict(self.model.state_dict()),
            "momentum": [s["momentum_buffer"] for s in self.optimizer.state.values()],
            **{kind: dict(method.state_dict()) for kind, method in self.methods.items()},
        }
        return copy.deepcopy(parts)

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.model.parameters()]


# Backward passes of `step_everything`.
PASSES = 2 * len(TWO_GRADIENTS) or 1


def step_everything(parts: Parts, data: Data) -> Tensor:
    """All methods in one step."""
    parts.optimizer.zero_grad()
    seen = parts.see(data)
    passed, more = seen["features"], []
    for kind in IN_FORWARD:
        method = parts.methods[kind]
        if kind in ON_FEATURES:
            passed = method(**arguments(method, {**seen, "features": passed})).features
        else:
            out = method(**arguments(method, seen))
            more.append(joint_loss(method, parts.model.fc, seen, out))
    loss = parts.loss_of(passed, data) + sum(more)
    for kind in TWO_GRADIENTS:
        parts.methods[kind].backward(loss, unimodal_losses=unimodal_losses(seen), retain_graph=True)
    if not TWO_GRADIENTS:
        loss.backward()
    for kind in STEPPING:
        method = parts.methods[kind]
        method.step(**arguments(method, seen))
    parts.optimizer.step()
    return loss.detach()


def detached(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: detached(value) for name, value in values.items()}
    return values.detach()


class TestCompile:
    """backend="aot_eager" traces as inductor does, but runs PyTorch's kernels: bit for bit."""

    @pytest.fixture(autouse=True)
    def _cold(self, monkeypatch: pytest.MonkeyPatch) -> object:
        """Acts as a process that has called no op before: the first call chooses the backend."""
        torch._dynamo.reset()
        for op in OPS.values():
            monkeypatch.setattr(op, "_chosen", {})
        yield
        torch._dynamo.reset()

    @pytest.mark.slow_except_for("OGM", "OPM")
    @pytest.mark.parametrize("kind", [*IN_FORWARD, *STEPPING])
    def test_no_graph_break_in_a_method(self, kind: str) -> None:
        """fullgraph=True raises at the first graph break, and error_on_recompile at recompiling."""
        model = AudioVisual()
        eager, compiled = Parts(model), Parts(model)

        def call(parts: Parts) -> Callable[..., Any]:
            method = parts.methods[kind]
            return method if kind in IN_FORWARD else method.step

        fast = torch.compile(call(compiled), fullgraph=True, backend="aot_eager")
        acted = 0.0
        for i in range(3):
            data = batch()
            # A monitor goes by the number of the step, once in a number of them.
            # The second step of a module that has learnt the names is compiled once more.
            once = i > (kind in LEARNING) and kind not in MONITORING
            with torch._dynamo.config.patch(error_on_recompile=once):
                for parts, act in ((eager, call(eager)), (compiled, fast)):
                    parts.optimizer.zero_grad()
                    seen = parts.see(data)
                    if kind in STEPPING:
                        parts.loss_of(seen["features"], data).backward()
                    seen = detached(seen)
                    passing = [*seen["features"].values(), *seen["logits"].values()]
                    for each in passing:
                        each.requires_grad_()
                    out = act(**arguments(parts.methods[kind], seen))
                    if kind in IN_FORWARD:
                        joint_loss(parts.methods[kind], parts.model.fc, seen, out).backward()
                    parts.passed = [each.grad for each in passing]
                    parts.optimizer.step()
            acted += strength(parts.methods[kind], seen, out)
            assert differences(compiled.state(), eager.state()) == []
            assert differences(compiled.passed, eager.passed) == []
            for p, q in zip(compiled.model.parameters(), eager.model.parameters(), strict=True):
                assert differences(p.grad, q.grad) == []
        assert acted > 0

    # The clock of a method that draws in `sense` is a number of the host: another one each step.
    @pytest.mark.parametrize(
        "kind",
        [pytest.param("ogm_backward", marks=pytest.mark.slow), *NOISY]
        + [
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in KINDS
            if kind not in (*NOISY, *MONITORING)
        ],
    )
    def test_whole_step(self, kind: str) -> None:
        """Forward pass, backward pass, method."""

        def step(parts: Parts, data: Data) -> Tensor:
            if kind == "ogm_backward":
                loss, logits = parts.forward(data)
                ogm_backward(loss, parts.encoders, logits, data[2], stream=parts.ogm.stream)
                return loss.detach()
            shown = parts.show(kind, data)
            balance(parts.methods[kind], shown)
            return shown.loss.detach()

        model = AudioVisual()
        eager, compiled = Parts(model), Parts(model)
        fast = torch.compile(lambda data: step(compiled, data), backend="aot_eager")
        for i in range(3):
            data = batch()
            for parts in (eager, compiled):
                parts.optimizer.zero_grad()
            once = i > (kind in LEARNING)  # as above
            with torch._dynamo.config.patch(error_on_recompile=once):
                assert torch.equal(fast(data), step(eager, data))
            for parts in (eager, compiled):
                parts.optimizer.step()
            assert differences(compiled.state(), eager.state()) == []
        if kind in ("ogm_backward", "OGM-GE"):
            assert compiled.ogm.stream.state.tolist() == [3, 3]

    @pytest.mark.parametrize(
        "kind",
        [
            pytest.param(k, marks=[] if k in ("OGM", *TWO_GRADIENTS) else pytest.mark.slow)
            for k in ON_GRADIENTS
            if k not in MONITORING
        ],
    )
    def test_the_graph_breaks_of_backward(self, kind: str) -> None:
        """`Tensor.backward` is PyTorch's; a `try` around it cannot be gone on with."""
        parts, data = Parts(AudioVisual()), batch()
        method = parts.methods[kind]

        def step() -> None:
            shown = parts.show(kind, data)
            seen = arguments(method, shown.seen)
            method.backward(shown.loss, **seen, unimodal_losses=shown.unimodal_losses)

        found = torch._dynamo.explain(step)()
        assert len(found.break_reasons) >= 1
        for reason in found.break_reasons:
            line = reason.user_stack[-1].line
            assert ".backward(" in line or line == "try:"

    def test_compiled_encoders(self) -> None:
        """The model is compiled, the methods are not; they are given the compiled modules."""
        model = AudioVisual()
        eager = Parts(model)
        compiled = Parts(model, lambda net: torch.compile(net, backend="aot_eager"))
        with torch._functorch.config.patch(donated_buffer=False):
            for _ in range(3):
                data = batch()
                assert torch.equal(step_everything(compiled, data), step_everything(eager, data))
        assert differences(compiled.state(), eager.state()) == []

    @pytest.mark.parametrize("kind", TWO_GRADIENTS)
    def test_two_backward_passes_through_compiled_encoders(self, kind: str) -> None:
        """PyTorch gives a compiled graph's memory away in the first pass, and says what to do."""
        parts = Parts(AudioVisual(), lambda net: torch.compile(net, backend="aot_eager"))
        shown = parts.show(kind, batch())
        with pytest.raises(
            RuntimeError, match=r"set torch\._functorch\.config\.donated_buffer=False"
        ):
            balance(parts.methods[kind], shown)
        assert all(p.grad is None for p in parts.model.audio_net.parameters())

    @pytest.mark.slow
    def test_inductor(self) -> None:
        """The decisions are its own kernels'; the noise is not, and nor is the update."""
        model, data = AudioVisual(), batch()
        eager, compiled = Parts(model), Parts(model)
        fast = torch.compile(compiled.ogm.step, fullgraph=True)
        for parts, step in ((eager, eager.ogm.step), (compiled, fast)):
            loss, logits = parts.forward(data)
            loss.backward()
            before = parts.gradients()
            parts.out = step({n: z.detach() for n, z in logits.items()}, data[2])
        assert torch.equal(compiled.out.scores, eager.out.scores)
        assert torch.equal(compiled.out.ratios, eager.out.ratios)
        k, expected = compiled.out.coefficients, eager.out.coefficients
        assert float(expected.min()) < 1
        # 1 - alpha tanh(rho - 1): tanh is good to two units, the product and the difference to one.
        assert_within(k, expected, 2 * 4 * U * torch.ones_like(k), "coefficients")
        for g, w, g0 in zip(compiled.gradients(), eager.gradients(), before, strict=True):
            # std comes from the same moments by a division, a root and a sum, each rounded; the
            # noise is below 7 (see `mmfuse.ops.update_grads_`: its uniform numbers are not below
            # 2**-33), and the sum rounds.
            bound = 2 * U * (4 * g0.abs() + 4 * 7 * (g0.std() + 1e-8) + w.abs())
            assert_within(g, w, bound, "gradient")
        assert compiled.ogm.stream.state.tolist() == [3, 1]


# Reentrant checkpointing runs the first pass without gradients, as an evaluation does.
@pytest.mark.filterwarnings("ignore:.* is in training mode, but no gradients:RuntimeWarning")
@pytest.mark.parametrize("reentrant", [False, True])
class TestCheckpointing:
    """The forward pass is repeated in the backward pass."""

    def test_checkpointed_encoders(self, reentrant: bool) -> None:
        model = AudioVisual()
        for net in (model.audio_net, model.visual_net):
            # Batch norm counts a repeated pass twice; without momentum its statistics stay, and
            # the monitor, which is in evaluation mode, sees the same encoder.
            net.bn1.momentum = 0.0
        calls = 0

        def counted(net: nn.Module, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return net(x)

        plain, again = Parts(model), Parts(model)
        nets = again.encoders
        again.encoders = {
            name: partial(checkpoint, counted, net, use_reentrant=reentrant)
            for name, net in nets.items()
        }
        for _ in range(3):
            audio, visual, labels = batch()
            data = (audio.requires_grad_(), visual.requires_grad_(), labels)
            assert torch.equal(step_everything(plain, data), step_everything(again, data))
        # Forward and, each once more, in every backward pass.
        assert calls == 2 * 3 * (1 + PASSES)
        state, expected = again.state(), plain.state()
        for each in (state, expected):
            for key in [key for key in each["model"] if key.endswith("num_batches_tracked")]:
                del each["model"][key]
        assert differences(state, expected) == []

    def test_opm_inside_is_refused(self, reentrant: bool) -> None:
        parts, (audio, visual, labels) = Parts(AudioVisual()), batch()

        def region(x: Tensor, y: Tensor) -> Tensor:
            return parts.show("OPM", (x, y, labels)).loss

        x, y = audio.requires_grad_(), visual.requires_grad_()
        loss = checkpoint(region, x, y, use_reentrant=reentrant)
        state = copy.deepcopy(parts.methods["OPM"].state_dict())
        with pytest.raises(RuntimeError, match="leave OPM outside of the checkpointed part"):
            loss.backward()
        assert differences(dict(parts.methods["OPM"].state_dict()), dict(state)) == []
        assert all(p.grad is None for p in parts.model.audio_net.parameters())

    def test_arm_inside_counts_once(self, reentrant: bool) -> None:
        model = AudioVisual()
        plain, again = Parts(model), Parts(model)

        def region(parts: Parts, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
            return parts.show("ARM", (x, y, labels)).loss

        for _ in range(2):
            audio, visual, labels = batch()
            x, y = audio.requires_grad_(), visual.requires_grad_()
            region(plain, x, y, labels).backward()
            checkpoint(region, again, x, y, labels, use_reentrant=reentrant).backward()
        assert float(again.methods["ARM"].average_weight) == pytest.approx(1 - 0.9**2)
        assert differences(again.state()["ARM"], plain.state()["ARM"]) == []
        assert differences(again.gradients(), plain.gradients()) == []


class TestSharedParameters:
    def test_one_encoder_for_several_inputs(self) -> None:
        """Its gradient is the sum over the calls, which is modulated once."""
        parts, data = Parts(AudioVisual()), batch()
        model = parts.model
        a1, a2 = model.audio_net(data[0]), model.audio_net(data[0].flip(3))
        a, v = (a1 + a2) / 2, model.visual_net(data[1])
        logits = mmfuse.unimodal_logits(model.fc, {"audio": a, "visual": v})
        loss = F.cross_entropy(model.fc(torch.cat([a, v], 1)), data[2])
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        out = parts.methods["OGM"].backward(loss, logits, data[2])
        assert float(out.coefficients.min()) < 1
        for (name, p), g in zip(model.named_parameters(), grads, strict=True):
            modality = (
                ["audio_net", "visual_net"].index(n) if (n := name.split(".")[0]) != "fc" else 2
            )
            k = [*out.coefficients, torch.tensor(1.0)][modality]
            assert torch.equal(p.grad, k * g), name

    @pytest.mark.parametrize("kind", ON_GRADIENTS)
    def test_tied_weights_in_an_encoder(self, kind: str) -> None:
        """A weight that two layers share is one parameter: one stream id, modulated once."""
        tied = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        tied[2].weight = tied[0].weight
        nets = {"tied": tied, "other": nn.Linear(6, 6)}
        parameters = [tied[0].weight, tied[0].bias, tied[2].bias, *nets["other"].parameters()]
        # A module names it once, a list may hold it twice.
        listed = {"tied": [*parameters[:2], tied[2].weight, parameters[2]], "other": parameters[3:]}
        inputs = dict.fromkeys(nets, torch.randn(8, 6))
        labels, head = torch.randint(0, 6, (8,)), nn.Linear(12, 6)
        results = []
        for encoders in (nets, listed):
            # A list does not say how an input passes through it.
            more = {"forward": nets} if kind in MONITORING else {}
            method = make(kind, encoders, stream=NoiseStream(1), **more)
            assert len(method.modalities.parameters) == 5
            start(method)
            for p in parameters:
                p.grad = None
            features = {n: net(inputs[n]) for n, net in nets.items()}
            logits = {n: z * (1 + 3 * (n == "tied")) for n, z in features.items()}
            balance(method, show(method, head, see(head, features, inputs, labels, logits)))
            results.append([p.grad.clone() for p in parameters])
        assert differences(*results) == []


class TestFreezing:
    def test_frozen_and_unfrozen(self) -> None:
        """The others' noise stays as it was, and the parameter finds its own again."""
        model = AudioVisual()
        parts, always = Parts(model), Parts(model)
        frozen = [parts.model.audio_net.conv2.weight, *parts.model.audio_net.proj.parameters()]
        known = {id(p): i for i, p in enumerate(parts.ogm.modalities.parameters)}
        for on in (True, False, False, True):
            for p in frozen:
                p.requires_grad_(on)
            data = batch()
            before = []
            for each in (parts, always):
                each.model.zero_grad()
                loss, logits = each.forward(data)
                loss.backward()
                before.append(
                    [None if p.grad is None else p.grad.clone() for p in each.model.parameters()]
                )
                # Freezing reorders the backward pass of the rest not at all: nothing below it.
                each.ogm.step(logits, data[2])
            for p, q, g, _ in zip(
                parts.model.parameters(), always.model.parameters(), *before, strict=True
            ):
                if any(p is f for f in frozen) and not on:
                    assert p.grad is None
                    continue
                assert torch.equal(p.grad, q.grad)
                if id(p) in known:
                    assert not torch.equal(p.grad, g)
        assert parts.ogm.stream.state.tolist() == always.ogm.stream.state.tolist() == [3, 4]

    @pytest.mark.parametrize("kind", ON_GRADIENTS)
    def test_a_stale_gradient_of_a_frozen_parameter_stays(self, kind: str) -> None:
        parts, data = Parts(AudioVisual()), batch()
        parts.step(kind, data)
        weight = parts.model.visual_net.conv1.weight
        weight.requires_grad_(False)
        stale = weight.grad.clone()
        before = parts.gradients()
        parts.step(kind, data)
        assert torch.equal(weight.grad, stale)
        assert len(differences(parts.gradients(), before)) == len(before) - 1

    def test_a_whole_encoder_is_frozen_and_unfrozen(self) -> None:
        """Fisher traces are those of what has a gradient; nothing is missed or counted twice."""
        parts = Parts(AudioVisual())
        expected = torch.zeros(2, dtype=torch.float64)
        for on in (True, False, True):
            parts.model.audio_net.requires_grad_(on)
            parts.optimizer.zero_grad()
            data = batch()
            loss, logits = parts.forward(data)
            loss.backward()
            for m, net in enumerate(parts.model.encoders.values()):
                for p in net.parameters():
                    expected[m] += 0.0 if p.grad is None else p.grad.double().square().sum()
            assert bool(parts.inforeg.step(logits, data[2]).finite)
            parts.optimizer.step()
        # sq_norm = m2 + n mean^2, each from float32 sums: twice the bound of one of them, a step.
        bound = 2 * sum_of_products(torch.float32, expected)
        assert_within(parts.inforeg.fisher_trace * 3, expected, bound, "trace")


@pytest.mark.parametrize("kind", KINDS)
def test_zero_grad_leaves_none_or_zero(kind: str) -> None:
    """If every parameter gets a gradient, the choice makes no difference."""
    model = AudioVisual()
    runs = []
    for none in (True, False):
        parts = Parts(model)
        torch.manual_seed(0)
        for _ in range(3):
            parts.optimizer.zero_grad(set_to_none=none)
            parts.step(kind, batch())
            parts.optimizer.step()
        runs.append(parts.state())
    assert differences(*runs) == []


def test_a_zero_gradient_gets_the_noise_beside_std() -> None:
    """A layer without part in this step has zeros after zero_grad(set_to_none=False): std 0."""
    parts, data = Parts(AudioVisual()), batch()
    spare = parts.model.audio_net.spare = nn.Linear(6, 4)
    ogm = OGM(parts.model.encoders, stream=NoiseStream(3))
    others = [make(k, parts.model.encoders) for k in STEPPING if k not in NOISY]
    for method in others:
        start(method)
    index = [p is spare.weight for p in ogm.modalities.parameters].index(True)
    for none in (True, False):
        spare.weight.grad = None if none else torch.zeros(4, 6)
        parts.optimizer.zero_grad()
        seen = parts.see(data)
        parts.loss_of(seen["features"], data).backward()
        step = int(ogm.stream.state[1])
        for method in others:
            method.step(**arguments(method, seen))
        if none:
            assert spare.weight.grad is None
            ogm.step(seen["logits"], data[2])
            assert spare.weight.grad is None
            continue
        assert bool((spare.weight.grad == 0).all())
        ogm.step(seen["logits"], data[2])
        stream = NoiseStream(3)
        stream.advance(step)
        z = stream.normal(24, index).view(4, 6)
        # 0 + 1e-8 z: the product rounds once, 1e-8 once.
        assert_within(
            spare.weight.grad, 1e-8 * z, 1e-8 * (noise_tolerance(z) + 2 * U * z.abs()), "noise"
        )


class TestChannelsLast:
    def twins(self) -> tuple[Parts, Parts, dict[str, Tensor], Data]:
        """The same gradients, once in channels_last and once contiguous."""
        model = AudioVisual(width=16)
        last, plain = Parts(model), Parts(model)
        last.model.to(memory_format=torch.channels_last)
        data = batch()
        data = (data[0], data[1].to(memory_format=torch.channels_last), data[2])
        loss, logits = last.forward(data)
        loss.backward()
        weight = last.model.visual_net.conv2.weight
        assert not weight.is_contiguous() and not weight.grad.is_contiguous()
        assert weight.grad.stride() == weight.stride()
        for p, q in zip(last.model.parameters(), plain.model.parameters(), strict=True):
            q.grad = p.grad.clone(memory_format=torch.contiguous_format)
            assert q.is_contiguous() and q.grad.is_contiguous()
            # A displacement from the epoch's start.
            with torch.no_grad():
                moved = torch.randn(q.shape) * 0.01
                p.add_(moved)
                q.add_(moved)
        return last, plain, {n: z.detach() for n, z in logits.items()}, data

    def test_without_noise_and_with_a_pull(self) -> None:
        last, plain, logits, data = self.twins()
        for parts in (last, plain):
            assert float(parts.methods["OGM"].step(logits, data[2]).coefficients.min()) < 1
            assert float(parts.inforeg.step(logits, data[2]).coefficients.max()) > 0
        assert differences(last.gradients(), plain.gradients()) == []
        assert last.model.visual_net.conv2.weight.grad.stride()[1] == 1  # updated in place
        squares = [p.inforeg._state["squares"] for p in (last, plain)]
        # Sums over the same numbers in another order, on either side.
        assert_within(squares[0], squares[1], 2 * 2 * sum_of_products(torch.float32, squares[1]))

    def test_noise_goes_by_the_logical_element(self) -> None:
        last, plain, logits, data = self.twins()
        known = {id(p): i for i, p in enumerate(plain.ogm.modalities.parameters)}
        before = plain.gradients()
        for parts in (last, plain):
            parts.ogm.step(logits, data[2])
        triples = zip(last.model.parameters(), plain.model.parameters(), before, strict=True)
        for p, q, g in triples:
            if id(q) not in known:
                assert torch.equal(p.grad, q.grad)
                continue
            std = g.std() + 1e-8
            z = NoiseStream(3).normal(q.numel(), known[id(q)]).view_as(q)
            # std is a root of a sum in another order, which halves its relative error; then the
            # quotient, the root, the sum with 1e-8, the product with z and the last sum round.
            relative = 0.5 * (growth(q.numel()) + 4) * U + 5 * U
            size = std * (z.abs() + noise_tolerance(z)) * relative
            assert_within(p.grad, q.grad, 2 * (size + U * q.grad.abs()), "gradient")
            # Noise in storage order would be wrong by about std.
            assert float(size.max()) < 1e-3 * float(std)


class TestModuleSurgery:
    """Parameters that replace others, as `fully_shard` does, would go unnoticed for ever."""

    def replaced(self) -> tuple[Parts, Data]:
        parts = Parts(AudioVisual())
        for module in parts.model.audio_net.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(p.detach().clone()))
        return parts, batch()

    @pytest.mark.parametrize("kind", STEPPING)
    def test_is_an_error(self, kind: str) -> None:
        parts, data = self.replaced()
        method, shown = parts.methods[kind], parts.show(kind, data)
        shown.loss.backward()
        gradients, state = parts.gradients(), parts.state()
        match = r"encoders\['audio'\].conv1.weight is new since this object was made \(7 such"
        with pytest.raises(ValueError, match=match):
            method.step(**arguments(method, shown.seen))
        assert differences(parts.gradients(), gradients) == []
        assert differences(parts.state(), state) == []

    def test_of_one_layer_is_an_error(self) -> None:
        parts, data = Parts(AudioVisual()), batch()
        loss, logits = parts.forward(data)
        loss.backward()
        parts.ogm.step(logits, data[2])
        parts.model.zero_grad()
        weight = parts.model.visual_net.proj.weight
        parts.model.visual_net.proj.weight = nn.Parameter(weight.detach().clone())
        loss, logits = parts.forward(data)
        loss.backward()
        with pytest.raises(ValueError, match=r"encoders\['visual'\].proj.weight is new since this"):
            parts.ogm.step(logits, data[2])

    @pytest.mark.parametrize("kind", ON_GRADIENTS)
    def test_is_an_error_of_backward(self, kind: str) -> None:
        parts, data = self.replaced()
        method, shown, state = parts.methods[kind], parts.show(kind, data), parts.state()
        seen = arguments(method, shown.seen)
        with pytest.raises(ValueError, match="is new since this object was made"):
            method.backward(shown.loss, **seen, unimodal_losses=shown.unimodal_losses)
        assert differences(parts.state(), state) == []

    def test_a_new_object_sees_the_new_parameters(self) -> None:
        parts, data = self.replaced()
        loss, logits = parts.forward(data)
        ogm = OGM(parts.model.encoders, noise=False)
        loss.backward(retain_graph=True)
        plain = parts.gradients()
        parts.model.zero_grad()
        k = ogm.backward(loss, logits, data[2]).coefficients
        audio = list(parts.model.audio_net.parameters())
        assert float(k[0]) < 1
        assert differences([p.grad for p in audio], [k[0] * g for g in plain[: len(audio)]]) == []

    def test_an_encoder_that_takes_no_part(self) -> None:
        """A loss that does not reach an encoder is a mistake, unless the encoder is frozen."""
        parts, data = Parts(AudioVisual()), batch()
        seen = parts.see(data)
        F.cross_entropy(seen["logits"]["visual"], data[2]).backward()
        assert all(p.grad is None for p in parts.model.audio_net.parameters())
        for kind in STEPPING:
            method = parts.methods[kind]
            with pytest.raises(RuntimeError, match="no parameter of the encoder of 'audio' has a"):
                method.step(**arguments(method, seen))
        parts.model.audio_net.requires_grad_(False)
        for kind in STEPPING:
            method = parts.methods[kind]
            assert bool(method.step(**arguments(method, seen)).finite)
        assert parts.ogm.stream.state.tolist() == [3, 1]


def micro_batches() -> tuple[Data, list[Data]]:
    """A batch of 20 rows, of which 7 are ignored, and the same in four parts of unequal sizes."""
    audio, visual, labels = batch(20)
    labels[[1, 3, 4]] = -100
    labels[8:12] = -100  # a whole part
    sizes = [5, 3, 4, 8]
    parts = zip(*(t.split(sizes) for t in (audio, visual, labels)), strict=True)
    return (audio, visual, labels), list(parts)


def double(model: AudioVisual) -> AudioVisual:
    """The model in float64, and without batch norm's dependence on the other samples."""
    return model.double().eval()


class TestAccumulation:
    """`observe` in every micro-batch, `step` once: the scores of one big batch."""

    def shown(self, parts: Parts, kind: str, data: Data) -> dict[str, Any]:
        data = (data[0].double(), data[1].double(), data[2])
        seen = parts.see(data)
        # Each part's share of the whole mean, over 13 labelled rows.
        loss = F.cross_entropy(sum(seen["logits"].values()), data[2], reduction="sum")
        loss.div(13).backward()
        return arguments(parts.methods[kind], seen)

    @pytest.mark.parametrize("last", [True, False], ids=["last given to step", "all observed"])
    @pytest.mark.parametrize("kind", STEPPING)
    def test_is_one_big_batch(self, kind: str, last: bool) -> None:
        model = double(AudioVisual())
        big, small = Parts(model), Parts(model)
        whole, parts_of_it = micro_batches()
        results = []
        for parts, batches in ((big, [whole]), (small, parts_of_it)):
            method = parts.methods[kind]
            for i, data in enumerate(batches):
                shown = self.shown(parts, kind, data)
                if i == len(batches) - 1 and last:
                    break
                method.observe(**shown)
            results.append(method.step(**shown) if last else method.step())
        expected, found = results
        u = UNIT_ROUNDOFF[torch.float64]
        # The encoders' outputs are sums of at most 54 products, three layers deep, and a score
        # depends on them through logits of 6 products and a softmax: 3 * 54 + 6 + 5 roundings that
        # may differ with the batch's size, times logits and activations of at most 10.
        bound = 2 * 10 * (3 * 54 + 6 + 5) * u
        smooth = {"scores", "ratios", "information_gap"}
        # Elsewhere coefficients depend on what is known less well.
        smooth |= {"coefficients"} if kind in ON_UPDATES else set()
        compared = smooth & {field.name for field in fields(found)}
        assert len(compared) >= 1
        for name in compared:
            a, b = getattr(found, name), getattr(expected, name)
            assert_within(a, b, bound * (1 + b.abs()) ** 2, name)
        if kind in MONITORING:
            # |z1 - z2|^2 of outputs 0.01 or more apart, so that it is off relatively by 200 times
            # as much; the views are the same numbers, row by row of the whole batch.
            a, b = found.redundancy, expected.redundancy
            assert_within(a, b, 200 * bound * b, "redundancy")
            assert torch.equal(found.gate, expected.gate)
        method = small.methods[kind]
        if kind in DRAWING:
            assert method.stream.state.tolist() == [3, 1]
        assert strength(method, {}, found) > 0

    def test_the_weights_are_the_labelled_samples(self) -> None:
        """The score, from its definition, and not the mean over the micro-batches."""
        parts, (whole, pieces) = Parts(double(AudioVisual())), micro_batches()
        for data in pieces:
            parts.ogm.observe(**self.shown(parts, "OGM-GE", data))
        scores = parts.ogm.step().scores
        with torch.no_grad():
            _, logits = parts.forward((whole[0].double(), whole[1].double(), whole[2]))
        for m, z in enumerate(logits.values()):
            rows = (whole[2] != -100).nonzero().squeeze(1)
            p = z.softmax(1)[rows, whole[2][rows]]
            bound = 2 * 10 * (3 * 54 + 6 + 5) * UNIT_ROUNDOFF[torch.float64]
            assert len(rows) == 13
            assert_within(scores[m], p.mean(), torch.tensor(bound), "score")

    @pytest.mark.parametrize("kind", ["OGM", "OGM-GE"])
    def test_modulation_acts_once(self, kind: str) -> None:
        parts, (_, pieces) = Parts(AudioVisual().double()), micro_batches()
        noise, ogm = kind in NOISY, parts.methods[kind]
        for data in pieces[:-1]:
            shown = self.shown(parts, kind, data)
            before = parts.gradients()
            ogm.observe(**shown)
            assert differences(parts.gradients(), before) == []  # it only looks
            assert ogm.stream.state.tolist() == [3, 0]
        shown = self.shown(parts, kind, pieces[-1])
        before = parts.gradients()
        k = ogm.step(**shown).coefficients
        assert ogm.stream.state.tolist() == [3, int(noise)]
        for i, (p, g) in enumerate(zip(parts.model.audio_net.parameters(), before, strict=False)):
            if noise:
                assert not torch.equal(p.grad, k[0] * g)
                z = NoiseStream(3).normal(p.numel(), i).view_as(p).double()
                std = g.std() + 1e-8
                # All in float64, next to which only the noise's own tolerance counts.
                assert_within(
                    p.grad, k[0] * g + std * z, 1.01 * std * noise_tolerance(z), "gradient"
                )
            else:
                assert torch.equal(p.grad, k[0] * g)

    @pytest.mark.parametrize("kind", STEPPING)
    def test_a_step_needs_an_observation(self, kind: str) -> None:
        parts, (whole, _) = Parts(AudioVisual().double()), micro_batches()
        method = parts.methods[kind]
        for _ in range(2):
            shown = self.shown(parts, kind, whole)
            before, state = parts.gradients(), parts.state()
            with pytest.raises(RuntimeError, match="nothing was observed since the last step"):
                method.step()
            assert differences(parts.gradients(), before) == []
            assert differences(parts.state(), state) == []
            method.observe(**shown)
            method.step()
            parts.model.zero_grad()

    @pytest.mark.parametrize("kind", STEPPING)
    def test_an_error_of_observe_changes_nothing(self, kind: str) -> None:
        model = AudioVisual().double()
        tried, plain = Parts(model), Parts(model)
        _, pieces = micro_batches()
        for data in (pieces[0], pieces[3]):
            for parts in (tried, plain):
                shown = self.shown(parts, kind, data)
                method = parts.methods[kind]
                method.observe(**shown)
                if parts is plain:
                    continue
                labels = shown["labels"]
                for error, match, bad in [
                    (ValueError, "out of range", {"labels": labels.clamp(max=0) + 99}),
                    (ValueError, "name different modalities", {"logits": {"audio": 0}}),
                    (ValueError, "rows, labels 2", {"labels": labels[:2]}),
                    (TypeError, "must be an integer tensor", {"labels": labels.float()}),
                ]:
                    with pytest.raises(error, match=match):
                        method.observe(**{**shown, **bad})
                    with pytest.raises(error, match=match):
                        method.step(**{**shown, **bad})
        for parts in (tried, plain):
            parts.methods[kind].step()
        assert differences(tried.gradients(), plain.gradients()) == []
        assert differences(tried.state(), plain.state()) == []

    def test_no_row_is_labelled(self) -> None:
        """No score, so that nothing is modulated, and noise is all that OGM-GE adds."""
        parts, (audio, visual, labels) = Parts(AudioVisual().double()), batch()
        ogm = parts.methods["OGM"]
        shown = self.shown(parts, "OGM", (audio, visual, labels))
        before = parts.gradients()
        for _ in range(2):
            ogm.observe(shown["logits"], torch.full_like(labels, -100))
        out = ogm.step()
        assert bool(out.scores.isnan().all())
        assert out.coefficients.tolist() == [1.0, 1.0]
        assert differences(parts.gradients(), before) == []
