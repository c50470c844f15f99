"""CGGM: its own part of a step, and a whole training step."""

from __future__ import annotations

import torch
from engine import eager, sequences
from engine.case import Case, register
from engine.gate import check_update
from engine.gradients import GradientInputs, taken_anew
from engine.networks import ThreeHeads
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, take_step
from engine.training_gate import backward, modality_of, stepped
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

from .modality_accuracies import rates
from .progress_factors import RHO, decide

CLIP = 0.8


def _factors(scores: Tensor) -> Tensor:
    """[M] of top-1 rates; of a first step, whose progress they are."""
    return decide(scores, torch.zeros_like(scores))[0]


@register
class Step(Case):
    """The whole `CGGM.step`, the first one, from logits to gradients."""

    name = "cggm_step"
    title = "CGGM.step"
    kind = "gradients"
    ops = ("modality_accuracies", "progress_factors", "update_grads_")
    passes = 2
    encoders = 2
    make = staticmethod(GradientInputs)

    def check(self, provider: str, i: GradientInputs, result: object) -> None:
        factors = _factors(rates(i.head.logits, i.head.labels))
        check_update(provider, i, scale=factors[i.modality_index])

    def official(self, i: GradientInputs) -> None:
        metrics = [sequences.cggm.right_classes(z, i.head.labels) for z in i.head.logits]
        k = sequences.cggm.decide(metrics)
        for params, factor in zip(i.encoder_params, k, strict=True):
            for p in params:
                p.grad *= factor * RHO

    def foreach(self, i: GradientInputs) -> None:
        last = i.cached("last rates", lambda: torch.zeros(2, dtype=torch.float64, device=i.device))
        last.zero_()  # as before a first step
        now = rates(i.head.logits, i.head.labels)
        factors = decide(now, last)[0].to(i.wide)
        last.copy_(now)
        eager.scale(i, factors, eager.read(i))

    def mmfuse(self, i: GradientInputs, backend: str) -> None:
        method = i.cached(
            ("CGGM", backend),
            lambda: mmfuse.CGGM.official(
                dict(zip("av", i.encoder_params, strict=True)), rho=RHO, backend=backend
            ),
        )
        for value in method._state.values():  # as before a first step
            value.zero_()
        taken_anew(method)
        method.step(dict(zip("av", i.head.logits, strict=True)), i.head.labels)


class Guided(ThreeHeads):
    """A step with a fusion to one feature's width, so that all output layers have one shape."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.fuse = nn.Linear(2 * width, width)
        self.fc = nn.Linear(width, classes)

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both features, and the joint logits."""
        a, v = self.features(audio, visual)
        return a, v, self.fc(F.relu(self.fuse(torch.cat([a, v], dim=1))))


def _own(model: Guided, a: Tensor, v: Tensor) -> list[Tensor]:
    """The classifiers' logits; no encoder hears of them."""
    return [model.head_audio(a.detach()), model.head_visual(v.detach())]


def _losses(i: TrainingInputs, model: Guided) -> list[Tensor]:
    a, v, out = model(i.audio, i.visual)
    return [F.cross_entropy(z, i.labels) for z in (out, *_own(model, a, v))]


@register
class Training(TrainingCase):
    """The first step, whose progress is the metric itself, and whose direction term is still 0.

    The heads are the classifiers; one optimizer has them as well. Only what is not theirs is
    clipped.
    """

    name = "cggm_training"
    title = "CGGM: a whole training step"
    method = "CGGM"
    network = Guided
    ops = ("modality_accuracies", "progress_factors", "update_grads_")

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        def forward(model: Guided) -> tuple[list[Tensor], list[Tensor], Tensor]:
            a, v, out = model(i.audio, i.visual)
            logits = [out, *_own(model, a, v)]
            return [a, v], logits, sum(F.cross_entropy(z, i.labels) for z in logits)

        seen = backward(i, forward)
        factors = _factors(rates(seen.logits[1:], i.labels))
        grads = []
        for name, grad in seen.named_gradients():
            modality = modality_of(name)
            scaled = regulated and modality is not None
            grads.append(grad * factors[modality] if scaled else grad)
        if regulated:
            named = zip(seen.named_gradients(), grads, strict=True)
            main = [grad for (name, _), grad in named if not name.startswith("head_")]
            norm = torch.stack([g.norm() for g in main]).norm()
            for g in main:
                g *= (CLIP / (norm + 1e-6)).clamp(max=1)
        return stepped(i, grads)

    def plain(self, i: TrainingInputs) -> None:
        take_step(i, lambda model: _losses(i, model))

    def official(self, i: TrainingInputs) -> None:
        def start() -> sequences.cggm.Training:
            heads = {"audio": i.model.head_audio, "visual": i.model.head_visual}
            return sequences.cggm.Training(i.model, i.optimizer, heads, None, i.model.fc)

        made = i.cached("official CGGM", start)
        made.start()
        made.step(i.audio, i.visual, labels=i.labels, rho=RHO, clip=CLIP)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        model = i.model
        cggm, main = i.cached(
            ("CGGM", backend),
            lambda: (
                mmfuse.CGGM.official(model.encoders, rho=RHO, backend=backend),
                [p for n, p in model.named_parameters() if not n.startswith("head_")],
            ),
        )
        for value in cggm._state.values():  # as before a first step
            value.zero_()
        i.optimizer.zero_grad()
        a, v, out = model(i.audio, i.visual)
        own = dict(zip(model.encoders, _own(model, a, v), strict=True))
        losses = [F.cross_entropy(z, i.labels) for z in (out, *own.values())]
        weights = {"audio": model.head_audio.weight, "visual": model.head_visual.weight}
        losses.append(cggm.direction_loss(weights, model.fc.weight))
        cggm.backward(sum(losses), own, i.labels)
        torch.nn.utils.clip_grad_norm_(main, CLIP)
        i.optimizer.step()
