"""AGM: a whole training step."""

from __future__ import annotations

import math

import torch
from engine import sequences
from engine.case import register
from engine.inputs import ALPHA
from engine.networks import AudioVisual
from engine.training import TrainingInputs
from engine.training_case import TrainingCase
from engine.training_gate import backward, stepped
from torch import Tensor
from torch.nn import functional as F

import mmfuse


def _outputs(model: AudioVisual, i: TrainingInputs) -> list[Tensor]:
    """The joint logits of both modalities in training mode, then of each alone in evaluation's."""
    found = [model(i.audio, i.visual)[-1]]
    model.eval()
    found += [
        model(i.audio, torch.zeros_like(i.visual))[-1],
        model(torch.zeros_like(i.audio), i.visual)[-1],
    ]
    model.train()
    return found


def _responses(model: AudioVisual, i: TrainingInputs) -> list[Tensor]:
    both, a, v = _outputs(model, i)
    return [(both + a - v) / 2, (both + v - a) / 2]


@register
class Training(TrainingCase):
    """The first step of a run, in which what is usual is 1.

    `plain` has the same forward passes and loss. The release goes through the network once more,
    with neither modality, for outputs that it does not use. No gradient is clipped in this step.
    """

    name = "agm_training"
    title = "AGM: a whole training step"
    method = "AGM"
    ops = ("modality_scores", "sample_scores", "scale_grad_backward")

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
            found = _responses(model, i)
            if regulated:
                losses = torch.stack(
                    [F.cross_entropy(r.detach().double(), i.labels) for r in found]
                )
                factors = torch.exp(ALPHA * (1 - torch.exp(losses.flip(0) - losses)))
                for r, k in zip(found, factors.tolist(), strict=True):
                    r.register_hook(lambda grad, k=k: grad * k)
            return [], found, F.cross_entropy(sum(found), i.labels)

        return stepped(i, [grad for _, grad in backward(i, forward).named_gradients()])

    def plain(self, i: TrainingInputs) -> None:
        i.optimizer.zero_grad()
        F.cross_entropy(sum(_responses(i.model, i)), i.labels).backward()
        i.optimizer.step()

    def official(self, i: TrainingInputs) -> None:
        script = sequences.agm.TWO._replace(clip=math.inf)
        training = sequences.agm.Training(i.model, i.optimizer, alpha=ALPHA, script=script)
        training.step(i.audio, i.visual, i.labels)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        def start() -> mmfuse.AGM:
            made = mmfuse.AGM.official(ALPHA, None, backend=backend).to(i.device)
            made.set_epoch(0)
            return made

        method = i.cached(("AGM", backend), start)
        method.reset_parameters()  # for a first step again
        i.optimizer.zero_grad()
        inputs = {"audio": i.audio, "visual": i.visual}
        responses = mmfuse.shapley_responses(i.model, inputs, output=lambda out: out[-1])
        out = method(responses, i.labels)
        F.cross_entropy(sum(out.logits.values()), i.labels).backward()
        i.optimizer.step()
