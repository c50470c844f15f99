"""Wrist movements: a smartwatch's accelerometer and gyroscope during seven shoulder exercises.

The recordings are real and simultaneous. A split never divides a person: the people of the
test are neither trained on nor used for validation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from .data import DataError, Part, Split, check_classes, installed, read_pickle, standardise

VIEWS = {"accelerometer": slice(0, 3), "gyroscope": slice(3, 6)}
CLASSES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
CITATION = (
    "Wrist movements: 140 recordings of 7 shoulder exercises by 10 people, accelerometer and "
    "gyroscope of a smartwatch at 50 Hz (D. Burns et al., https://arxiv.org/abs/1802.01489), from "
    "the package seglearn 1.2.5, licence BSD-3-Clause."
)
INSTALL = "pip install --no-deps seglearn==1.2.5"
FILE = "watch_dataset.npy"
WINDOW = 100  # samples, two seconds; windows do not overlap
PEOPLE_IN_A_TEST = 2


class Recordings(NamedTuple):
    """Windows of all recordings."""

    views: dict[str, Tensor]  # float32 [N, 3, WINDOW]
    labels: Tensor  # int64 [N]
    people: Tensor  # int64 [N]


def load() -> Recordings:
    """Reads the recordings and cuts them into windows.

    Raises:
        DataError: the package is missing, or its file is not the one of version 1.2.5.
    """
    path = installed("seglearn", FILE, INSTALL)
    with path.open("rb") as stream:
        try:
            npy.read_magic(stream)
            npy.read_array_header_1_0(stream)
        except ValueError:
            raise DataError(f"{FILE} is no NumPy file; install it again: {INSTALL}") from None
        table = read_pickle(stream, FILE, INSTALL)
    try:
        content = table.item()
        recordings, labels, people = content["X"], content["y"], content["subject"]
        if content["y_labels"] != list(CLASSES) or len(recordings) != 140:
            raise ValueError("other recordings")
        return windows([np.asarray(x, np.float32) for x in recordings], labels, people)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise DataError(
            f"{FILE} does not hold the 140 recordings of 6 channels that seglearn 1.2.5 has; "
            f"install that version: {INSTALL}"
        ) from None


def windows(recordings: list[np.ndarray], labels: np.ndarray, people: np.ndarray) -> Recordings:
    """Cuts recordings, each [samples, 6], into windows.

    Raises:
        ValueError: a recording has another shape, or values that are not finite.
    """
    cut, counts = [], []
    for recording in recordings:
        if recording.ndim != 2 or recording.shape[1] != 6 or not np.isfinite(recording).all():
            raise ValueError("a recording must be [samples, 6] and finite")
        pieces = torch.from_numpy(recording).unfold(0, WINDOW, WINDOW)  # [n, 6, WINDOW]
        cut.append(pieces)
        counts.append(len(pieces))
    every, times = torch.cat(cut), torch.tensor(counts)
    return Recordings(
        {view: every[:, channels].contiguous() for view, channels in VIEWS.items()},
        torch.as_tensor(labels).long().repeat_interleave(times),
        torch.as_tensor(people).long().repeat_interleave(times),
    )


def roles(people: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The people of a seed's test, and of its validation."""
    turns = len(people) // PEOPLE_IN_A_TEST
    generator = torch.Generator().manual_seed(seed // turns)
    order = people[torch.randperm(len(people), generator=generator)]
    order = order.roll(-PEOPLE_IN_A_TEST * (seed % turns))
    return order[:PEOPLE_IN_A_TEST], order[PEOPLE_IN_A_TEST : 2 * PEOPLE_IN_A_TEST]


def split(data: Recordings, seed: int) -> Split:
    """Two people for the test, two for validation, and the others for training.

    Five consecutive seeds (0 to 4, 5 to 9, ...) share an order of the people and test each pair of
    it once, so that every person is tested equally often.
    """
    tested, checked = roles(data.people.unique(), seed)
    test, validation = torch.isin(data.people, tested), torch.isin(data.people, checked)
    every = Part(data.views, data.labels)
    masks = (~(test | validation), validation, test)
    parts = Split(*(every.rows(mask.nonzero().flatten()) for mask in masks))
    return standardise(check_classes(parts, CLASSES), dict.fromkeys(VIEWS, (0, 2)))
