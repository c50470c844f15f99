"""OGM and OGM-GE: statistics and update, the object's step, and whole training steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from engine import eager, sequences
from engine.case import CASES, Case, register
from engine.compiled import scale_all_with_noise, update
from engine.gate import PLAIN, check_update, close
from engine.gradients import GradientInputs, taken_anew
from engine.inputs import ALPHA
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, joint_step
from engine.training_gate import (
    backward,
    check_parameters,
    joint_forward,
    modality_of,
    stepped,
    training_tolerance,
)
from torch import Tensor
from torch.nn import functional as F

import mmfuse
from mmfuse import ops

from .modulation_factors import OPS as DECISION
from .modulation_factors import exact_decision


@register
class NoiseAsWide(Case):
    """OGM-GE's statistics and update, with coefficients that are known."""

    name = "ogm_ge"
    title = "OGM-GE: grad_stats, update_grads_"
    kind = "gradients"
    ops = ("grad_stats", "update_grads_")
    passes = 3
    noisy = True
    main = True
    make = staticmethod(GradientInputs)

    def check(self, provider: str, i: GradientInputs, result: object) -> None:
        check_update(provider, i, scale=i.scale, noise_std=i.exact_stats.std + 1e-8)

    def official(self, i: GradientInputs) -> None:
        for params, k in zip(i.encoder_params, i.coefficients.unbind(), strict=True):
            sequences.ogm.scale_with_noise(params, k)

    def foreach(self, i: GradientInputs) -> None:
        std = eager.std(i) + 1e-8
        eager.scale(i, i.coefficients)
        eager.add_noise(i, std)

    def compile(self, i: GradientInputs) -> None:
        scale_all_with_noise(i, i.scale)

    def mmfuse(self, i: GradientInputs, backend: str) -> None:
        std = ops.grad_stats(i.grads, backend=backend).std + 1e-8
        ops.update_grads_(i.grads, i.scale, noise_std=std, stream=i.stream, backend=backend)


@register
class Step(Case):
    """The whole `OGM.step`, from logits to gradients, without noise."""

    name = "ogm_step"
    title = "OGM.step, noise=False"
    kind = "gradients"
    ops = (*DECISION, "update_grads_")
    passes = 2
    # The coefficient of the modality that is behind is one, which leaves nothing to move.
    operand = "ahead_nbytes"
    encoders = 2
    noise = False
    make = staticmethod(GradientInputs)

    def check(self, provider: str, i: GradientInputs, result: object) -> None:
        coefficients, _ = exact_decision(i.head.logits, i.head.labels)
        std = i.exact_stats.std + 1e-8 if self.noise else None
        scale = coefficients[i.modality_index]
        # In float32 1 − tanh is off by an ulp below 1, however small the difference itself is.
        rounding = 2.0**-24 / float(scale.min())
        check_update(provider, i, scale=scale, noise_std=std, rounding=rounding)

    def official(self, i: GradientInputs) -> None:
        coefficients, _ = CASES["decision"].official(i.head)
        act = sequences.ogm.scale_with_noise if self.noise else sequences.ogm.scale
        for params, k in zip(i.encoder_params, coefficients, strict=True):
            act(params, k)

    def foreach(self, i: GradientInputs) -> None:
        coefficients, _ = CASES["decision"].foreach(i.head)
        grads = eager.read(i)
        std = eager.std(i) + 1e-8 if self.noise else None
        eager.scale(i, coefficients, grads)
        if std is not None:
            eager.add_noise(i, std)

    def compile(self, i: GradientInputs) -> None:
        coefficients, _ = CASES["decision"].compile(i.head)
        scale = coefficients[i.modality_index]
        if self.noise:
            scale_all_with_noise(i, scale)
            return
        for grad, factor in zip(i.flat_grads, scale.split(1), strict=True):
            update(grad, factor, None, None)

    def mmfuse(self, i: GradientInputs, backend: str) -> None:
        method = i.cached(
            ("OGM", backend, self.noise),
            lambda: mmfuse.OGM(
                dict(zip("av", i.encoder_params, strict=True)),
                alpha=ALPHA,
                noise=self.noise,
                formula="cvpr",
                stream=i.stream,
                backend=backend,
            ),
        )
        # Short calls are timed several at a time: each counts as after a backward pass of its own.
        taken_anew(method)
        method.step(dict(zip("av", i.head.logits, strict=True)), i.head.labels)


