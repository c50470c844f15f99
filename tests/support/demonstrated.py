"""A small data set that behaves like those of the demonstrations, and is made in no time."""

from __future__ import annotations

import torch
from demonstrations.data import Part, Split
from demonstrations.tasks import Task

VIEWS = ("strong", "weak")
CLASSES = ("a", "b", "c")


def part(count: int, generator: torch.Generator) -> Part:
    """Class means with noise; the weak modality has more of it."""
    means = torch.Generator().manual_seed(1)
    strong, weak = torch.randn(3, 8, generator=means), torch.randn(3, 6, generator=means)
    labels = torch.arange(count) % len(CLASSES)
    views = {
        "strong": strong[labels] + 0.5 * torch.randn(count, 8, generator=generator),
        "weak": weak[labels] + 2.0 * torch.randn(count, 6, generator=generator),
    }
    return Part(views, labels)


def split(_: None, seed: int) -> Split:
    """A split of its own for each seed."""
    generator = torch.Generator().manual_seed(seed)
    return Split(*(part(count, generator) for count in (96, 48, 60)))


TASK = Task("Stand-in", VIEWS, CLASSES, "Made here.", lambda: None, split, 2, 1)
