"""InfoReg (CVPR 2025): GeWu-Lab/InfoReg_CVPR2025 at 939b2ed (November) and b7524f8 (March).

Six backward passes, of which three are for a log; autograd stays on in the update, and the scores,
sums over the batch, are not detached. The window goes by audio's trace alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .networks import Network, halves, own_heads
from .ogm import Logits, batch_scores

MODALITIES = ("audio", "visual")
#: Epochs that a trace is averaged over; as many zeros come before the first one.
HISTORY = 10
#: The factors of the strength of the pull.
MULTIPLIER_AUDIO, MULTIPLIER_VISUAL = 0.95, 0.1


class Release(NamedTuple):
    """The differences between the two releases.

    Attributes:
        threshold: Of the window.
        own_logits: The source of each modality's logits.
        pulls_visual: In March the second branch asks what the first one has asked.
    """

    threshold: float
    own_logits: Logits
    pulls_visual: bool


NOVEMBER = Release(0.05, halves, True)
MARCH = Release(0.04, own_heads, False)


class Step(NamedTuple):
    """Results of a step; pairs are audio, visual."""

    losses: tuple[Tensor, Tensor, Tensor]
    scores: list[Tensor]
    strengths: tuple[Tensor | float, Tensor | float]


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose Fisher information is kept."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            yield name, module


class Epoch:
    """The values that this release and RedReg's keep during an epoch."""

    def __init__(self, model: nn.Module) -> None:
        self.start = copy.deepcopy(model)
        named = list(model.named_parameters())
        self.records = {
            modality: [(name, p) for name, p in named if "head" not in name and modality in name]
            for modality in MODALITIES
        }
        self.fisher = self._zeros(model)
        self.fisher_of_parts = self._zeros(model)
        self.norms = dict.fromkeys(MODALITIES, 0.0)
        self.counts = dict.fromkeys(MODALITIES, 0)

    @staticmethod
    def _zeros(model: nn.Module) -> dict[str, Tensor]:
        return {name: torch.zeros_like(module.weight) for name, module in layers(model)}

    def traces(self) -> dict[str, float]:
        """The trace of each encoder's Fisher information: the sum of its layers' means."""
        return {
            modality: sum(
                total.mean().item()
                for name, total in self.fisher_of_parts.items()
                if "head" not in name and modality in name
            )
            for modality in MODALITIES
        }


def log_gradients(
    optimizer: torch.optim.Optimizer, epoch: Epoch, losses: Sequence[Tensor]
) -> list[tuple[dict[str, Tensor], float]]:
    """A backward pass of each loss, of which only the mean gradients are logged.

    The copies are returned, because the released code keeps them until the next step.
    """
    kept = []
    for loss, seen in zip(losses, (MODALITIES, ("audio",), ("visual",)), strict=True):
        loss.backward(retain_graph=True)
        for modality in seen:
            rows = {name: p.grad.data.clone() for name, p in epoch.records[modality]}
            rows["concat"] = torch.cat([row.flatten() for row in rows.values()])
            kept.append((rows, torch.mean(rows["concat"]).item()))
        optimizer.zero_grad()
    return kept


def backward_thrice(loss: Tensor, loss_a: Tensor, loss_v: Tensor) -> None:
    """The gradient that is used: of the sum of the losses."""
    loss_v.backward(retain_graph=True)
    loss_a.backward(retain_graph=True)
    loss.backward()


def belongs(parameter: Tensor, encoder: nn.Module) -> bool:
    """True if it is one of the encoder's parameters, found by going through all of them."""
    return any(parameter is other for other in encoder.parameters())


def accumulate_squares(total: Tensor, grad: Tensor) -> None:
    """The Fisher information's diagonal, as large as the weights."""
    total += grad * grad


def log_fisher_and_norms(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: Epoch) -> None:
    """Both accumulators, the model's and its parts', and the norms of the convolutions."""
    for sums in (epoch.fisher, epoch.fisher_of_parts):
        for name, module in layers(model):
            accumulate_squares(sums[name], module.weight.grad)
            sums[name].detach_()
    rate = optimizer.param_groups[0]["lr"]
    for name, p in model.named_parameters():
        for modality in MODALITIES:
            if modality in name.split(".")[0] and p.grad.dim() == 4:
                epoch.norms[modality] += rate * torch.sum(p.grad**2).item()
                epoch.counts[modality] += 1


def growth(traces: Sequence[float]) -> float:
    """The window's criterion: the growth of the mean of the last traces in an epoch."""
    now = sum(traces[-HISTORY:]) / HISTORY
    before = sum(traces[-HISTORY - 1 : -1]) / HISTORY
    return (now - before) / now


def strengths(
    score_a: Tensor, score_v: Tensor, growth: float, release: Release = NOVEMBER
) -> tuple[Tensor | float, Tensor | float]:
    """The strengths of the pull on audio and on visual."""
    alpha_a = alpha_v = 0
    if score_a > score_v and growth > release.threshold:
        alpha_a = MULTIPLIER_AUDIO * torch.exp(torch.tanh(score_a - score_v))
    elif (
        score_a < score_v if release.pulls_visual else score_a > score_v
    ) and growth > release.threshold:
        alpha_v = MULTIPLIER_VISUAL * torch.exp(torch.tanh(score_v - score_a))
    return alpha_a, alpha_v


def pull(p: Tensor, anchor: Tensor, alpha: Tensor | float) -> None:
    """Adds the displacement since the epoch began to a parameter's gradient."""
    p.grad += alpha * (p - anchor)


class Training:
    """A training run; `start_epoch`, steps and `end_epoch`, again and again.

    Args:
        model: The network.
        optimizer: Of its parameters.
        release: `NOVEMBER` or `MARCH`.
    """

    def __init__(
        self, model: Network, optimizer: torch.optim.Optimizer, release: Release = NOVEMBER
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.release = release
        self.epochs = 0
        self.traces: Mapping[str, list[float]] = {m: [0.0] * HISTORY for m in MODALITIES}

    def start_epoch(self) -> None:
        """Copies the network."""
        self.epoch = Epoch(self.model)
        self.growth = growth(self.traces["audio"]) if self.epochs else 1.0

    def step(self, audio: Tensor, visual: Tensor, labels: Tensor) -> Step:
        """A training step."""
        model = self.model
        self.optimizer.zero_grad()
        a, v, out = model(audio, visual)
        out_a, out_v = self.release.own_logits(model, a, v)
        loss, loss_v, loss_a = (F.cross_entropy(z, labels) for z in (out, out_v, out_a))
        kept = log_gradients(self.optimizer, self.epoch, (loss, loss_a, loss_v))
        backward_thrice(loss, loss_a, loss_v)

        score_v, score_a = batch_scores([out_v, out_a], labels)
        alpha_a, alpha_v = strengths(score_a, score_v, self.growth, self.release)
        for p, anchor in zip(model.parameters(), self.epoch.start.parameters(), strict=True):
            if belongs(p, model.audio_net):
                pull(p, anchor, alpha_a)
            if belongs(p, model.visual_net):
                pull(p, anchor, alpha_v)
        log_fisher_and_norms(model, self.optimizer, self.epoch)
        self.optimizer.step()
        del kept
        return Step((loss, loss_a, loss_v), [score_a, score_v], (alpha_a, alpha_v))

    def end_epoch(self) -> None:
        """Keeps the traces of what the pull has left of the gradients."""
        for modality, trace in self.epoch.traces().items():
            self.traces[modality].append(trace)
        self.epochs += 1
