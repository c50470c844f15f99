"""ReLearning (ECCV 2024): GeWu-Lab/Diagnosing_Relearning_ECCV2024 at 025085e.

At the end of every twentieth epoch, three times, encoders go part of the way back to the parameters
they began with. Features are clustered on the host; every parameter gets a new tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

#: Epochs between resets, and how many there are.
EVERY, TIMES = 20, 3
#: The gap in purity is multiplied by this.
STRENGTH = 3.0


class Weights(NamedTuple):
    """Findings from the features; pairs are audio, visual."""

    weights: tuple[Tensor, Tensor]
    #: Training audio, validation audio, training visual, validation visual.
    purities: list[float]
    scaled: list[np.ndarray]


def resets(epoch: int, done: int) -> bool:
    """True if this epoch ends with a reset, after as many."""
    return epoch % EVERY == 0 and epoch > 0 and done < TIMES


def min_max(features: np.ndarray) -> np.ndarray:
    """Columns from −1 to 1."""
    least, most = features.min(axis=0), features.max(axis=0)
    width = np.where(most == least, 1.0, most - least)
    scale = 2 / width
    return features * scale + (-1 - least * scale)


def purity(classes: np.ndarray, clusters: np.ndarray) -> float:
    """Share of samples of their cluster's commonest class, which is found cluster by cluster."""
    classes = classes.copy()
    voted = np.zeros(classes.shape)
    for k, label in enumerate(np.unique(classes)):
        classes[classes == label] = k
    known = np.unique(classes)
    bins = np.concatenate((known, [np.max(known) + 1]), axis=0)
    for cluster in np.unique(clusters):
        counts, _ = np.histogram(classes[clusters == cluster], bins=bins)
        voted[clusters == cluster] = np.argmax(counts)
    return float(np.mean(classes == voted))


def weights(
    features: Sequence[Tensor],
    train_labels: Tensor,
    val_labels: Tensor,
    cluster: Callable[[np.ndarray], np.ndarray],
    strength: float = STRENGTH,
) -> Weights:
    """How far each encoder goes back.

    Args:
        features: [N, D] training audio, validation audio, training visual, validation visual.
        train_labels: [N].
        val_labels: [N].
        cluster: k-means.
        strength: The factor of the gap.
    """
    found, scaled = [], []
    for i, each in enumerate(features):
        scaled.append(min_max(each.detach().cpu().numpy()))
        labels = (val_labels if i % 2 else train_labels).cpu().numpy()
        found.append(purity(labels, cluster(scaled[-1])))
    gaps = [strength * abs(found[m] - found[m + 1]) for m in (0, 2)]
    # float32 in the release, and so are its features.
    pair = [torch.tanh(torch.tensor(gap, dtype=features[0].dtype)) for gap in gaps]
    return Weights((pair[0], pair[1]), found, scaled)


def mixed(weight: Tensor, start: Tensor, now: Tensor) -> Tensor:
    """A new tensor between both."""
    return weight * start + (1 - weight) * now


def reset(
    model: nn.Module, start: Mapping[str, Tensor], weight_audio: Tensor, weight_visual: Tensor
) -> None:
    """New parameters for both encoders, which are found by their names."""
    for name, p in model.named_parameters():
        layer = name.split(".")[0]
        for modality, weight in (("audio", weight_audio), ("visual", weight_visual)):
            if modality in layer and "head" not in layer:
                p.data = mixed(weight, start[name], p.data)
                break
