"""Provider `official`: whole training steps, as `_official`."""

from __future__ import annotations

from _inputs import ALPHA, EPOCHS, TrainingInputs
from _released import released
from torch import Tensor


def ogm_training(i: TrainingInputs) -> None:
    released.ogm.step(i.model, i.optimizer, i.audio, i.visual, i.labels, alpha=ALPHA, draw=None)


def ogm_ge_training(i: TrainingInputs) -> None:
    released.ogm.step(i.model, i.optimizer, i.audio, i.visual, i.labels, alpha=ALPHA)


def opm_training(i: TrainingInputs) -> tuple[Tensor, ...]:
    """A step that drops, which the released script does in a share of the steps; what is left.

    Without θ's gradient, as mmfuse is measured; it would take one more pass through the scores.
    """
    seen = released.opm.step(
        i.model, i.optimizer, i.audio, i.visual, i.labels, theta_gradient=False
    )
    return tuple(feature.detach() for feature in seen.features)


def arm_training(i: TrainingInputs) -> None:
    released.arm.step(i.model, i.optimizer, i.audio, i.visual, i.labels, bins=i.workload.bins)


def inforeg_training(i: TrainingInputs) -> None:
    """A step of the first epoch."""
    training = i.cached("official InfoReg", lambda: _inforeg(i))
    training.step(i.audio, i.visual, i.labels)


def redreg_training(i: TrainingInputs) -> None:
    """A step of the first epoch."""
    training = i.cached("official RedReg", lambda: _redreg(i))
    training.step(i.audio, i.visual, i.labels)


def _inforeg(i: TrainingInputs) -> released.inforeg.Training:
    training = released.inforeg.Training(i.model, i.optimizer)
    with i.at_start():
        training.start_epoch()
    return training


def _redreg(i: TrainingInputs) -> released.redreg.Training:
    training = released.redreg.Training(i.model, i.optimizer, EPOCHS, uniform=i.uniform)
    with i.at_start():
        training.start_epoch(0)
    return training
