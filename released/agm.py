"""AGM (ICCV 2023): lihong2303/AGM_ICCV2023 at 5a65542.

The network goes through every set of modalities, the empty one included, whose logits nothing uses:
first all of them in training mode, then the others in evaluation mode with gradients, with zeros
for the inputs that are left out. Scores are taken sample by sample and read on the host, where the
coefficients are computed. A hook multiplies the gradient that enters each modality's response.

The script for two modalities (AV-MNIST) and that for three (UR-Funny) differ in `Script`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .networks import Network

#: The first and the last epoch that is modulated; the last coefficients stay in force after it. The
#: scripts count epochs from 1 and modulate 0 to 20; these are counted from 0, as everywhere here.
STARTS, ENDS = 0, 19


class Script(NamedTuple):
    """The settings in which the scripts differ.

    Attributes:
        floor: Probabilities below it count as it.
        cap: The most that the difference of two ratios counts.
        clip: If the last layer's gradient exceeds it, the norm of all is clipped to it.
    """

    floor: float
    cap: float
    clip: float


TWO, THREE = Script(1e-8, math.inf, 1.0), Script(0.0, 7.0, 5.0)


class Step(NamedTuple):
    """Results of a step, by modality where there are several."""

    logits: Tensor
    responses: Sequence[Tensor]
    loss: Tensor
    scores: list[float]
    ratios: list[float]
    running_ratios: list[float]
    coefficients: list[float]
    head_range: Tensor
    clipped: bool


def outputs(model: Network, inputs: Sequence[Tensor]) -> dict[frozenset[int], Tensor]:
    """The joint logits of every set of modalities."""
    count = len(inputs)
    sets = [frozenset(m for m in range(count) if n >> m & 1) for n in range(1 << count)]
    found = {}
    for there in reversed(sets):
        given = [x if m in there else torch.zeros_like(x) for m, x in enumerate(inputs)]
        found[there] = model(*given)[-1]
        if len(there) == count:
            model.eval()
    model.train()
    return found


def responses(f: dict[frozenset[int], Tensor], count: int) -> list[Tensor]:
    """Each modality's, in the scripts' form for two modalities or three."""
    every = frozenset(range(count))
    found = []
    for m in every:
        alone, without = f[frozenset({m})], f[every - {m}]
        if count == 2:
            found.append((f[every] - without + alone) / 2)
            continue
        j, k = sorted(every - {m})
        pairs = f[frozenset({m, j})] - f[frozenset({j})] + f[frozenset({m, k})] - f[frozenset({k})]
        found.append((f[every] - without + alone) / 3 + pairs / 6)
    return found


def mean_score(logits: Tensor, labels: Tensor, floor: float) -> float:
    """The mean of −log p; the softmax of all is taken anew for every sample."""
    total = torch.zeros((), dtype=logits.dtype, device=logits.device)
    for i in range(len(logits)):
        p = torch.softmax(logits, dim=1)[i][labels[i]]
        if torch.isinf(torch.log(p)) or p < floor:
            total = total - torch.log(torch.full_like(p, floor))
        else:
            total = total - torch.log(torch.softmax(logits, dim=1)[i][labels[i]])
    return (total / len(logits)).item()


def ratios(scores: Sequence[float]) -> list[float]:
    """Above 1 for a modality that is ahead."""
    count = len(scores)
    mean = sum(scores) / count
    return [math.exp((mean - score) * count / (count - 1)) for score in scores]


class Training:
    """A training run.

    Args:
        model: The network, which returns the joint logits last.
        optimizer: Of its parameters.
        alpha: How steep coefficients are.
        script: `TWO`, `THREE` or another.
        ends: The last epoch that is modulated.
    """

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        *,
        alpha: float,
        script: Script = TWO,
        ends: int = ENDS,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.alpha, self.script, self.ends = alpha, script, ends
        self.iteration = 0
        self.running: list[float] = []
        self.coefficients: list[float] = []

    def scaled(self, modality: int) -> Callable[[Tensor], Tensor]:
        """The hook of a response."""
        return lambda grad: grad * self.coefficients[modality]

    def step(
        self,
        audio: Tensor,
        visual: Tensor,
        labels: Tensor,
        *,
        text: Tensor | None = None,
        epoch: int = STARTS,
    ) -> Step:
        """A training step.

        Args:
            audio: Input of the first encoder.
            visual: Input of the second one.
            labels: Class indices [B].
            text: Input of the third one, or None for two modalities.
            epoch: Counted from 0.
        """
        inputs = [audio, visual] if text is None else [audio, visual, text]
        count, script = len(inputs), self.script
        self.running = self.running or [0.0] * count
        self.coefficients = self.coefficients or [1.0] * count
        self.optimizer.zero_grad()
        found = responses(outputs(self.model, inputs), count)
        for m, r in enumerate(found):
            r.register_hook(self.scaled(m))
        logits = sum(found)
        loss = F.cross_entropy(logits, labels)
        with torch.no_grad():
            scores = [mean_score(r, labels, script.floor) for r in found]
        now, usual = ratios(scores), ratios(self.running)
        decided = [
            math.exp(self.alpha * min(b - a, script.cap)) for a, b in zip(now, usual, strict=True)
        ]
        t = self.iteration
        self.running = [
            mean * t / (t + 1) + s / (t + 1) for mean, s in zip(self.running, scores, strict=True)
        ]
        self.iteration += 1
        if STARTS <= epoch <= self.ends:
            self.coefficients = decided
        loss.backward()
        grad = self.model.fc.weight.grad
        low, high = torch.min(grad), torch.max(grad)
        clipped = bool(high > script.clip or low < -script.clip)
        if clipped:
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=script.clip)
        self.optimizer.step()
        head_range = torch.stack([low, high])
        return Step(logits, found, loss, scores, now, usual, decided, head_range, clipped)
