"""MCR's building blocks: gradients of any weight, fusions, and the contrastive loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

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


def through(head: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    """The joint logits of features, from a head on their concatenation."""
    return lambda features: head(torch.cat([f.flatten(1) for f in features], dim=1))


def nt_xent(features: Sequence[Tensor], labels: Tensor, temperature: float) -> Tensor:
    """The supervised NT-Xent loss: samples of one class attract, those of others repel.

    For each ordered pair of rows i ≠ j of one class, of whichever modalities, with s the cosines
    and the sum over the rows n of other classes:
    −log(exp(s_ij/t) / (exp(s_ij/t) + Σ_n exp(s_in/t))); their mean.

    Args:
        features: M tensors [B, D].
        labels: [B] class indices; −100 leaves a row out.
        temperature: t > 0.

    Returns:
        0-d; 0 if there is no such pair.
    """
    rows = F.normalize(torch.cat(list(features)), dim=1)
    classes = labels.repeat(len(features))
    known = classes != _IGNORED
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
