"""LFM: a whole training step, with two heads of their own."""

from __future__ import annotations

import torch
from engine import sequences
from engine.case import register
from engine.networks import AudioVisual, ThreeHeads
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, take_step
from engine.training_gate import backward, stepped
from torch import Tensor
from torch.nn import functional as F

import mmfuse

# The epoch, of 200; the weights of labels and alignment are nearly alike in it.
EPOCH = 80


def _logits(model: AudioVisual, a: Tensor, v: Tensor) -> list[Tensor]:
    """The joint ones, which are a mean, and both modalities'."""
    own = [model.head_audio(a), model.head_visual(v)]
    return [(own[0] + own[1]) / 2, *own]


@register
class Training(TrainingCase):
    """A step in an epoch of the schedule; the plain step has the joint loss alone, twice."""

    name = "lfm_training"
    title = "LFM: a whole training step"
    method = "LFM"
    network = ThreeHeads
    ops = ("logit_divergence",)

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        first, second = sequences.lfm.schedule(EPOCH) if regulated else (1.0, 0.0)

        def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
            a, v = model.features(i.audio, i.visual)
            logits = _logits(model, a, v)
            p, q = (z.log_softmax(1) for z in logits[1:])
            mean = torch.logaddexp(p, q) - torch.tensor(2.0, dtype=p.dtype).log()
            gap = (mean.exp() * (mean - (p + q) / 2)).sum(1).mean()
            loss = 2 * (first * F.cross_entropy(logits[0], i.labels) + second * gap)
            return [a, v], logits, loss

        return stepped(i, [grad for _, grad in backward(i, forward).named_gradients()])

    def plain(self, i: TrainingInputs) -> None:
        def losses(model: AudioVisual) -> list[Tensor]:
            joint = _logits(model, *model.features(i.audio, i.visual))[0]
            return [2 * F.cross_entropy(joint, i.labels)]

        take_step(i, losses)

    def official(self, i: TrainingInputs) -> None:
        sequences.lfm.step(i.model, i.optimizer, i.audio, i.visual, i.labels, epoch=EPOCH)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        def start() -> mmfuse.LFM:
            made = mmfuse.LFM.official(backend=backend).to(i.device)
            made.set_epoch(EPOCH)
            return made

        method = i.cached(("LFM", backend), start)
        i.optimizer.zero_grad()
        logits = _logits(i.model, *i.model.features(i.audio, i.visual))
        out = method({"audio": logits[1], "visual": logits[2]}, i.labels)
        out.loss.backward()
        i.optimizer.step()
