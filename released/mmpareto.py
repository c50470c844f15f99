"""MMPareto (ICML 2024): GeWu-Lab/MMPareto_ICML2024 at a339db3.

Four backward passes: one of each loss, whose gradients are copied twice, tensor by tensor and as
one row, and one of the sum of the losses, of which the encoders keep the norms alone. The solver
adds up its products on the host, tensor by tensor, and over the row as well, so that each counts
twice, which the weights do not show. Without a conflict an encoder's gradient is 1.5 times the
plain one. A scheduler of the learning rate is made and never asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .networks import Network, own_heads

MODALITIES = ("audio", "visual")
#: How much longer the combined gradient is made.
GAMMA = 1.5
#: The bound below which the squared norm of the solver's point must be.
BOUND = 1e8

#: One encoder's: name of a tensor → its gradient, and "concat" → all of them as one row.
Gradients = Mapping[str, Tensor]
#: The weights of the joint gradient and of the unimodal one.
Weights = tuple[float, float]


class Step(NamedTuple):
    """Results of a step; dictionaries go by modality, losses are joint, audio, visual."""

    losses: tuple[Tensor, Tensor, Tensor]
    joint: Mapping[str, Gradients]
    unimodal: Mapping[str, Gradients]
    cosines: Mapping[str, Tensor]
    weights: Mapping[str, Weights]


def encoder_parameters(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Each encoder's, found by their names."""
    named = [(name, p) for name, p in model.named_parameters() if "head" not in name]
    return {modality: [(n, p) for n, p in named if modality in n] for modality in MODALITIES}


def gradients(
    optimizer: torch.optim.Optimizer,
    records: Mapping[str, Sequence[tuple[str, nn.Parameter]]],
    loss: Tensor,
    seen: Sequence[str] = MODALITIES,
) -> dict[str, Gradients]:
    """Copies of what a backward pass of this loss alone leaves in the encoders that it reaches."""
    loss.backward(retain_graph=True)
    kept = {}
    for modality in seen:
        rows = {name: p.grad.data.clone() for name, p in records[modality]}
        rows["concat"] = torch.cat([row.flatten() for row in rows.values()])
        kept[modality] = rows
    optimizer.zero_grad()
    return kept


def product(x: Gradients, y: Gradients) -> Tensor:
    """Twice the inner product: of the tensors, and of the row that holds them once more."""
    total = torch.zeros((), dtype=x["concat"].dtype)
    for name in x:
        total += torch.mul(x[name], y[name]).sum().data.cpu()
    return total


def min_norm_weights(joint: Gradients, unimodal: Gradients) -> Weights:
    """The weights of the shortest vector between the two, from products on the host.

    Raises:
        ArithmeticError: it is not shorter than the release can tell, or not a number; the release
            stops there as well, with a variable that was never set.
    """
    between = product(joint, unimodal)
    n_joint, n_unimodal = product(joint, joint), product(unimodal, unimodal)
    if between >= n_joint:
        share, square = torch.tensor(0.999, dtype=torch.float64), n_joint
    elif between >= n_unimodal:
        share, square = torch.tensor(0.001, dtype=torch.float64), n_unimodal
    else:
        share = (n_unimodal - between) / (n_joint + n_unimodal - 2 * between)
        square = n_unimodal + share * (between - n_unimodal)
    if not square < BOUND:
        raise ArithmeticError(f"the shortest vector's squared norm is {square.item()}")
    return share.item(), (1 - share).item()


def weigh(joint: Gradients, unimodal: Gradients) -> tuple[Tensor, Weights]:
    """Cosine of an encoder's two gradients, and what each of them weighs."""
    cosine = F.cosine_similarity(joint["concat"], unimodal["concat"], dim=0)
    return cosine, (0.5, 0.5) if cosine > 0 else min_norm_weights(joint, unimodal)


def backward_of_the_sum(losses: Sequence[Tensor]) -> None:
    """The pass whose gradients the heads keep."""
    sum(losses).backward()


def combine(p: Tensor, joint: Tensor, unimodal: Tensor, weights: Weights) -> None:
    """A tensor's combined gradient, not shorter than the plain one, and then made longer."""
    plain = torch.norm(p.grad.data.clone())
    combined = 2 * weights[0] * joint + 2 * weights[1] * unimodal
    ratio = plain / torch.norm(combined)
    p.grad = ratio * combined * GAMMA if ratio > 1 else combined * GAMMA


class Training:
    """A training run; `start_epoch` and steps, again and again.

    Args:
        model: The network, with a head of its own for each modality.
        optimizer: Of its parameters.
    """

    def __init__(self, model: Network, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def start_epoch(self) -> None:
        """Looks for the encoders' parameters."""
        self.records = encoder_parameters(self.model)

    def step(self, audio: Tensor, visual: Tensor, labels: Tensor) -> Step:
        """A training step."""
        model = self.model
        self.optimizer.zero_grad()
        a, v, out = model(audio, visual)
        logits = (out, *own_heads(model, a, v))
        losses = tuple(F.cross_entropy(z, labels) for z in logits)
        joint = gradients(self.optimizer, self.records, losses[0])
        unimodal = {}
        for modality, loss in zip(MODALITIES, losses[1:], strict=True):
            unimodal.update(gradients(self.optimizer, self.records, loss, (modality,)))
        weighed = {m: weigh(joint[m], unimodal[m]) for m in MODALITIES}
        cosines = {m: cosine for m, (cosine, _) in weighed.items()}
        weights = {m: found for m, (_, found) in weighed.items()}

        backward_of_the_sum(losses)
        for name, p in model.named_parameters():
            if p.grad is None:
                continue
            layer = re.split("[_.]", name)
            if "head" in layer:
                continue
            for m in MODALITIES:
                if m in layer:
                    combine(p, joint[m][name], unimodal[m][name], weights[m])
        self.optimizer.step()
        return Step(losses, joint, unimodal, cosines, weights)
