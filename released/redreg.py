"""RedReg (2025): xia-zhe/RedReg at b620a46.

InfoReg's released step with other strengths: a monitor passes two noisy views of each input through
its encoder, and the displacement loses its part along each tensor's gradient. Scores and averages
begin anew in every epoch, and the average starts at zero. Strengths are of PyTorch's default dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .inforeg import (
    MODALITIES,
    Epoch,
    backward_thrice,
    belongs,
    log_fisher_and_norms,
    log_gradients,
)
from .networks import Network, own_heads

#: The views' noise; the steps that a score's growth looks back; the redundancies' average.
SIGMA, HISTORY, DECAY = 0.03, 10, 0.9
#: How much growth counts against the redundancy, which phase is regulated, and how strongly.
GAMMA, THRESHOLD, BETA = 0.6, 0.15, 0.9
#: Cosine of the features from which on they agree, in the first epoch and in the last.
AGREEMENT = 0.2, 0.5
#: With which probability an input is dropped at first, and later, and in which share of the epochs
#: it falls.
DROP_FIRST, DROP_LAST, DROP_SHARE = 0.6, 0.1, 0.3


class Monitored(NamedTuple):
    """The monitor's findings about one modality."""

    redundancy: float
    average: float
    growth: float
    phase: float


class Step(NamedTuple):
    """Results of a step; pairs are audio, visual."""

    inputs: tuple[Tensor, Tensor]
    features: tuple[Tensor, Tensor]
    losses: tuple[Tensor, Tensor, Tensor]
    scores: Mapping[str, float]
    monitored: Mapping[str, Monitored]
    gate: float
    strengths: tuple[Tensor, Tensor]


def drop_probability(epoch: int, epochs: int) -> float:
    """The probability with which one of the inputs is dropped."""
    length = max(1, int(epochs * DROP_SHARE))
    return DROP_FIRST + (DROP_LAST - DROP_FIRST) * min(1.0, epoch / length)


def agreement_threshold(epoch: int, epochs: int) -> float:
    """The threshold of the mean cosine."""
    first, last = AGREEMENT
    return first + (last - first) * epoch / max(1, epochs - 1)


def growth_rate(scores: Sequence[float]) -> float:
    """How fast the gain grows; 1 until the window is full."""
    if len(scores) <= HISTORY:
        return 1.0
    now = sum(scores[-HISTORY:]) / HISTORY
    before = sum(scores[-HISTORY - 1 : -1]) / HISTORY
    return (now - before) / (abs(before) + 1e-12)


def all_pairs_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine of the pairs, from the product of all rows with all rows."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    return (a @ b.t()).diag().mean()


def agreement_gate(a: Tensor, b: Tensor, threshold: float) -> float:
    """True if the modalities agree, decided on the host."""
    return 1.0 if all_pairs_cosine(a, b).item() > threshold else 0.0


def noisy_view(x: Tensor, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """An input with noise."""
    noise = draw(x) * SIGMA
    return x + noise


def mean_square(x: Tensor, y: Tensor) -> Tensor:
    """How far two tensors are apart."""
    return (x - y).pow(2).mean()


def ratio(maps: Sequence[Tensor], input_sq: Tensor) -> float:
    """The redundancy of the maps of two views that are apart by `input_sq`."""
    return (mean_square(*maps) / (input_sq + 1e-12)).item()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)


def redundancies(
    model: Network,
    audio: Tensor,
    visual: Tensor,
    draw: Callable[[Tensor], Tensor] = torch.randn_like,
) -> dict[str, float]:
    """The monitor: two noisy views of each input through its encoder, those of images clamped."""
    with torch.no_grad(), evaluating(model.audio_net), evaluating(model.visual_net):
        audios = [noisy_view(audio, draw) for _ in range(2)]
        visuals = [torch.clamp(noisy_view(visual, draw), 0.0, 1.0) for _ in range(2)]
        maps_a = [model.audio_net(x) for x in audios]
        maps_v = [model.visual_net(x) for x in visuals]
        return {
            "audio": ratio(maps_a, mean_square(*audios)),
            "visual": ratio(maps_v, mean_square(*visuals)),
        }


def orthogonal(displacement: Tensor, grad: Tensor) -> Tensor:
    """The displacement without its part along the gradient."""
    if grad.abs().sum() == 0:
        return displacement
    dot = (displacement * grad).sum()
    square = (grad * grad).sum() + 1e-12
    return displacement - (dot / square) * grad


def pull(p: Tensor, displacement: Tensor, beta: Tensor | float) -> None:
    """Adds what `orthogonal` has left of a parameter's displacement to its gradient."""
    p.grad = p.grad + beta * displacement


