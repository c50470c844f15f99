"""MLA: its own part of a turn, and a whole training step, of two turns."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from engine import sequences
from engine.case import Case, register
from engine.gate import close
from engine.inputs import Inputs
from engine.networks import AudioVisual
from engine.training import TrainingInputs, new_optimizer
from engine.training_case import TrainingCase
from engine.workloads import Workload
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

BATCHES = 4
#: The regularisation in the first batch of an epoch.
LEAST = 0.1


class Turn(Inputs):
    """A feature after a ReLU, and a head with the gradient of a turn; not a run's first turn."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        self.feature = self._randn((workload.batch, workload.width), 1.0).relu()
        self.head = nn.Linear(workload.width, workload.classes, device=device, dtype=dtype)
        self.pristine = self._randn((workload.classes, workload.width), 0.1)
        self.start = torch.eye(workload.width, dtype=dtype, device=device)
        self.projector = self.start.clone()
        self.released = sequences.mla.Projector(self.head)
        self.methods: list[mmfuse.MLA] = []
        self.restore()

    def restore(self, *, replaced: bool = False) -> None:
        self.head.weight.grad = self.pristine.clone()
        self.projector.copy_(self.start)
        self.released.matrix, self.released.turns = self.start, 1
        for method in self.methods:
            method.projector.copy_(self.start)
            method.turns.fill_(1)

    def made(self, backend: str) -> mmfuse.MLA:
        """The method in its second turn."""
        method = mmfuse.MLA.official(self.head, batches=BATCHES, backend=backend)
        self.methods.append(method)
        self.restore()
        method.set_epoch(0)
        return method


@register
class Step(Case):
    """A turn: the feature goes into P, and P is applied to the gradient of the head's weight.

    As the release has it, whose division is entry by entry.
    """

    name = "mla_step"
    title = "MLA.step"
    kind = "turn"
    half = False
    workloads = (Workload("turn", "a feature 64×512, a head of 6 classes", "turn"),)
    make = staticmethod(Turn)

    def check(self, provider: str, i: Turn, result: object) -> None:
        r = i.feature.double().mean(0)
        p = i.start.double() - torch.outer(r, r) / (LEAST + torch.outer(r, r))
        want = i.pristine.double() @ (p / p.norm()).T
        assert i.head.weight.grad is not None
        # A sum of 512 products, of which some cancel.
        size = float(want.abs().max())
        close("gradient of the head", i.head.weight.grad, want, 1e-5, 1e-5 * size)

    def official(self, i: Turn) -> None:
        i.released.before_update(i.head, i.feature, 0, BATCHES)

    def foreach(self, i: Turn) -> None:
        with torch.no_grad():
            r = i.feature.mean(0, True)
            k = torch.mm(i.projector, r.T)
            i.projector.addcdiv_(torch.mm(k, k.T), torch.mm(k, r).add_(LEAST), value=-1)
            i.projector.div_(i.projector.norm())
            i.head.weight.grad = torch.mm(i.head.weight.grad, i.projector.T)

    def mmfuse(self, i: Turn, backend: str) -> None:
        i.cached(("MLA", backend), lambda: i.made(backend)).step(i.feature)


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
