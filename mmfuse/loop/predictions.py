"""Outputs of any task as distributions, for methods whose formulas have a softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops._tensors import why_unsupported
from .given import Loss


def is_multilabel(criterion: Loss) -> bool:
    """True if each output is a yes or no of its own."""
    return isinstance(criterion, nn.BCEWithLogitsLoss)


def distributions(z: Tensor, multilabel: bool = False) -> Tensor:
    """The distributions that a sample's outputs stand for, as logits [B, R, C].

    Args:
        z: [B, C], where R is 1; [B, C, d1, …], where R counts the places. With `multilabel` [B],
            [B, L] or [B, L, d1, …], where R counts the outputs and C is 2: an output z says yes
            with the probability σ(z), which is the softmax of (z, 0).
        multilabel: Each output is a yes or no of its own.
    """
    if multilabel:
        flat = z.reshape(len(z), -1)
        return torch.stack([flat, torch.zeros_like(flat)], 2)
    return z.unsqueeze(1) if z.dim() == 2 else z.flatten(2).transpose(1, 2)


def flat_distributions(z: Tensor, multilabel: bool = False) -> Tensor:
    """The same as [B·R, C]; [B, C] logits as they are."""
    if z.dim() == 2 and not multilabel:
        return z
    return distributions(z, multilabel).flatten(0, 1)


def check_alike(
    names: Sequence[str],
    logits: Sequence[Tensor],
    multilabel: bool = False,
    rows: int | None = None,
    compared: bool = True,
) -> None:
    """Checks that the modalities' logits can be compared output by output.

    Args:
        names: The modalities.
        logits: Of each.
        multilabel: As in `distributions`.
        rows: How many samples there are; None for as many as the logits have.
        compared: True if they will be, which takes two classes.

    Raises:
        TypeError: they are no floating tensors.
        ValueError: their shapes or devices differ, or they are no outputs.
    """
    form = "[B], [B, L] or [B, L, d1, …]" if multilabel else "[B, C] or [B, C, d1, …]"
    for name, z in zip(names, logits, strict=True):
        called, first = f"logits[{name!r}]", logits[0]
        if (why := why_unsupported(z)) is not None:
            raise TypeError(f"{called} must be a floating-point tensor; it {why}")
        if z.dim() < 2 - multilabel:
            raise ValueError(f"{called} must be {form}, got {list(z.shape)}")
        if z.shape != first.shape:
            raise ValueError(
                f"{called} must be {form} like logits[{names[0]!r}] {list(first.shape)}, "
                f"got {list(z.shape)}"
            )
        if z.device != first.device:
            raise ValueError(f"{called} is on {z.device}, logits[{names[0]!r}] on {first.device}")
        if rows is not None and len(z) != rows:
            raise ValueError(f"{called} must have {rows} rows, as features, got {list(z.shape)}")
        if compared and not multilabel and z.shape[1] < 2:
            raise ValueError(
                f"{called} has one class; a single logit for yes and no goes with "
                "criterion=nn.BCEWithLogitsLoss()"
            )


def present_only(values: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    """The values, and 0 where a sample does not have the modality, whatever is there.

    Args:
        values: [B, …] of each modality.
        mask: [M, B] bool, which modalities each sample has.
    """
    pairs = zip(values, mask, strict=True)
    return [torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, 0) for x, rows in pairs]


def mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """Means over the last dimension of those that count; 0 where none does."""
    return torch.where(counted, values, 0).sum(-1) / counted.sum(-1).clamp(min=1)
