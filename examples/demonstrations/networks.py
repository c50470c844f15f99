"""The networks of the demonstrations: one small encoder per modality, and a linear head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

WIDTH = 64  # of every encoder's feature


class Model(nn.Module):
    """One encoder per modality, and a linear head on the concatenation of their features.

    A method may put another head in its place, and add modules of its own.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], classes: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.classes = classes
        self.head: nn.Module = nn.Linear(WIDTH * len(encoders), classes)

    def features(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Modality → [B, WIDTH]."""
        return {view: self.encoders[view](x) for view, x in views.items()}

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        """[B, classes] logits."""
        return self.head(torch.cat(list(features.values()), dim=1))


def vector_encoder(size: int, hidden: int = 128) -> nn.Module:
    """For [B, size]."""
    return nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, WIDTH), nn.ReLU())


def series_encoder(channels: int, length: int) -> nn.Module:
    """For time series, [B, channels, length]."""
    return nn.Sequential(
        nn.Conv1d(channels, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv1d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.AvgPool1d(5),
        nn.Flatten(),
        nn.Linear(32 * (length // 20), WIDTH),
        nn.ReLU(),
    )


def picture_encoder(height: int, width: int) -> nn.Module:
    """For pictures and spectrograms, [B, 1, height, width]."""
    small = (height + 7) // 8 * ((width + 7) // 8)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * small, WIDTH),
        nn.ReLU(),
    )


def encoder(shape: tuple[int, ...]) -> nn.Module:
    """The encoder for samples of this shape, with He's initial weights, which ReLU wants."""
    if len(shape) == 1:
        made = vector_encoder(*shape)
    elif len(shape) == 2:
        made = series_encoder(*shape)
    else:
        made = picture_encoder(*shape[1:])
    for layer in made.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return made
