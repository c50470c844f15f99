"""ARL (ICCV 2025): shicaiwei123/ICCV2025-ARL at 51a9de3 and, as first released, at adfc58c.

Each modality's logits are the joint head's for its feature beside zeros. Magnitudes and entropies
are read on the host, where the weights are computed from them. The later release assigns a step's
weights after its forward pass, so that the next one uses them; the first one, of July 2025, never
does: its weights stay at one half. The accuracy in validation, which has to be above 0 from the
second epoch on, is left out.

As first released the script stops: its main raises an error after the first line, and the function
for the backward pass multiplies a tuple by a tensor. That function is the later one's here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .networks import Network

#: Gradients are scaled after this epoch.
START = 5
#: How far weights are apart, the weight of the unimodal losses, and the gradients' largest norm.
TEMPERATURE, GAMMA, CLIP = 8.0, 4.0, 40.0
#: The least share of the entropies' sum.
LEAST = 0.3


class _Larger(torch.autograd.Function):
    """The gradient is added to itself, times the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (weight,) = ctx.saved_tensors
        return grad + grad * weight, torch.tensor(1.0)


def scaled(feature: Tensor, weight: Tensor) -> Tensor:
    """The feature, whose gradient becomes 1 + weight times as large."""
    return _Larger.apply(feature, weight)


class Step(NamedTuple):
    """Results of a step; pairs are audio, visual."""

    #: The step's loss, then the joint one, audio's and visual's.
    losses: tuple[Tensor, Tensor, Tensor, Tensor]
    magnitudes: list[float]
    entropies: list[float]
    certainties: list[float]
    #: The weights of this step's logits; 0 until they are used.
    computed: list[float]
    #: The weights that the backward pass has used; 0 where nothing is scaled.
    applied: list[float]
    unimodal_weight: float


def zero_padded(model: Network, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Each modality's logits: the whole head, with zeros in the place of the other feature."""
    out_a = model.fc(torch.cat((a, torch.zeros_like(v)), dim=1))
    out_v = model.fc(torch.cat((torch.zeros_like(a), v), dim=1))
    return out_a, out_v


def magnitude(logits: Tensor) -> float:
    """The mean of the absolute values, summed over the classes; read on the host."""
    return torch.mean(torch.abs(logits), 0).sum().cpu().detach().numpy().item()


def entropy(logits: Tensor) -> float:
    """The mean entropy of the softmax; read on the host."""
    p = torch.softmax(logits, dim=1)
    return torch.sum(-p * torch.log(p + 1e-16), dim=1).mean().cpu().detach().numpy().item()


def shares(first: float, second: float) -> list[float]:
    """Both as shares of their sum."""
    return [first / (first + second), second / (first + second)]


class Training:
    """A training run.

    Args:
        model: The network.
        optimizer: Of its parameters.
        assigns: True if weights are assigned, as in the later release.
        temperature: How far they are apart.
        gamma: The weight of the unimodal losses after the first epochs.
    """

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        *,
        assigns: bool = True,
        temperature: float = TEMPERATURE,
        gamma: float = GAMMA,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.assigns, self.temperature, self.gamma = assigns, temperature, gamma
        self.weights: list[Tensor | float] = [0.5, 0.5]

    def step(
        self, audio: Tensor, visual: Tensor, labels: Tensor, *, epoch: int = START + 1
    ) -> Step:
        """A training step.

        Args:
            audio: Input of the first encoder.
            visual: Input of the second one.
            labels: Class indices [B].
            epoch: Counted from 0.
        """
        model, acts = self.model, epoch > START
        self.optimizer.zero_grad()
        features = model.features(audio, visual)
        applied = [float(w) if acts else 0.0 for w in self.weights]
        if acts:
            features = tuple(
                scaled(f, torch.as_tensor(w, dtype=f.dtype).to(f.device))
                for f, w in zip(features, self.weights, strict=True)
            )
        a, v = features
        out_a, out_v = zero_padded(model, a, v)
        out = model.fc(torch.cat((a, v), dim=1))
        loss_v, loss_a, loss_f = (F.cross_entropy(z, labels) for z in (out_v, out_a, out))
        sizes = shares(magnitude(out_a), magnitude(out_v))
        entropies = [max(h, LEAST) for h in shares(entropy(out_a), entropy(out_v))]
        certainties = shares(*(1 / h for h in entropies))
        computed, gamma = [0.0, 0.0], 1.0
        if acts:
            ahead = [sizes[1] * certainties[0], sizes[0] * certainties[1]]
            weights = F.softmax(torch.tensor(ahead, dtype=a.dtype) * self.temperature, dim=0)
            computed, gamma = weights.tolist(), self.gamma
            if self.assigns:
                self.weights = list(weights)
        elif self.assigns:
            self.weights = [0.5, 0.5]
        loss = loss_f + (loss_a + loss_v) * gamma
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=CLIP, norm_type=2)
        self.optimizer.step()
        for each in (loss, loss_a, loss_v):
            each.item()
        losses = (loss, loss_f, loss_a, loss_v)
        return Step(losses, sizes, entropies, certainties, computed, applied, gamma)
