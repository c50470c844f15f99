"""Training as the released code of InfoReg and RedReg does it, in our own words and plain PyTorch.

Everything that reaches the parameters is kept, quirks included: sums over Python lists, host
scalars, three accumulating backward passes, a deep copy of the model for the anchors. What is only
written to a log is left out, except InfoReg's three extra backward passes, which `logging` turns on
to show that nothing else depends on them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from networks import AudioVisual
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor, Tensor]


class ThreeHeads(AudioVisual):
    """RedReg's network: a head on both features, and one of its own for each modality."""

    def __init__(self, width: int = 6, classes: int = 5) -> None:
        super().__init__(width, classes)
        self.head_audio = nn.Linear(width, classes)
        self.head_visual = nn.Linear(width, classes)


def inforeg_forward(model: AudioVisual, audio: Tensor, visual: Tensor) -> tuple[Tensor, ...]:
    """Logits of both modalities from the joint head's halves, and the joint logits."""
    a, v, out = model(audio, visual)
    half = model.fc.weight.shape[1] // 2
    out_a = a @ model.fc.weight[:, :half].t() + model.fc.bias / 2
    out_v = v @ model.fc.weight[:, half:].t() + model.fc.bias / 2
    return out_a, out_v, out


@dataclass
class InfoRegTraining:
    """The state that the released script keeps from epoch to epoch."""

    model: AudioVisual
    optimizer: torch.optim.Optimizer
    logging: bool = False
    audio_traces: list[float] = field(default_factory=lambda: [0.0] * 10)
    epoch: int = 0
    regulated: list[tuple[float, float]] = field(default_factory=list)

    def train_epoch(self, batches: Iterable[Batch]) -> None:
        model = self.model
        if self.epoch == 0:
            k = 1.0
        else:
            now = sum(self.audio_traces[-10:]) / 10
            before = sum(self.audio_traces[-11:-1]) / 10
            k = (now - before) / now
        start = copy.deepcopy(model)
        fisher = {
            name: torch.zeros_like(module.weight)
            for name, module in model.named_modules()
            if "audio_net" in name and isinstance(module, (nn.Conv2d, nn.Linear))
        }
        for audio, visual, labels in batches:
            self.optimizer.zero_grad()
            out_a, out_v, out = inforeg_forward(model, audio, visual)
            losses = [F.cross_entropy(z, labels) for z in (out, out_a, out_v)]
            if self.logging:
                for loss in losses:
                    loss.backward(retain_graph=True)
                    self.optimizer.zero_grad()
            loss, loss_a, loss_v = losses
            loss_v.backward(retain_graph=True)
            loss_a.backward(retain_graph=True)
            loss.backward()

            out_a, out_v, rows = out_a.detach(), out_v.detach(), range(len(labels))
            score_v = sum(F.softmax(out_v, dim=1)[i][labels[i]] for i in rows)
            score_a = sum(F.softmax(out_a, dim=1)[i][labels[i]] for i in rows)
            beta_a = beta_v = 0.0
            if score_a > score_v and k > 0.05:
                beta_a = float(0.95 * torch.exp(torch.tanh(score_a - score_v)))
            elif score_a < score_v and k > 0.05:
                beta_v = float(0.1 * torch.exp(torch.tanh(score_v - score_a)))
            self.regulated.append((beta_a, beta_v))
            with torch.no_grad():
                for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
                    if "audio_net" in name:
                        p.grad += beta_a * (p - q)
                    if "visual_net" in name:
                        p.grad += beta_v * (p - q)
            for name, module in model.named_modules():
                if name in fisher:
                    fisher[name] += module.weight.grad * module.weight.grad
            self.optimizer.step()
        self.audio_traces.append(sum(f.mean().item() for f in fisher.values()))
        self.epoch += 1


def draw(x: Tensor) -> Tensor:
    """`torch.randn_like`, the same numbers for every dtype."""
    return torch.randn_like(x.float()).to(x)


def growth(scores: list[float], window: int = 10) -> float:
    if len(scores) <= window:
        return 1.0
    now = sum(scores[-window:]) / window
    before = sum(scores[-window - 1 : -1]) / window
    return (now - before) / (abs(before) + 1e-12)


