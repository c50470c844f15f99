"""MLB: its own part of a step, and a whole training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine import eager, sequences
from engine.case import Case, register
from engine.gate import check_update
from engine.gradients import GradientInputs, taken_anew
from engine.inputs import ALPHA
from engine.networks import AudioVisual, ThreeHeads
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, take_step
from engine.training_gate import backward, modality_of, stepped, true_class
from torch import Tensor
from torch.nn import functional as F

import mmfuse

from .modality_scores import stacked_scores


def _factors(scores: Sequence[Tensor]) -> Tensor:
    """[2] k_m of two modalities' scores."""
    a, v = scores
    return torch.stack([1 + torch.tanh(ALPHA * (ratio - 1)) for ratio in (v / a, a / v)])


@register
class Step(Case):
    """The whole `MLB.step`, from logits to gradients."""

    name = "mlb_step"
    title = "MLB.step"
    kind = "gradients"
    ops = ("modality_scores", "modulation_factors", "update_grads_")
    passes = 2
    encoders = 2
    make = staticmethod(GradientInputs)

    def check(self, provider: str, i: GradientInputs, result: object) -> None:
        scores = [true_class(z.double(), i.head.labels).mean() for z in i.head.logits]
        check_update(provider, i, scale=_factors(scores)[i.modality_index])

    def official(self, i: GradientInputs) -> None:
        scores = [sequences.mlb.mean_score(z, i.head.labels) for z in i.head.logits]
        ratios = sequences.mlb.discrepancies(scores)
        factors = sequences.mlb.decide(ratios, ALPHA)
        sequences.mlb.log(ratios, factors)
        for params, k in zip(i.encoder_params, factors, strict=True):
            for p in params:
                p.grad *= k

    def foreach(self, i: GradientInputs) -> None:
        eager.scale(i, _factors(stacked_scores(i.head).unbind()), eager.read(i))

    def mmfuse(self, i: GradientInputs, backend: str) -> None:
        method = i.cached(
            ("MLB", backend),
            lambda: mmfuse.MLB(
                dict(zip("av", i.encoder_params, strict=True)), alpha=ALPHA, backend=backend
            ),
        )
        taken_anew(method)
        method.step(dict(zip("av", i.head.logits, strict=True)), i.head.labels)


def _logits(model: AudioVisual, a: Tensor, v: Tensor) -> list[Tensor]:
    """The joint ones, which are a sum, and both modalities', whose heads share one bias."""
    bias = model.head_audio.bias / 2
    own = [
        F.linear(x, head.weight, bias)
        for x, head in ((a, model.head_audio), (v, model.head_visual))
    ]
    return [sum(own), *own]


@register
class Training(TrainingCase):
    """A step with the weights of the modalities' heads, which the released code scales as well."""

    name = "mlb_training"
    title = "MLB: a whole training step"
    method = "MLB"
    network = ThreeHeads
    ops = ("modality_scores", "modulation_factors", "update_grads_")

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
            a, v = model.features(i.audio, i.visual)
            logits = _logits(model, a, v)
            return [a, v], logits, sum(F.cross_entropy(z, i.labels) for z in logits)

        seen = backward(i, forward)
        a, v = (true_class(z, i.labels).mean() for z in seen.logits[1:])
        factors = [1 + torch.tanh(ALPHA * (ratio - 1)) for ratio in (v / a, a / v)]
        heads = {"head_audio.weight": 0, "head_visual.weight": 1}
        grads = []
        for name, grad in seen.named_gradients():
            modality = heads.get(name, modality_of(name))
            scaled = regulated and modality is not None
            grads.append(grad * factors[modality] if scaled else grad)
        return stepped(i, grads)

    def plain(self, i: TrainingInputs) -> None:
        def losses(model: AudioVisual) -> Sequence[Tensor]:
            logits = _logits(model, *model.features(i.audio, i.visual))
            return [F.cross_entropy(z, i.labels) for z in logits]

        take_step(i, losses)

    def official(self, i: TrainingInputs) -> None:
        sequences.mlb.step(i.model, i.optimizer, i.audio, i.visual, i.labels, alpha=ALPHA)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        model = i.model
        owners = {
            "audio": [*model.audio_net.parameters(), model.head_audio.weight],
            "visual": [*model.visual_net.parameters(), model.head_visual.weight],
        }

        def start() -> mmfuse.MLB:
            made = mmfuse.MLB.official(owners, alpha=ALPHA, backend=backend)
            made.set_epoch(0)
            return made

        method = i.cached(("MLB", backend), start)
        i.optimizer.zero_grad()
        logits = _logits(model, *model.features(i.audio, i.visual))
        loss = sum(F.cross_entropy(z, i.labels) for z in logits)
        method.backward(loss, dict(zip(owners, logits[1:], strict=True)), i.labels)
        i.optimizer.step()
