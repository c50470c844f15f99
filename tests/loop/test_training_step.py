"""What training steps are made of: compilation, checkpointing, shared and frozen parameters."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from epochs import next_epoch
from networks import AudioVisual, batch, start_third_epoch
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
from mmfuse import ARM, OGM, OPM, InfoReg, NoiseStream, RedReg, ogm_backward
from mmfuse.ops._registry import OPS

pytestmark = [
    # torch.compile looks for a gradient in tensors that are handed from one graph to the next.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]

U = UNIT_ROUNDOFF[torch.float32]
PACKAGE = os.path.dirname(mmfuse.__file__)

Data = tuple[Tensor, Tensor, Tensor]


class Parts:
    """A model with every method on it, all from the same seeds, and one forward pass."""

    def __init__(self, model: AudioVisual, **ogm: Any) -> None:
        self.model = model = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.ogm = OGM(model.encoders, stream=NoiseStream(3), **ogm)
        self.inforeg = InfoReg(model.encoders, threshold=-1e30)
        self.redreg = RedReg(
            model.encoders,
            threshold=-100.0,
            agreement=(-1.0, -1.0),
            window=2,
            stream=NoiseStream(4),
        )
        self.opm = OPM(stream=NoiseStream(5))
        self.arm = ARM()
        start_third_epoch(self.inforeg)
        next_epoch(self.redreg)

    def forward(self, data: Data) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        a, v, out = self.model(data[0], data[1])
        features = {"audio": a, "visual": v}
        logits = mmfuse.unimodal_logits(self.model.fc, features)
        return F.cross_entropy(out, data[2]), logits, features

    def loss_of(self, features: dict[str, Tensor], data: Data) -> Tensor:
        return F.cross_entropy(self.model.fc(torch.cat(list(features.values()), 1)), data[2])

    def state(self) -> dict[str, Any]:
        """Everything that a step may change, copied."""
        parts = {
            "model": dict(self.model.state_dict()),
            "ogm": self.ogm.state_dict(),
            "inforeg": self.inforeg.state_dict(),
            "redreg": self.redreg.state_dict(),
            "opm": dict(self.opm.state_dict()),
            "arm": dict(self.arm.state_dict()),
            "momentum": [s["momentum_buffer"] for s in self.optimizer.state.values()],
        }
        return copy.deepcopy(parts)

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.model.parameters()]


def step_ogm(parts: Parts, data: Data) -> Tensor:
    loss, logits, _ = parts.forward(data)
    loss.backward()
    parts.ogm.step(logits, data[2])
    return loss.detach()


def step_ogm_backward(parts: Parts, data: Data) -> Tensor:
    loss, logits, _ = parts.forward(data)
    ogm_backward(loss, parts.model.encoders, logits, data[2], stream=parts.ogm.stream)
    return loss.detach()


def step_everything(parts: Parts, data: Data) -> Tensor:
    """All five methods in one step."""
    parts.optimizer.zero_grad()
    _, logits, features = parts.forward(data)
    kept = parts.opm(features, logits, data[2]).features
    fused = features["audio"] + features["visual"]
    weighted = parts.arm(kept, fused, logits, parts.model.fc(torch.cat([fused, fused], 1)), data[2])
    loss = parts.loss_of(weighted.features, data)
    parts.ogm.backward(loss, logits, data[2])
    parts.inforeg.step(logits, data[2])
    inputs = {"audio": data[0], "visual": data[1]}
    parts.redreg.step(logits, data[2], features, inputs)
    parts.optimizer.step()
    return loss.detach()


class TestCompile:
    """backend="aot_eager" traces as inductor does, but runs PyTorch's kernels: bit for bit."""

    @pytest.fixture(autouse=True)
    def _cold(self, monkeypatch: pytest.MonkeyPatch) -> object:
        """As in a process where no op was called before: the first call chooses the backend."""
        torch._dynamo.reset()
        for op in OPS.values():
            monkeypatch.setattr(op, "_chosen", {})
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("kind", ["ogm", "inforeg", "opm", "arm"])
    def test_no_graph_break_in_a_method(self, kind: str) -> None:
        """fullgraph=True raises at the first graph break, and error_on_recompile at recompiling."""
        model = AudioVisual()
        eager, compiled = Parts(model), Parts(model)
        shown = batch()

        def call(parts: Parts) -> Callable[..., Any]:
            return {
                "ogm": lambda z, y, f: parts.ogm.step(z, y),
                "inforeg": lambda z, y, f: parts.inforeg.step(z, y),
                "opm": lambda z, y, f: parts.opm(f, z, y).features,
                "arm": lambda z, y, f: parts.arm(f, sum(f.values()), z, z["audio"], y).features,
            }[kind]

        calls = {
            id(eager): call(eager),
            id(compiled): torch.compile(call(compiled), fullgraph=True, backend="aot_eager"),
        }
        for i in range(3):
            shown = batch()
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                for parts in (eager, compiled):
                    parts.optimizer.zero_grad()
                    loss, logits, features = parts.forward(shown)
                    detached = {n: z.detach() for n, z in logits.items()}
                    if kind in ("ogm", "inforeg"):
                        loss.backward()
                    leaves = {n: f.detach().requires_grad_() for n, f in features.items()}
                    out = calls[id(parts)](detached, shown[2], leaves)
                    if kind in ("opm", "arm"):
                        parts.loss_of(out, shown).backward()
                        parts.passed = [f.grad for f in leaves.values()]
                        for p in parts.model.parameters():
                            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    parts.optimizer.step()
            assert differences(compiled.state(), eager.state()) == []
            assert differences(compiled.gradients(), eager.gradients()) == []
            if kind in ("opm", "arm"):
                assert differences(compiled.passed, eager.passed) == []
        # It did something: the state is not what it was.
        assert differences(compiled.state()[kind], Parts(model).state()[kind]) != []

    def test_redreg_without_a_graph_break(self) -> None:
        """The monitor's passes are in the graph, too; nothing of them is left in the encoders."""
        model, data = AudioVisual(), batch()
        eager, traced = Parts(model), Parts(model)
        for parts in (eager, traced):
            loss, logits, features = parts.forward(data)
            loss.backward()
            inputs = {"audio": data[0], "visual": data[1]}
            detached = [{n: z.detach() for n, z in each.items()} for each in (logits, features)]
            step = parts.redreg.step
            if parts is traced:
                step = torch.compile(step, backend="aot_eager", fullgraph=True)
            step(detached[0], data[2], detached[1], inputs)
        assert differences(traced.state(), eager.state()) == []
        assert differences(traced.gradients(), eager.gradients()) == []

    @pytest.mark.parametrize("step", [step_ogm, step_ogm_backward])
    def test_whole_step(self, step: Callable[[Parts, Data], Tensor]) -> None:
        model = AudioVisual()
        eager, compiled = Parts(model), Parts(model)
        fast = torch.compile(lambda data: step(compiled, data), backend="aot_eager")
        for i in range(3):
            data = batch()
            for parts in (eager, compiled):
                parts.optimizer.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                assert torch.equal(fast(data), step(eager, data))
            for parts in (eager, compiled):
                parts.optimizer.step()
            assert differences(compiled.state(), eager.state()) == []
        assert compiled.ogm.stream.state.tolist() == [3, 3]

    def test_the_one_graph_break_of_ogm_backward(self) -> None:
        """`Tensor.backward` is PyTorch's."""
        parts, data = Parts(AudioVisual()), batch()

        def step() -> None:
            loss, logits, _ = parts.forward(data)
            parts.ogm.backward(loss, logits, data[2])

        found = torch._dynamo.explain(step)()
        assert len(found.break_reasons) >= 1
        for reason in found.break_reasons:
            assert "loss.backward(" in reason.user_stack[-1].line

    def test_compiled_encoders(self) -> None:
        """The model is compiled, the method is not; it may be given the compiled modules."""
        model = AudioVisual()
        eager = Parts(model)
        results = [(step_everything(eager, d), d) for d in (batch(), batch(), batch())]
        compiled = Parts(model)
        audio, visual = (
            torch.compile(net, backend="aot_eager")
            for net in (compiled.model.audio_net, compiled.model.visual_net)
        )
        encoders = {"audio": audio, "visual": visual}
        again = Parts(compiled.model)  # methods on the same parameters as the compiled modules
        again.model = compiled.model
        again.optimizer = compiled.optimizer
        again.ogm = OGM(encoders, stream=NoiseStream(3))
        again.inforeg.modalities = InfoReg(encoders).modalities
        again.redreg = RedReg(
            encoders,
            threshold=-100.0,
            agreement=(-1.0, -1.0),
            window=2,
            stream=NoiseStream(4),
        )
        again.inforeg.load_state_dict(compiled.inforeg.state_dict())
        next_epoch(again.redreg)
        with torch.no_grad():
            assert torch.equal(audio(results[0][1][0]), compiled.model.audio_net(results[0][1][0]))
        compiled.model.load_state_dict(model.state_dict())
        compiled.model.forward = lambda a, v: (  # type: ignore[method-assign]
            z := (audio(a), visual(v)),
            (*z, compiled.model.fc(torch.cat(z, 1))),
        )[1]
        for loss, data in results:
            assert torch.equal(step_everything(again, data), loss)
        assert differences(again.state(), eager.state()) == []

    @pytest.mark.slow
    def test_inductor(self) -> None:
        """The decisions are its own kernels'; the noise is not, and nor is the update."""
        model, data = AudioVisual(), batch()
        eager, compiled = Parts(model), Parts(model)
        fast = torch.compile(compiled.ogm.step, fullgraph=True)
        for parts, step in ((eager, eager.ogm.step), (compiled, fast)):
            loss, logits, _ = parts.forward(data)
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