@register
class NoisyStep(Step):
    """A step with noise."""

    name = "ogm_ge_step"
    title = "OGM.step, noise=True"
    ops = (*DECISION, "grad_stats", "update_grads_")
    passes = 3
    operand = "nbytes"
    noisy = True
    main = True
    noise = True


@dataclass
class _Gradients:
    """The part of inputs that `check_update` looks at."""

    pristine: list[Tensor]
    params: list[Tensor]
    state: Tensor
    dtype: torch.dtype
    device: torch.device

    def results(self) -> list[Tensor]:
        """The gradients as a provider has left them."""
        return [p.grad for p in self.params]


@register
class Training(TrainingCase):
    """The released rule; the paper's, which users get by default, modulates other tensors too.

    These are 0.1 % of the elements.
    """

    name = "ogm_training"
    title = "OGM: a whole training step"
    method = "OGM"
    ops = (*DECISION, "update_grads_")
    noise = False

    def check(self, provider: str, i: TrainingInputs, result: object) -> None:
        """Compares the convolutions' gradients, then the parameters that they lead to."""
        seen = i.cached("exact OGM", lambda: backward(i, joint_forward(i)))
        k, _ = exact_decision(seen.logits[1:], i.labels)
        rows = zip(i.model.named_parameters(), seen.model.parameters(), strict=True)
        changed, rounding = [], training_tolerance(i)
        for (name, p), plain in rows:
            modality = modality_of(name)
            if modality is None or p.dim() != 4 or provider == PLAIN:
                size = float(plain.grad.square().mean().sqrt())
                close(f"gradient of {name}", p.grad, plain.grad, 0.0, rounding * size)
            else:
                changed.append((plain.grad, p, modality))
        if changed:
            before, params, owners = map(list, zip(*changed, strict=True))
            view = _Gradients(before, params, i.state, i.dtype, i.device)
            std = torch.stack([g.std() for g in before]) + 1e-8 if self.noise else None
            check_update(provider, view, scale=k[owners], noise_std=std, rounding=rounding)
        check_parameters(i, stepped(i, [p.grad for p in i.parameters]))

    def plain(self, i: TrainingInputs) -> None:
        joint_step(i)

    def official(self, i: TrainingInputs) -> None:
        draw = sequences.ogm.gaussian if self.noise else None
        sequences.ogm.step(
            i.model, i.optimizer, i.audio, i.visual, i.labels, alpha=ALPHA, draw=draw
        )

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        # `OGM.official` sets it so, which takes neither a stream nor a backend.
        method = i.cached(
            ("OGM", backend, self.noise),
            lambda: mmfuse.OGM(
                i.model.encoders,
                alpha=ALPHA,
                noise=self.noise,
                formula="cvpr",
                select="conv",
                stream=i.stream,
                backend=backend,
            ),
        )
        i.optimizer.zero_grad()
        a, v, out = i.model(i.audio, i.visual)
        logits = mmfuse.unimodal_logits(i.model.fc, {"audio": a, "visual": v})
        method.backward(F.cross_entropy(out, i.labels), logits, i.labels)
        i.optimizer.step()


@register
class NoisyTraining(Training):
    """A step with noise."""

    name = "ogm_ge_training"
    title = "OGM-GE: a whole training step"
    ops = (*DECISION, "grad_stats", "update_grads_")
    noisy = True
    main = True
    noise = True
