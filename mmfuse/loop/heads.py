"""Each modality's own logits, from a head that sees all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def unimodal_logits(
    head: nn.Linear | Callable[[Tensor], Tensor], features: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a head on concatenated features says about each modality alone.

    For a linear head, z^m = W^m φ^m + b / M with W^m the columns that multiply φ^m (Peng et al.,
    CVPR 2022, Eq. 6): the logits of all modalities add up to the head's output. Any other head is
    called once per modality with the other features set to zero (TPAMI 2024, section 4.3.7).

    Equivalent to, for two modalities and a linear head::

        {"audio": a @ head.weight[:, :A].T + head.bias / 2,
         "visual": v @ head.weight[:, A:].T + head.bias / 2}

    Args:
        head: ``nn.Linear`` from the concatenation to C classes, or any callable on it.
        features: Name → [B, D_m], in the order in which they are concatenated.

    Returns:
        Name → [B, C].

    Raises:
        ValueError: the features do not add up to the head's input, or are not [B, D].
    """
    if not features:
        raise ValueError("features must hold at least one modality")
    for name, feature in features.items():
        if feature.dim() != 2:
            raise ValueError(f"features[{name!r}] must be [B, D], got {list(feature.shape)}")
    if not isinstance(head, nn.Linear):
        return _by_zeroing(head, features)
    widths = {name: feature.shape[1] for name, feature in features.items()}
    if sum(widths.values()) != head.in_features:
        raise ValueError(
            f"the head takes {head.in_features} features, but {widths} add up to "
            f"{sum(widths.values())}"
        )
    share = None if head.bias is None else head.bias / len(features)
    slices = head.weight.split(list(widths.values()), dim=1)
    return {
        name: F.linear(feature, weight, share)
        for (name, feature), weight in zip(features.items(), slices, strict=True)
    }


def _by_zeroing(
    head: Callable[[Tensor], Tensor], features: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {
        name: head(
            torch.cat(
                [f if other == name else torch.zeros_like(f) for other, f in features.items()],
                dim=1,
            )
        )
        for name in features
    }
