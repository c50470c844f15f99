"""The data sets of the demonstrations, each with what training on it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import animals_data, handwritten_data, wrist_data
from .data import Split


class Task(NamedTuple):
    """One data set.

    Attributes:
        title: For figures.
        views: The modalities.
        classes: Names of the classes.
        citation: Source and licence.
        load: Reads everything that splits are drawn from.
        split: Draws one split, by what was read and a seed.
        epochs: Passes over the training samples.
        search_seeds: On how many splits a trial of the search trains; the accuracy of one says more
            of who is in it than of the settings.
    """

    title: str
    views: tuple[str, ...]
    classes: tuple[str, ...]
    citation: str
    load: Callable[[], Any]
    split: Callable[[Any, int], Split]
    epochs: int
    search_seeds: int


def handwritten(views: tuple[str, ...] = ("pix", "fou")) -> Task:
    """The digits, in some of their views."""
    return Task(
        "Handwritten digits",
        views,
        handwritten_data.CLASSES,
        handwritten_data.CITATION,
        lambda: handwritten_data.load(views),
        handwritten_data.split,
        60,
        1,
    )


TASKS: dict[str, Task] = {
    "animals": Task(
        "Spoken animals",
        animals_data.VIEWS,
        animals_data.CLASSES,
        animals_data.CITATION,
        animals_data.load,
        animals_data.split,
        15,
        3,
    ),
    "wrist": Task(
        "Wrist movements",
        tuple(wrist_data.VIEWS),
        wrist_data.CLASSES,
        wrist_data.CITATION,
        wrist_data.load,
        wrist_data.split,
        15,
        3,
    ),
    "handwritten": handwritten(),
}
