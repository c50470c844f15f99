"""MCR: its own part, and a whole training step, with the released code's 32 permutations."""

from __future__ import annotations

import math

import torch
from engine import sequences
from engine.case import Case, register
from engine.gate import close
from engine.inputs import SEED, Inputs
from engine.networks import AudioVisual
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, take_step
from engine.training_gate import backward, split_logits, stepped
from engine.workloads import Workload
from torch import Tensor
from torch.nn import functional as F

import mmfuse

# The weight of the play; so strong that it shows in a step.
STRENGTH = 1.0
PERMUTATIONS = sequences.mcr.PERMUTATIONS


class Play(Inputs):
    """Two modalities' logits, and the permutations that a first step of MCR's draws."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.classes)
        self.labels = torch.zeros(workload.batch, dtype=torch.int64, device=device)
        self.logits = [self._randn(shape, 1.0).requires_grad_() for _ in range(2)]
        self.features = {name: self._randn((workload.batch, 1), 1.0) for name in "av"}
        self.stream = mmfuse.NoiseStream(SEED, device)
        self.state = self.stream.state.clone()
        self.orders = _orders(self)

    def restore(self, *, replaced: bool = False) -> None:
        self.stream.state.copy_(self.state)


@register
class Step(Case):
    """The path from logits to their gradients, by the play alone: no contrast.

    Every provider draws permutations as it does, and the others than mmfuse then take those that
    mmfuse draws, so that all compute the same.
    """

    name = "mcr_step"
    title = "MCR: the play, and gradients of the logits"
    kind = "play"
    ops = ("logit_divergence",)
    autograd = True
    half = False
    workloads = (Workload("play", "two logits 64×6, 32 permutations", "play"),)
    make = staticmethod(Play)

    def check(self, provider: str, i: Play, result: list[Tensor]) -> None:
        logits = [z.detach().double().requires_grad_() for z in i.logits]
        loss = torch.zeros((), dtype=torch.float64, device=i.device)
        for m, order in enumerate(i.orders):
            mine, other = logits[m], logits[1 - m]
            joint = torch.cat([(mine + other).detach()] * PERMUTATIONS)
            moved, still = mine[order].flatten(0, 1), torch.cat([other] * PERMUTATIONS)
            for sign, pair in ((-1, (moved, still.detach())), (1, (moved.detach(), still))):
                loss = loss + sign * STRENGTH * _divergence(sum(pair), joint)
        for got, want in zip(result, torch.autograd.grad(loss, logits), strict=True):
            # Sums over permutations in which terms of both signs meet.
            close("gradient of logits", got, want, 1e-4, 1e-4 * float(want.abs().max()))

    def official(self, i: Play) -> list[Tensor]:
        sequences.mcr.permutations(len(i.labels))
        _, play = sequences.mcr.play(*i.logits, i.orders, "greedy")
        return list(torch.autograd.grad(STRENGTH * play, i.logits))

    def foreach(self, i: Play) -> list[Tensor]:
        shape = (2, PERMUTATIONS, len(i.labels))
        torch.rand(shape, device=i.device).argsort(2)
        a, v = i.logits
        # The gradient of the modality that has not moved changes its sign.
        against_a, against_v = 2 * a.detach() - a, 2 * v.detach() - v
        moved = torch.stack([a[i.orders[0]] + against_v, v[i.orders[1]] + against_a])
        log_p = moved.log_softmax(3)
        log_q = (a + v).detach().log_softmax(1)
        log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
        each = log_p.exp() * (log_p - log_mean) + log_q.exp() * (log_q - log_mean)
        loss = -STRENGTH / 2 * each.sum() / (PERMUTATIONS * len(i.labels))
        return list(torch.autograd.grad(loss, i.logits))

    def mmfuse(self, i: Play, backend: str) -> list[Tensor]:
        def start() -> mmfuse.MCR:
            made = mmfuse.MCR.official(STRENGTH, contrast=0.0, stream=i.stream, backend=backend)
            return made.to(i.device)

        method = i.cached(("MCR", backend), start)
        seen = method(i.features, dict(zip("av", i.logits, strict=True)))
        return list(torch.autograd.grad(seen.loss, i.logits))


def _orders(i: TrainingInputs | Play) -> list[Tensor]:
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
    """A step without the contrast, whose pairs the released library looks up in its own way."""

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