class Training:
    """A training run; `start_epoch` and steps, again and again.

    Args:
        model: The network, with a head of its own for each modality.
        optimizer: Of its parameters.
        epochs: Of the whole run.
        threshold: Of the phase.
        uniform: Draws the number in [0, 1) that decides which input is dropped.
        noise: Draws the views' noise, like a tensor.
    """

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        *,
        threshold: float = THRESHOLD,
        uniform: Callable[[], Tensor] = lambda: torch.rand(()),
        noise: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.epochs = epochs
        self.threshold = threshold
        self.uniform = uniform
        self.noise = noise

    def start_epoch(self, epoch: int) -> None:
        """Copies the network, and forgets scores and averages."""
        self.epoch = Epoch(self.model)
        self.scores: dict[str, list[float]] = {m: [] for m in MODALITIES}
        self.averages = dict.fromkeys(MODALITIES, 0.0)
        self.drop_probability = drop_probability(epoch, self.epochs)
        self.agreement = agreement_threshold(epoch, self.epochs)

    def step(self, audio: Tensor, visual: Tensor, labels: Tensor) -> Step:
        """A training step."""
        model = self.model
        self.optimizer.zero_grad()
        inputs = self._dropped(audio, visual)
        a, v, out = model(*inputs)
        out_a, out_v = own_heads(model, a, v)
        prob = mean_probabilities(out_a, out_v, labels)
        seen = self._monitored(prob, audio, visual)
        beta = self._strengths(prob, seen, labels.device)
        with torch.no_grad():
            agree = agreement_gate(a.flatten(1), v.flatten(1), self.agreement)
        beta_a, beta_v = beta["audio"] * agree, beta["visual"] * agree

        loss, loss_v, loss_a = (F.cross_entropy(z, labels) for z in (out, out_v, out_a))
        kept = log_gradients(self.optimizer, self.epoch, (loss, loss_a, loss_v))
        backward_thrice(loss, loss_a, loss_v)
        for p, anchor in zip(model.parameters(), self.epoch.start.parameters(), strict=True):
            displacement = orthogonal(p - anchor, p.grad)
            if belongs(p, model.audio_net):
                pull(p, displacement, beta_a)
            if belongs(p, model.visual_net):
                pull(p, displacement, beta_v)
        log_fisher_and_norms(model, self.optimizer, self.epoch)
        self.optimizer.step()
        del kept
        losses = loss, loss_a, loss_v
        return Step(inputs, (a, v), losses, prob, seen, agree, (beta_a, beta_v))

    def _dropped(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs, one of which may be zeros."""
        u, p = self.uniform(), self.drop_probability
        drop_a = bool(u < p * 0.5)
        drop_v = bool((u >= p * 0.5) and (u < p))
        return (
            torch.zeros_like(audio) if drop_a else audio,
            torch.zeros_like(visual) if drop_v else visual,
        )

    def _monitored(
        self, prob: Mapping[str, float], audio: Tensor, visual: Tensor
    ) -> dict[str, Monitored]:
        seen = {}
        for name, redundancy in redundancies(self.model, audio, visual, self.noise).items():
            self.scores[name].append(prob[name])
            average = DECAY * self.averages[name] + (1 - DECAY) * redundancy
            self.averages[name] = average
            growth = growth_rate(self.scores[name])
            phase = redundancy / (average + 1e-12) - GAMMA * max(growth, 0.0)
            seen[name] = Monitored(redundancy, average, growth, phase)
        return seen

    def _strengths(
        self, prob: Mapping[str, float], seen: Mapping[str, Monitored], device: torch.device
    ) -> dict[str, Tensor]:
        beta = {name: torch.tensor(0.0, device=device) for name in prob}
        for ahead, behind in (("visual", "audio"), ("audio", "visual")):
            if prob[behind] < prob[ahead] and seen[ahead].phase > self.threshold:
                delta = torch.tensor(prob[ahead] - prob[behind], device=device).clamp_min(0.0)
                beta[ahead] = torch.exp(torch.tensor(BETA, device=device) * torch.tanh(delta))
        return beta


@torch.no_grad()
def mean_probabilities(out_a: Tensor, out_v: Tensor, labels: Tensor) -> dict[str, float]:
    """The means of the true class's probabilities, read on the host."""
    rows = torch.arange(len(labels), device=labels.device)
    return {
        "audio": F.softmax(out_a, dim=1)[rows, labels].mean().item(),
        "visual": F.softmax(out_v, dim=1)[rows, labels].mean().item(),
    }
