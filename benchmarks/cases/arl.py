"""ARL: its own part of a step, and a whole training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from engine import sequences
from engine.case import Case, register
from engine.gate import as_vector, close
from engine.inputs import LogitsInputs
from engine.networks import AudioVisual
from engine.training import TrainingInputs
from engine.training_case import TrainingCase
from engine.training_gate import backward, stepped
from engine.workloads import Workload
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

#: The weights of the step before, for audio and visual.
WEIGHTS = (0.2, 0.8)
GAMMA, CLIP = sequences.arl.GAMMA, sequences.arl.CLIP
#: The first epoch in which gradients are scaled.
EPOCH = sequences.arl.START + 1


class FeatureLogits(LogitsInputs):
    """Two features of 512 values, and the logits of each alone."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, 512)
        del self.logits[2:]
        self.features = [self._randn(shape, 1.0).requires_grad_() for _ in self.logits]
        self.arriving = [self._randn(shape, 1.0) for _ in self.logits]

    def gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        """The gradients of the features, below the operations on them."""
        return list(torch.autograd.grad(outputs, self.features, self.arriving))


class Decided(NamedTuple):
    """The results of a step, whose gradients are those of the weights before it."""

    gradients: list[Tensor]
    weights: Tensor


def _weights(logits: list[Tensor]) -> Tensor:
    """[2] w_m."""
    z = torch.stack(logits)
    log_p = z.log_softmax(2)
    v, h = z.abs().sum(2).mean(1), -(log_p.exp() * log_p).sum(2).mean(1)
    v, h = v / v.sum(), (h / h.sum()).clamp(min=sequences.arl.LEAST)
    u = (1 / h) / (1 / h).sum()
    return torch.softmax(sequences.arl.TEMPERATURE * v.flip(0) * u, 0)


@register
class Step(Case):
    """The path from unimodal logits to the features' gradients, in the first regulated step."""

    name = "arl_step"
    title = "ARL: weights, and gradients of the features"
    kind = "logits"
    ops = ("sample_scores", "scale_grad_backward")
    autograd = True
    # The released means are of the logits' dtype, and small differences decide.
    half = False
    make = staticmethod(FeatureLogits)

    def check(self, provider: str, i: FeatureLogits, result: Decided) -> None:
        exact = _weights([z.double() for z in i.logits])
        close("weights", as_vector(result.weights, i.device), exact, 1e-4)
        for got, grad in zip(result.gradients, i.arriving, strict=True):
            close("gradient of a feature", got, 1.5 * grad.double(), 1e-6)

    def official(self, i: FeatureLogits) -> Decided:
        half = torch.tensor(0.5, device=i.device)
        outputs = [sequences.arl.scaled(f, half) for f in i.features]
        sizes = sequences.arl.shares(*map(sequences.arl.magnitude, i.logits))
        spreads = sequences.arl.shares(*map(sequences.arl.entropy, i.logits))
        u = sequences.arl.shares(*(1 / max(h, sequences.arl.LEAST) for h in spreads))
        ahead = torch.tensor([sizes[1] * u[0], sizes[0] * u[1]])
        weights = F.softmax(ahead * sequences.arl.TEMPERATURE, dim=0)
        return Decided(i.gradients(outputs), weights)

    def foreach(self, i: FeatureLogits) -> Decided:
        with torch.no_grad():
            weights = _weights(i.logits)
        outputs = [f.view_as(f) for f in i.features]
        for f in outputs:
            f.register_hook(lambda grad: 1.5 * grad)
        return Decided(i.gradients(outputs), weights)

    def mmfuse(self, i: FeatureLogits, backend: str) -> Decided:
        made = i.cached(("ARL", backend), lambda: mmfuse.ARL.official(starts=0, backend=backend))
        made.weights.fill_(0.5)  # as before a first step
        out = made(dict(zip("av", i.features, strict=True)), dict(zip("av", i.logits, strict=True)))
        return Decided(i.gradients(list(out.features.values())), out.weights)


def _unimodal(model: AudioVisual, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of the whole head, with zeros for the other feature."""
    out_a = model.fc(torch.cat([a, torch.zeros_like(v)], 1))
    return out_a, model.fc(torch.cat([torch.zeros_like(a), v], 1))


def _loss(model: AudioVisual, a: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    own = sum(F.cross_entropy(z, labels) for z in _unimodal(model, a, v))
    return F.cross_entropy(model.fc(torch.cat([a, v], 1)), labels) + GAMMA * own


def _clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)


def _hook(weight: float) -> Callable[[Tensor], Tensor]:
    return lambda grad: (1 + weight) * grad


@register
class Training(TrainingCase):
    """A step of the later release, with the weights of a step before it.

    `plain` has the same losses and the same clipping. Unimodal logits are those of the whole head,
    as released, and mmfuse makes them once more, without gradients, to decide from.
    """

    name = "arl_training"
    title = "ARL: a whole training step"
    method = "ARL"
    ops = ("sample_scores", "scale_grad_backward")

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
            features = model.features(i.audio, i.visual)
            for feature, weight in zip(features, WEIGHTS, strict=True) if regulated else ():
                feature.register_hook(_hook(weight))
            return list(features), [], _loss(model, *features, i.labels)

        seen = backward(i, forward)
        _clip(seen.model)
        return stepped(i, [grad for _, grad in seen.named_gradients()])

    def plain(self, i: TrainingInputs) -> None:
        i.optimizer.zero_grad()
        _loss(i.model, *i.model.features(i.audio, i.visual), i.labels).backward()
        _clip(i.model)
        i.optimizer.step()

    def official(self, i: TrainingInputs) -> None:
        training = sequences.arl.Training(i.model, i.optimizer)
        training.weights = list(WEIGHTS)
        training.step(i.audio, i.visual, i.labels)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        def start() -> tuple[mmfuse.ARL, Tensor]:
            made = mmfuse.ARL.official(backend=backend).to(i.device)
            made.set_epoch(EPOCH)
            return made, torch.tensor(WEIGHTS, dtype=torch.float64, device=i.device)

        method, weights = i.cached(("ARL", backend), start)
        method.weights.copy_(weights)
        i.optimizer.zero_grad()
        a, v = i.model.features(i.audio, i.visual)
        with torch.no_grad():
            logits = dict(zip(("audio", "visual"), _unimodal(i.model, a, v), strict=True))
        out = method({"audio": a, "visual": v}, logits, i.labels)
        _loss(i.model, *out.features.values(), i.labels).backward()
        _clip(i.model)
        i.optimizer.step()
