"""MCR: a whole training step, with the released code's 32 permutations."""

from __future__ import annotations

import torch
from engine import sequences
from engine.case import register
from engine.networks import AudioVisual
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, take_step
from engine.training_gate import backward, split_logits, stepped
from torch import Tensor
from torch.nn import functional as F

import mmfuse

# Of the play; so strong that it shows in a step.
STRENGTH = 1.0
PERMUTATIONS = sequences.mcr.PERMUTATIONS


def _orders(i: TrainingInputs) -> list[Tensor]:
    """The permutations of MCR's first step, [P, B] for each modality."""
    rows, first = len(i.labels), mmfuse.NoiseStream.from_state(i.state)
    return [
        first.uniform(rows * PERMUTATIONS, m).view(PERMUTATIONS, rows).argsort(1) for m in range(2)
    ]


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.log_softmax(1), b.log_softmax(1)
    mean = torch.logaddexp(p, q) - torch.tensor(2.0, dtype=p.dtype).log()
    return ((p.exp() * (p - mean) + q.exp() * (q - mean)) / 2).sum(1).mean()


@register
class Training(TrainingCase):
    """Without the contrast, whose pairs the released library looks up in a way of its own."""

    name = "mcr_training"
    title = "MCR: a whole training step"
    method = "MCR"
    ops = ("logit_divergence",)

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        orders = _orders(i)

        def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
            a, v, out = model(i.audio, i.visual)
            own = split_logits(model, a, v)
            loss = sum(F.cross_entropy(z, i.labels) for z in (out, *own))
            for m, order in enumerate(orders if regulated else ()):
                mine, other = own[m], own[1 - m]
                joint = torch.cat([(mine + other).detach()] * PERMUTATIONS)
                moved, still = mine[order].flatten(0, 1), torch.cat([other] * PERMUTATIONS)
                for sign, pair in ((-1, (moved, still.detach())), (1, (moved.detach(), still))):
                    loss = loss + sign * STRENGTH * _divergence(sum(pair), joint)
            return [a, v], [out, *own], loss

        return stepped(i, [grad for _, grad in backward(i, forward).named_gradients()])

    def plain(self, i: TrainingInputs) -> None:
        def losses(model: AudioVisual) -> list[Tensor]:
            a, v, out = model(i.audio, i.visual)
            return [F.cross_entropy(z, i.labels) for z in (out, *split_logits(model, a, v))]

        take_step(i, losses)

    def official(self, i: TrainingInputs) -> None:
        sequences.mcr.step(
            i.model,
            i.optimizer,
            i.audio,
            i.visual,
            i.labels,
            orders=_orders(i),
            strength=STRENGTH,
            contrast=0.0,
        )

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        def start() -> mmfuse.MCR:
            made = mmfuse.MCR.official(STRENGTH, contrast=0.0, stream=i.stream, backend=backend)
            return made.to(i.device)

        method = i.cached(("MCR", backend), start)
        i.optimizer.zero_grad()
        a, v, out = i.model(i.audio, i.visual)
        features, own = {"audio": a, "visual": v}, split_logits(i.model, a, v)
        seen = method(features, dict(zip(features, own, strict=True)), i.labels)
        sum([*(F.cross_entropy(z, i.labels) for z in (out, *own)), seen.loss]).backward()
        i.optimizer.step()