@dataclass
class RedRegTraining:
    """RedReg's released training. The random numbers come from PyTorch's generator."""

    model: ThreeHeads
    optimizer: torch.optim.Optimizer
    epochs: int
    epoch: int = 0
    regulated: list[tuple[float, float]] = field(default_factory=list)
    #: Redundancies and phases of every step.
    monitored: list[tuple[float, ...]] = field(default_factory=list)

    def drop_probability(self) -> float:
        length = max(1, int(self.epochs * 0.3))
        return 0.6 + (0.1 - 0.6) * min(1.0, self.epoch / length)

    def redundancy(self, encoder: nn.Module, x1: Tensor, x2: Tensor) -> float:
        was_training = encoder.training
        encoder.eval()
        with torch.no_grad():
            moved = (encoder(x1) - encoder(x2)).pow(2).mean()
            ratio = moved / ((x1 - x2).pow(2).mean() + 1e-12)
        encoder.train(was_training)
        return ratio.item()

    def train_epoch(self, batches: Iterable[Batch]) -> None:
        model = self.model
        scores_a: list[float] = []
        scores_v: list[float] = []
        average_a = average_v = 0.0
        agreement = 0.2 + 0.3 * self.epoch / max(1, self.epochs - 1)
        start = copy.deepcopy(model)
        for audio, visual, labels in batches:
            self.optimizer.zero_grad()
            p, u = self.drop_probability(), torch.rand(())
            audio_in = torch.zeros_like(audio) if u < p / 2 else audio
            visual_in = torch.zeros_like(visual) if p / 2 <= u < p else visual
            a, v, out = model(audio_in, visual_in)
            out_a, out_v = model.head_audio(a), model.head_visual(v)
            rows = torch.arange(len(labels))
            prob_a = out_a.detach().softmax(dim=1)[rows, labels].mean().item()
            prob_v = out_v.detach().softmax(dim=1)[rows, labels].mean().item()
            scores_a.append(prob_a)
            scores_v.append(prob_v)

            audios = [audio + draw(audio) * 0.03 for _ in range(2)]
            visuals = [torch.clamp(visual + draw(visual) * 0.03, 0.0, 1.0) for _ in range(2)]
            red_a = self.redundancy(model.audio_net, *audios)
            red_v = self.redundancy(model.visual_net, *visuals)
            average_a = 0.9 * average_a + 0.1 * red_a
            average_v = 0.9 * average_v + 0.1 * red_v
            phase_a = red_a / (average_a + 1e-12) - 0.6 * max(growth(scores_a), 0.0)
            phase_v = red_v / (average_v + 1e-12) - 0.6 * max(growth(scores_v), 0.0)

            self.monitored.append((red_a, red_v, phase_a, phase_v))

            beta_a = beta_v = 0.0
            if prob_a < prob_v and phase_v > 0.15:
                beta_v = math.exp(0.9 * math.tanh(prob_v - prob_a))
            elif prob_v < prob_a and phase_a > 0.15:
                beta_a = math.exp(0.9 * math.tanh(prob_a - prob_v))
            all_pairs = F.normalize(a.detach(), dim=1) @ F.normalize(v.detach(), dim=1).t()
            gate = 1.0 if all_pairs.diag().mean().item() > agreement else 0.0
            beta_a, beta_v = beta_a * gate, beta_v * gate
            self.regulated.append((beta_a, beta_v))

            F.cross_entropy(out_v, labels).backward(retain_graph=True)
            F.cross_entropy(out_a, labels).backward(retain_graph=True)
            F.cross_entropy(out, labels).backward()
            with torch.no_grad():
                for (name, w), w0 in zip(model.named_parameters(), start.parameters(), strict=True):
                    d, g = w - w0, w.grad
                    if g.abs().sum() != 0:
                        d = d - (d * g).sum() / ((g * g).sum() + 1e-12) * g
                    if "audio_net" in name:
                        w.grad = g + beta_a * d
                    if "visual_net" in name:
                        w.grad = g + beta_v * d
            self.optimizer.step()
        self.epoch += 1


def parameters(model: nn.Module) -> Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def buffers(model: nn.Module) -> Iterator[Tensor]:
    """Batch norm's statistics."""
    yield from (b for b in model.buffers() if b.is_floating_point())
