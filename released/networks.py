"""The sequences' demands on a network, and the logits that each modality has of its own."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Network(Protocol):
    """Two encoders and a head on both features.

    Names of parameters begin with what contains "audio" or "visual"; those of heads contain "head"
    or neither. RedReg, MMPareto and the first release of InfoReg also want `head_audio` and
    `head_visual`; so does MLB, which asks for no joint head, and for a third encoder, of text, it
    wants `head_text`; ARM `neck` and `fc_out`.
    """

    audio_net: nn.Module
    visual_net: nn.Module
    fc: nn.Linear

    def features(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One vector a sample from each encoder."""

    def __call__(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both features and the joint logits."""


def halves(model: Network, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Each modality's logits, from its half of the joint head and half of the bias."""
    return _halves(model.fc.weight, model.fc.bias, a, v)


def detached_halves(model: Network, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `halves`; no gradient reaches the head, but the features get theirs."""
    return _halves(model.fc.weight.detach(), model.fc.bias.detach(), a, v)


def _halves(weight: Tensor, bias: Tensor, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    half = weight.size(1) // 2
    out_v = torch.mm(v, torch.transpose(weight[:, half:], 0, 1)) + bias / 2
    out_a = torch.mm(a, torch.transpose(weight[:, :half], 0, 1)) + bias / 2
    return out_a, out_v


def own_heads(model: Network, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Each modality's logits, from a head of its own."""
    return model.head_audio(a), model.head_visual(v)
