"""Data of several modalities, its parts, and reading it from installed packages."""

from __future__ import annotations

import importlib.metadata
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor


class DataError(RuntimeError):
    """The data is missing or not what it should be; the message says what to do."""


class Part(NamedTuple):
    """Samples that every modality has, one label each."""

    views: dict[str, Tensor]  # modality → [N, ...]
    labels: Tensor  # int64 [N]

    def rows(self, rows: Tensor) -> Part:
        """Some of the samples, in a given order."""
        return Part({view: x[rows] for view, x in self.views.items()}, self.labels[rows])

    def to(self, device: str) -> Part:
        """The same samples on another device."""
        views = {view: x.to(device) for view, x in self.views.items()}
        return Part(views, self.labels.to(device))


class Split(NamedTuple):
    """One seed's training, validation and test samples."""

    train: Part
    validation: Part
    test: Part

    def to(self, device: str) -> Split:
        """The same split on another device."""
        return Split(*(part.to(device) for part in self))


def standardise(split: Split, dims: dict[str, tuple[int, ...]]) -> Split:
    """Scales every modality by the mean and the standard deviation of its training samples.

    Args:
        split: Float tensors.
        dims: Modality → the dimensions that share one mean and one deviation.
    """
    parts: list[dict[str, Tensor]] = [{}, {}, {}]
    for view, shared in dims.items():
        std, mean = torch.std_mean(split.train.views[view], dim=shared, keepdim=True)
        # A value that is constant in the training samples must not blow up in the others.
        std = torch.where(std > 0, std, 1.0)
        for scaled, part in zip(parts, split, strict=True):
            scaled[view] = (part.views[view] - mean) / std
    return Split(*(Part(x, part.labels) for x, part in zip(parts, split, strict=True)))


def check_classes(split: Split, classes: Sequence[str]) -> Split:
    """Returns the split.

    Raises:
        DataError: a class has no samples in a part.
    """
    for name, part in zip(Split._fields, split, strict=True):
        for label, word in enumerate(classes):
            if not (part.labels == label).any():
                raise DataError(
                    f"The class {word!r} has no {name} samples with this seed: ask for more "
                    "samples or take another seed."
                )
    return split


def installed(package: str, file: str, install: str) -> Path:
    """The path of a file that an installed package carries; the package is not imported.

    Args:
        package: Its name, as pip has it.
        file: The file's name.
        install: The command that installs the package, for the error.

    Raises:
        DataError: the package, or the file, is not there.
    """
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for entry in files:
        if entry.name == file:
            path = Path(str(entry.locate()))
            if path.is_file():
                return path
    raise DataError(f"{file} of the package {package} is not installed; install it with: {install}")


def _latin1(text: str, encoding: str) -> bytes:
    """Encodes as Python 2's arrays were pickled; no other codec is run."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding}")
    return text.encode(encoding)


# Older releases of NumPy have another name for the module.
_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    """Reads NumPy arrays, numbers, text and containers, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name}") from None


def read_pickle(stream: BinaryIO, name: str, install: str) -> Any:
    """Reads a pickle of NumPy arrays and containers without running code of it.

    Args:
        stream: The pickle.
        name: Its name in errors.
        install: The command that installs the package, for the error.

    Raises:
        DataError: it holds anything else, or is damaged.
    """
    try:
        return _Unpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{name} is damaged, or holds more than arrays ({error}), and was not loaded; "
            f"install the package again: {install}"
        ) from None
    except (
        EOFError,
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
    ) as error:
        raise DataError(
            f"{name} is damaged ({type(error).__name__}); install the package again: {install}"
        ) from None
