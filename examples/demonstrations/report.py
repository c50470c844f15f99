"""The imbalance report of a demonstration's model, beside models of one modality each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import mmfuse

from .data import Part
from .training import Run


# --8<-- [start:batches]
def batches(part: Part, size: int = 250) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Inputs by name, and labels, as a loader gives them; in the order of the data."""
    for rows in torch.arange(len(part.labels), device=part.labels.device).split(size):
        yield tuple(part.rows(rows))


# --8<-- [end:batches]


def predict(run: Run) -> Callable[[dict[str, Tensor]], Tensor]:
    """The way from inputs by name to the trained model's logits."""
    return lambda views: run.method.predict(run.model.features(views))


def alone(view: str, run: Run) -> Callable[[Tensor], Tensor]:
    """The way from one modality's input to the logits of the model that was trained on it."""
    return lambda x: predict(run)({view: x})


def write(run: Run, only: dict[str, Run], path: Path) -> Path:
    """Writes a page, and the picture beside it; returns the page's path.

    Args:
        run: Trained on all modalities.
        only: Modality → trained on it alone.
        path: Of the page, which ends in ".html".
    """
    report = mmfuse.imbalance_report(
        run.model,
        batches(run.split.test),
        forward=predict(run),
        encoders=run.model.encoders,
        unimodal_encoders={view: each.model.encoders[view] for view, each in only.items()},
        unimodal_models={view: alone(view, each) for view, each in only.items()},
        train_loader=batches(run.split.train),
        resamples=200,
    )
    report.save(path.with_suffix(".png"))
    report.save(path)
    return path