@pytest.mark.parametrize("reentrant", [False, True])
class TestCheckpointing:
    """The forward pass is repeated in the backward pass."""

    def test_checkpointed_encoders(self, reentrant: bool) -> None:
        model = AudioVisual()
        for net in (model.audio_net, model.visual_net):
            # Batch norm counts a repeated pass twice; without momentum its statistics stay, and
            # the monitor, which is in evaluation mode, sees the same encoder.
            net.bn1.momentum = 0.0
        plain, again = Parts(model), Parts(model)
        forward = again.model.forward
        calls = 0

        def counted(net: nn.Module, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return net(x)

        def checkpointed(audio: Tensor, visual: Tensor) -> tuple[Tensor, ...]:
            nets = (again.model.audio_net, again.model.visual_net)
            a, v = (
                checkpoint(counted, net, x, use_reentrant=reentrant)
                for net, x in zip(nets, (audio, visual), strict=True)
            )
            return a, v, again.model.fc(torch.cat([a, v], 1))

        again.model.forward = checkpointed  # type: ignore[method-assign]
        for _ in range(3):
            audio, visual, labels = batch()
            data = (audio.requires_grad_(), visual.requires_grad_(), labels)
            assert torch.equal(step_everything(plain, data), step_everything(again, data))
        assert calls == 2 * 3 * 2  # forward and, each once more, in the backward pass
        again.model.forward = forward
        state, expected = again.state(), plain.state()
        for each in (state, expected):
            for key in [key for key in each["model"] if key.endswith("num_batches_tracked")]:
                del each["model"][key]
        assert differences(state, expected) == []

    def test_opm_inside_is_refused(self, reentrant: bool) -> None:
        parts, (audio, visual, labels) = Parts(AudioVisual()), batch()

        def region(x: Tensor, y: Tensor) -> Tensor:
            _, logits, features = parts.forward((x, y, labels))
            kept = parts.opm(features, logits, labels).features
            return parts.loss_of(kept, (x, y, labels))

        x, y = audio.requires_grad_(), visual.requires_grad_()
        loss = checkpoint(region, x, y, use_reentrant=reentrant)
        state = copy.deepcopy(parts.opm.state_dict())
        with pytest.raises(RuntimeError, match="leave OPM outside of the checkpointed part"):
            loss.backward()
        assert differences(dict(parts.opm.state_dict()), dict(state)) == []
        assert all(p.grad is None for p in parts.model.audio_net.parameters())

    def test_arm_inside_counts_once(self, reentrant: bool) -> None:
        model = AudioVisual()
        plain, again = Parts(model), Parts(model)

        def region(parts: Parts, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
            _, logits, features = parts.forward((x, y, labels))
            fused = features["audio"] + features["visual"]
            out = parts.arm(features, fused, logits, logits["audio"], labels)
            return parts.loss_of(out.features, (x, y, labels))

        for _ in range(2):
            audio, visual, labels = batch()
            x, y = audio.requires_grad_(), visual.requires_grad_()
            region(plain, x, y, labels).backward()
            checkpoint(region, again, x, y, labels, use_reentrant=reentrant).backward()
        assert float(again.arm.average_weight) == pytest.approx(1 - 0.9**2)
        assert differences(dict(again.arm.state_dict()), dict(plain.arm.state_dict())) == []
        assert differences(again.gradients(), plain.gradients()) == []


class TestSharedParameters:
    def test_one_encoder_for_several_inputs(self) -> None:
        """Its gradient is the sum over the calls, which is modulated once."""
        parts, data = Parts(AudioVisual(), noise=False), batch()
        model = parts.model
        a1, a2 = model.audio_net(data[0]), model.audio_net(data[0].flip(3))
        a, v = (a1 + a2) / 2, model.visual_net(data[1])
        logits = mmfuse.unimodal_logits(model.fc, {"audio": a, "visual": v})
        loss = F.cross_entropy(model.fc(torch.cat([a, v], 1)), data[2])
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        out = parts.ogm.backward(loss, logits, data[2])
        assert float(out.coefficients.min()) < 1
        for (name, p), g in zip(model.named_parameters(), grads, strict=True):
            modality = (
                ["audio_net", "visual_net"].index(n) if (n := name.split(".")[0]) != "fc" else 2
            )
            k = [*out.coefficients, torch.tensor(1.0)][modality]
            assert torch.equal(p.grad, k * g), name

    @pytest.mark.parametrize("kind", ["ogm", "inforeg", "redreg"])
    def test_tied_weights_in_an_encoder(self, kind: str) -> None:
        """A weight that two layers share is one parameter: one stream id, modulated once."""
        tied = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        tied[2].weight = tied[0].weight
        nets = {"tied": tied, "other": nn.Linear(6, 6)}
        parameters = [tied[0].weight, tied[0].bias, tied[2].bias, *nets["other"].parameters()]
        # A module names it once, a list may hold it twice.
        listed = {"tied": [*parameters[:2], tied[2].weight, parameters[2]], "other": parameters[3:]}
        x, labels = torch.randn(8, 6), torch.randint(0, 6, (8,))
        results = []
        for encoders in (nets, listed):
            if kind == "ogm":
                method: Any = OGM(encoders, stream=NoiseStream(1))
            elif kind == "inforeg":
                method = InfoReg(encoders)
            else:
                method = RedReg(encoders, forward=nets, stream=NoiseStream(1), threshold=-100.0)
            assert len(method.modalities.parameters) == 5
            if kind != "ogm":
                next_epoch(method)
            for p in parameters:
                p.grad = None
            features = {n: net(x) for n, net in nets.items()}
            logits = {n: z * (1 + 3 * (n == "tied")) for n, z in features.items()}
            F.cross_entropy(sum(logits.values()), labels).backward()
            more = (features, {"tied": x, "other": x}) if kind == "redreg" else ()
            method.step(logits, labels, *more)
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
                loss, logits, _ = each.forward(data)
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

    def test_a_stale_gradient_of_a_frozen_parameter_stays(self) -> None:
        parts, data = Parts(AudioVisual()), batch()
        step_everything(parts, data)
        weight = parts.model.visual_net.conv1.weight
        weight.requires_grad_(False)
        stale = weight.grad.clone()
        loss, logits, features = parts.forward(data)
        loss.backward()
        parts.ogm.step(logits, data[2])
        parts.inforeg.step(logits, data[2])
        inputs = {"audio": data[0], "visual": data[1]}
        parts.redreg.step(logits, data[2], features, inputs)
        assert torch.equal(weight.grad, stale)

    def test_a_whole_encoder_is_frozen_and_unfrozen(self) -> None:
        """Fisher traces are those of what has a gradient; nothing is missed or counted twice."""
        parts = Parts(AudioVisual())
        expected = torch.zeros(2, dtype=torch.float64)
        for on in (True, False, True):
            parts.model.audio_net.requires_grad_(on)
            parts.optimizer.zero_grad()
            data = batch()
            loss, logits, features = parts.forward(data)
            loss.backward()
            for m, net in enumerate(parts.model.encoders.values()):
                for p in net.parameters():
                    expected[m] += 0.0 if p.grad is None else p.grad.double().square().sum()
            inputs = {"audio": data[0], "visual": data[1]}
            assert bool(parts.inforeg.step(logits, data[2]).finite)
            assert bool(parts.redreg.step(logits, data[2], features, inputs).finite)
            parts.optimizer.step()
        # sq_norm = m2 + n mean^2, each from float32 sums: twice the bound of one of them, a step.
        bound = 2 * sum_of_products(torch.float32, expected)
        assert_within(parts.inforeg.fisher_trace * 3, expected, bound, "trace")


def test_zero_grad_leaves_none_or_zero() -> None:
    """Where every parameter gets a gradient it makes no difference."""
    model = AudioVisual()
    runs = []
    for none in (True, False):
        parts = Parts(model)
        torch.manual_seed(0)
        for _ in range(3):
            data = batch()
            parts.optimizer.zero_grad(set_to_none=none)
            loss, logits, features = parts.forward(data)
            loss.backward()
            parts.ogm.step(logits, data[2])
            parts.inforeg.step(logits, data[2])
            inputs = {"audio": data[0], "visual": data[1]}
            parts.redreg.step(logits, data[2], features, inputs)
            parts.optimizer.step()
        runs.append(parts.state())
    assert differences(*runs) == []


def test_a_zero_gradient_gets_the_noise_beside_std() -> None:
    """What a layer without part in this step has after zero_grad(set_to_none=False): std 0."""
    parts, data = Parts(AudioVisual()), batch()
    spare = parts.model.audio_net.spare = nn.Linear(6, 4)
    parts.ogm = OGM(parts.model.encoders, stream=NoiseStream(3))
    parts.redreg = RedReg(parts.model.encoders, stream=NoiseStream(4))
    next_epoch(parts.redreg)
    index = [p is spare.weight for p in parts.ogm.modalities.parameters].index(True)
    for none in (True, False):
        spare.weight.grad = None if none else torch.zeros(4, 6)
        parts.optimizer.zero_grad()
        loss, logits, features = parts.forward(data)
        loss.backward()
        step = int(parts.ogm.stream.state[1])
        inputs = {"audio": data[0], "visual": data[1]}
        parts.redreg.step(logits, data[2], features, inputs)
        if none:
            assert spare.weight.grad is None
            parts.ogm.step(logits, data[2])
            assert spare.weight.grad is None
            continue
        assert bool((spare.weight.grad == 0).all())
        parts.ogm.step(logits, data[2])
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
        for parts in (last, plain):
            next_epoch(parts.inforeg)
            next_epoch(parts.redreg)
        data = batch()
        data = (data[0], data[1].to(memory_format=torch.channels_last), data[2])
        loss, logits, _ = last.forward(data)
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
            parts.ogm.rule = replace(parts.ogm.rule, noise=False)
            assert float(parts.ogm.step(logits, data[2]).coefficients.min()) < 1
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

    @pytest.mark.parametrize("kind", ["ogm", "inforeg", "redreg"])
    def test_is_an_error(self, kind: str) -> None:
        parts, data = self.replaced()
        loss, logits, features = parts.forward(data)
        loss.backward()
        gradients, state = parts.gradients(), parts.state()
        match = r"encoders\['audio'\].conv1.weight is new since this object was made \(7 such"
        more = (features, {"audio": data[0], "visual": data[1]}) if kind == "redreg" else ()
        with pytest.raises(ValueError, match=match):
            getattr(parts, kind).step(logits, data[2], *more)
        assert differences(parts.gradients(), gradients) == []
        assert differences(parts.state(), state) == []

    def test_of_one_layer_is_an_error(self) -> None:
        parts, data = Parts(AudioVisual()), batch()
        loss, logits, _ = parts.forward(data)
        loss.backward()
        parts.ogm.step(logits, data[2])
        parts.model.zero_grad()
        weight = parts.model.visual_net.proj.weight
        parts.model.visual_net.proj.weight = nn.Parameter(weight.detach().clone())
        loss, logits, _ = parts.forward(data)
        loss.backward()
        with pytest.raises(ValueError, match=r"encoders\['visual'\].proj.weight is new since this"):
            parts.ogm.step(logits, data[2])

    def test_is_an_error_of_ogms_backward(self) -> None:
        parts, data = self.replaced()
        loss, logits, _ = parts.forward(data)
        with pytest.raises(ValueError, match="is new since this object was made"):
            parts.ogm.backward(loss, logits, data[2])
        assert parts.ogm.stream.state.tolist() == [3, 0]

    def test_a_new_object_sees_the_new_parameters(self) -> None:
        parts, data = self.replaced()
        loss, logits, _ = parts.forward(data)
        ogm = OGM(parts.model.encoders, noise=False)
        loss.backward(retain_graph=True)
        plain = parts.gradients()
        parts.model.zero_grad()
        k = ogm.backward(loss, logits, data[2]).coefficients
        audio = list(parts.model.audio_net.parameters())
        assert float(k[0]) < 1
        assert differences([p.grad for p in audio], [k[0] * g for g in plain[: len(audio)]]) == []

    def test_a_missing_modality_is_none(self) -> None:
        """A batch without one modality leaves its encoder without a gradient: nothing is wrong."""
        parts, data = Parts(AudioVisual()), batch()
        _, logits, features = parts.forward(data)
        F.cross_entropy(logits["visual"], data[2]).backward()
        assert all(p.grad is None for p in parts.model.audio_net.parameters())
        assert bool(parts.ogm.step(logits, data[2]).finite)
        assert bool(parts.inforeg.step(logits, data[2]).finite)
        inputs = {"audio": data[0], "visual": data[1]}
        assert bool(parts.redreg.step(logits, data[2], features, inputs).finite)
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
    """In float64 and without batch norm's dependence on the other samples."""
    return model.double().eval()


class TestAccumulation:
    """`observe` in every micro-batch, `step` once: the scores of one big batch."""

    def shown(self, parts: Parts, kind: str, data: Data) -> tuple[Any, ...]:
        data = (data[0].double(), data[1].double(), data[2])
        _, logits, features = parts.forward(data)
        # Each part's share of the whole mean, over 13 labelled rows.
        F.cross_entropy(sum(logits.values()), data[2], reduction="sum").div(13).backward()
        inputs = {"audio": data[0], "visual": data[1]}
        return (logits, data[2], features, inputs) if kind == "redreg" else (logits, data[2])

    @pytest.mark.parametrize("last", [True, False], ids=["last given to step", "all observed"])
    @pytest.mark.parametrize("kind", ["ogm", "inforeg", "redreg"])
    def test_is_one_big_batch(self, kind: str, last: bool) -> None:
        model = double(AudioVisual())
        big, small = Parts(model), Parts(model)
        whole, parts_of_it = micro_batches()
        results = []
        for parts, batches in ((big, [whole]), (small, parts_of_it)):
            method = getattr(parts, kind)
            for i, data in enumerate(batches):
                shown = self.shown(parts, kind, data)
                if i == len(batches) - 1 and last:
                    break
                method.observe(*shown)
            parts.before = parts.gradients()
            results.append(method.step(*shown) if last else method.step())
        expected, found = results
        u = UNIT_ROUNDOFF[torch.float64]
        # The encoders' outputs are sums of at most 54 products, three layers deep, and a score
        # depends on them through logits of 6 products and a softmax: 3 * 54 + 6 + 5 roundings that
        # may differ with the batch's size, times logits and activations of at most 10.
        bound = 2 * 10 * (3 * 54 + 6 + 5) * u
        names = {
            "ogm": ("scores", "ratios", "coefficients"),
            "inforeg": ("scores", "information_gap"),
            "redreg": ("scores",),
        }[kind]
        for name in names:
            a, b = getattr(found, name), getattr(expected, name)
            assert_within(a, b, bound * (1 + b.abs()) ** 2, name)
        if kind == "redreg":
            # |z1 - z2|^2 of outputs 0.01 or more apart, so that it is off relatively by 200 times
            # as much; the views are the same numbers, row by row of the whole batch.
            a, b = found.redundancy, expected.redundancy
            assert_within(a, b, 200 * bound * b, "redundancy")
            assert torch.equal(found.gate, expected.gate)
            assert small.redreg.stream.state.tolist() == [4, 1]
        if kind == "ogm":
            assert float(found.coefficients.min()) < 0.99
            assert small.ogm.stream.state.tolist() == [3, 1]

    def test_the_weights_are_the_labelled_samples(self) -> None:
        """The score, from its definition, and not the mean over the micro-batches."""
        parts, (whole, pieces) = Parts(double(AudioVisual())), micro_batches()
        for data in pieces:
            parts.ogm.observe(*self.shown(parts, "ogm", data))
        scores = parts.ogm.step().scores
        with torch.no_grad():
            _, logits, _ = parts.forward((whole[0].double(), whole[1].double(), whole[2]))
        for m, z in enumerate(logits.values()):
            rows = (whole[2] != -100).nonzero().squeeze(1)
            p = z.softmax(1)[rows, whole[2][rows]]
            bound = 2 * 10 * (3 * 54 + 6 + 5) * UNIT_ROUNDOFF[torch.float64]
            assert len(rows) == 13
            assert_within(scores[m], p.mean(), torch.tensor(bound), "score")

    @pytest.mark.parametrize("noise", [False, True])
    def test_modulation_acts_once(self, noise: bool) -> None:
        parts, (_, pieces) = Parts(AudioVisual().double(), noise=noise), micro_batches()
        for data in pieces[:-1]:
            shown = self.shown(parts, "ogm", data)
            before = parts.gradients()
            parts.ogm.observe(*shown)
            assert differences(parts.gradients(), before) == []  # it only looks
            assert parts.ogm.stream.state.tolist() == [3, 0]
        shown = self.shown(parts, "ogm", pieces[-1])
        before = parts.gradients()
        k = parts.ogm.step(*shown).coefficients
        assert parts.ogm.stream.state.tolist() == [3, int(noise)]
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

    @pytest.mark.parametrize("kind", ["ogm", "inforeg", "redreg"])
    def test_a_step_needs_an_observation(self, kind: str) -> None:
        parts, (whole, _) = Parts(AudioVisual().double()), micro_batches()
        method = getattr(parts, kind)
        for _ in range(2):
            shown = self.shown(parts, kind, whole)
            before, state = parts.gradients(), parts.state()
            with pytest.raises(RuntimeError, match="nothing was observed since the last step"):
                method.step()
            assert differences(parts.gradients(), before) == []
            assert differences(parts.state(), state) == []
            method.observe(*shown)
            method.step()

    @pytest.mark.parametrize("kind", ["ogm", "inforeg", "redreg"])
    def test_an_error_of_observe_changes_nothing(self, kind: str) -> None:
        model = AudioVisual().double()
        tried, plain = Parts(model), Parts(model)
        _, pieces = micro_batches()
        for data in (pieces[0], pieces[3]):
            for parts in (tried, plain):
                shown = self.shown(parts, kind, data)
                method = getattr(parts, kind)
                method.observe(*shown)
                if parts is plain:
                    continue
                logits, labels, *rest = shown
                for error, match, bad in [
                    (ValueError, "out of range", (logits, labels.clamp(max=0) + 99, *rest)),
                    (ValueError, "name different modalities", ({"audio": 0}, labels, *rest)),
                    (ValueError, "must have shape", (logits, labels[:2], *rest)),
                    (TypeError, "must be an integer tensor", (logits, labels.float(), *rest)),
                ]:
                    with pytest.raises(error, match=match):
                        method.observe(*bad)
                    with pytest.raises(error, match=match):
                        method.step(*bad)
        for parts in (tried, plain):
            getattr(parts, kind).step()
        assert differences(tried.gradients(), plain.gradients()) == []
        assert differences(tried.state(), plain.state()) == []

    def test_no_row_is_labelled(self) -> None:
        """No score, so that nothing is modulated, and noise is all that OGM-GE adds."""
        parts, (audio, visual, labels) = Parts(AudioVisual().double(), noise=False), batch()
        shown = self.shown(parts, "ogm", (audio, visual, labels))
        before = parts.gradients()
        for _ in range(2):
            parts.ogm.observe(shown[0], torch.full_like(labels, -100))
        out = parts.ogm.step()
        assert bool(out.scores.isnan().all())
        assert out.coefficients.tolist() == [1.0, 1.0]
        assert differences(parts.gradients(), before) == []
