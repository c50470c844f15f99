"""MCR's building blocks: gradients of any weight, fusions, and the contrastive loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..loop.given import Loss
from ..loop.predictions import check_alike
from ..ops._tensors import check_dense

_IGNORED = -100


def weighted(x: Tensor, k: int) -> Tensor:
    """X, with a gradient of k times what it gets; exact for −1, 0 and 1."""
    return x if k == 1 else x.detach() if k == 0 else 2 * x.detach() - x


def repeated(x: Tensor, times: int) -> Tensor:
    """The batch `times` times, one after the other."""
    return x.repeat(times, *[1] * (x.dim() - 1))


def added(logits: Sequence[Tensor]) -> Tensor:
    """The joint logits, of heads that add up."""
    return torch.stack(list(logits)).sum(0)


def through(
    head: Callable[[Tensor], Tensor], multilabel: bool
) -> Callable[[Sequence[Tensor]], Tensor]:
    """The joint logits of features, from a head on their concatenation."""

    def fuse(features: Sequence[Tensor]) -> Tensor:
        z = head(torch.cat([f.flatten(1) for f in features], dim=1))
        if not isinstance(z, Tensor):
            raise TypeError(f"head must return a tensor of joint logits, got {type(z).__name__}")
        check_alike(["head"], [z], multilabel)
        return z

    return fuse


def orders_of(drawn: Tensor, here: Tensor | None) -> Tensor:
    """Permutations of the samples that have a modality; the others stay where they are.

    Args:
        drawn: [P, B] a number of each sample, by which it is sorted.
        here: [B] bool, which samples take part; None for all.

    Returns:
        [P, B] whose features each sample gets.
    """
    if here is None:
        return drawn.argsort(1)
    # Samples that are not there come after all numbers drawn, in the order that they have.
    places = (~here).to(drawn.dtype).argsort(stable=True).expand_as(drawn)
    order = drawn.masked_fill(~here, torch.inf).argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, places, order)


def labels_of_contrast(
    labels: Tensor | None, names: Sequence[str], features: Sequence[Tensor], criterion: Loss
) -> Tensor:
    """[B] class indices, −100 for a row that does not count.

    Raises:
        TypeError: they are no class indices.
        ValueError: their number does not fit, or features are not of one size.
    """
    rows = len(features[0])
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"labels must be class indices, for the contrast; got {kind}; contrast=0 leaves it out"
        )
    check_dense("labels", labels)
    if labels.shape != (rows,):
        raise ValueError(
            f"labels must have shape [{rows}], got {list(labels.shape)}; contrast=0, which needs "
            "none, is for labels of each place"
        )
    pairs = zip(names, features, strict=True)
    sizes = {name: v[0].numel() if rows else 0 for name, v in pairs}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the contrast compares features, which must be of one size, not {sizes}; "
            "contrast=0 leaves it out"
        )
    ignored = criterion.ignore_index if isinstance(criterion, nn.CrossEntropyLoss) else _IGNORED
    return labels if ignored == _IGNORED else labels.masked_fill(labels == ignored, _IGNORED)


def nt_xent(
    features: Sequence[Tensor], labels: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """The supervised NT-Xent loss: samples of one class attract, those of others repel.

    For each ordered pair of rows i ≠ j of one class, of whichever modalities, with s the cosines
    and the sum over the rows n of other classes:
    −log(exp(s_ij/t) / (exp(s_ij/t) + Σ_n exp(s_in/t))); their mean.

    Args:
        features: M tensors [B, D].
        labels: [B] class indices; −100 leaves a row out.
        temperature: t > 0.
        mask: [M, B] bool, which of the rows there are; None for all.

    Returns:
        0-d; 0 if there is no such pair.
    """
    rows = F.normalize(torch.cat(list(features)), dim=1)
    classes = labels.repeat(len(features))
    known = classes != _IGNORED
    if mask is not None:
        known = known & mask.flatten()
    both = known.unsqueeze(1) & known.unsqueeze(0)
    alike = classes.unsqueeze(1) == classes.unsqueeze(0)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    similar = rows @ rows.T / temperature
    # Not −inf, of which a row without others would have no gradient but NaN.
    least = torch.finfo(similar.dtype).min / 4
    others = similar.masked_fill(~(both & ~alike), least).logsumexp(1, keepdim=True)
    pairs = both & alike & ~itself
    each = F.softplus(others - similar)
    return torch.where(pairs, each, 0).sum() / pairs.sum().clamp(min=1)
