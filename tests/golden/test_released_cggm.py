"""`released/cggm.py`, and the authors' own numbers."""

from __future__ import annotations

import math

import pytest
import torch
from guided import Both, clipped, fused
from torch import Tensor, nn
from torch.nn import functional as F
from trajectory import Golden, Network, Replay, free_and_forced, numbers

from released import cggm


class Classifier(nn.Module):
    """One of the file's, called by itself."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.lin, self.out = layers.lin, layers.out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.lin(x)))


class Guided(Network):
    """The network as the sequence calls it."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        features = self.features(dict(zip(self.modalities, inputs, strict=True)))
        return (*features.values(), fused(self, features))


class Looking(cggm.Training):
    """Records gradients before modulation, and the encoders' before clipping."""

    run: Replay

    def raw(self) -> None:
        self.run.raw()

    def modulated(self) -> None:
        for name, p in self.model.named_parameters():
            if name.split(".")[0] in self.classifiers:
                self.run.record(**{f"grad_modulated.{name}": p.grad})


@free_and_forced
@pytest.mark.parametrize(("name", "clips"), [("cggm_classification", 12), ("cggm_regression", 5)])
def test_the_sequence_is_the_authors(name: str, clips: int, forced: bool) -> None:
    golden: Golden = clipped(name)
    model = Guided(golden)
    run = Replay(golden, model, Both(golden, model), forced, backwards=2)
    classifiers = {m: Classifier(getattr(model, f"classifier_{m}")) for m in model.modalities}
    made = Looking(model, run, classifiers, None, model.out, name == "cggm_regression")
    made.run = run
    for _ in run.steps():
        inputs, labels = run.batch()
        seen = made.step(
            *inputs.values(),
            labels=labels,
            rho=golden.hp("rho"),
            direction=golden.hp("direction_weight"),
            clip=golden.hp("clip"),
        )
        run.record(
            loss=seen.loss,
            classifier_loss=seen.classifier_loss,
            metric=numbers(seen.metrics),
            difference=numbers(seen.progress),
            coefficient=numbers(seen.coefficients),
            cosine=numbers(seen.cosines),
            direction_loss=seen.direction_loss,
            norm_before_clip=seen.norm,
        )
    run.check()
    assert int((run["norm_before_clip"] > golden.hp("clip")).sum()) == clips


def test_where_progress_cancels_nothing_bounds_the_factors() -> None:
    first, second = cggm.decide([1 / 32, -1 / 32])
    assert first < -3e6 and second > 3e6
    assert cggm.decide([0.0, 0.0, 0.0]) == [1, 1, 1]
    assert math.isclose(sum(cggm.decide([0.2, 0.3, 0.1])), 2, rel_tol=1e-6)


def test_the_optimizers_own_both_parts() -> None:
    golden = clipped("cggm_classification")
    model = Network(golden)
    both = Both(golden, model)
    owned = [*both.main, *both.own.param_groups[0]["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model.parameters()}
    assert isinstance(both.own, torch.optim.Adam)
