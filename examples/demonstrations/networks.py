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
    """An encoder for [B, size]."""
    return nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, WIDTH), nn.ReLU())


class Patches(nn.Module):
    """Cuts the last dimensions into overlapping patches: [B, C, ...] → [B, patches, C · size].

    A linear layer on patches is a convolution. Written so, small ones take half the time on a CPU.
    """

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, patches, values of a patch]."""
        places = x.dim() - 2
        for dim in range(places):
            x = x.unfold(2 + dim, self.size, self.stride)
        return x.movedim(1, 1 + places).flatten(1 + places).flatten(1, places)


def series_encoder(channels: int, length: int) -> nn.Module:
    """An encoder for time series, [B, channels, length]."""
    return patch_encoder(10, 5, channels * 10, (length - 5) // 5, 32)


def picture_encoder(height: int, width: int) -> nn.Module:
    """An encoder for pictures and spectrograms, [B, 1, height, width]."""
    return patch_encoder(6, 3, 36, (height - 3) // 3 * ((width - 3) // 3), 24)


def patch_encoder(size: int, stride: int, values: int, patches: int, filters: int) -> nn.Module:
    """A convolutional layer of so many filters, and a linear one."""
    return nn.Sequential(
        Patches(size, stride),
        nn.Linear(values, filters),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(patches * filters, WIDTH),
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
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return made
