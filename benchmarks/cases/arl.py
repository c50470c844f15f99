"""ARL: a whole training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from engine import sequences
from engine.case import register
from engine.networks import AudioVisual
from engine.training import TrainingInputs
from engine.training_case import TrainingCase
from engine.training_gate import backward, stepped
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

#: Of the step before, for audio and visual.
WEIGHTS = (0.2, 0.8)
GAMMA, CLIP = sequences.arl.GAMMA, sequences.arl.CLIP
#: The first epoch in which gradients are scaled.
EPOCH = sequences.arl.START + 1


def _unimodal(model: AudioVisual, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """From the whole head, with zeros for the other feature."""
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
