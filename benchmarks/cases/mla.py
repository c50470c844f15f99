"""MLA: a whole training step, of two turns."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from engine import sequences
from engine.case import register
from engine.networks import AudioVisual
from engine.training import TrainingInputs, new_optimizer
from engine.training_case import TrainingCase
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

BATCHES = 4


class Shared(AudioVisual):
    """One head for both features, each by itself."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.fc = nn.Linear(width, classes)


def _turns(
    i: TrainingInputs,
    model: Shared,
    optimizer: torch.optim.Optimizer,
    project: Callable[[Tensor], object] | None = None,
) -> None:
    """Both turns, after one forward pass."""
    optimizer.zero_grad()
    for feature in model.features(i.audio, i.visual):
        F.cross_entropy(model.fc(feature), i.labels).backward()
        if project is not None:
            project(feature)
        optimizer.step()
        optimizer.zero_grad()


@register
class Training(TrainingCase):
    """The first batch of a run: the first turn is a plain one, the second is projected."""

    name = "mla_training"
    title = "MLA: a whole training step, of two turns"
    method = "MLA"
    network = Shared
    ops = ()
    # The second turn's gradient is of a head that the first one has moved, with its errors.
    slack = 2.0

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        model = copy.deepcopy(i.model)
        model.load_state_dict(i.pristine)
        turns = []

        def project(feature: Tensor) -> None:
            turns.append(feature)
            if len(turns) < 2:
                return
            r = feature.detach().double().mean(0)
            p = torch.eye(len(r), dtype=torch.float64, device=r.device)
            p = p - torch.outer(r, r) / (0.1 + torch.outer(r, r))
            grad = model.fc.weight.grad
            grad.copy_(grad.double() @ (p / p.norm()).T)

        _turns(i, model, new_optimizer(model), project if regulated else None)
        return [p.detach().double() for p in model.parameters()]

    def plain(self, i: TrainingInputs) -> None:
        _turns(i, i.model, i.optimizer)

    def official(self, i: TrainingInputs) -> None:
        projector = sequences.mla.Projector(i.model.fc)
        sequences.mla.step(
            i.model,
            i.optimizer,
            i.audio,
            i.visual,
            i.labels,
            projector=projector,
            batch=0,
            batches=BATCHES,
        )

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        mla = i.cached(
            ("MLA", backend),
            lambda: mmfuse.MLA.official(i.model.fc, batches=BATCHES, backend=backend),
        )
        mla.reset_parameters()
        _turns(i, i.model, i.optimizer, mla.step)
