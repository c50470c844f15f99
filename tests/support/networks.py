"""A small convolutional audio-visual network, which the released sequences can train too."""

from __future__ import annotations

import copy

import torch
from epochs import next_epoch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfuse import InfoReg


class Encoder(nn.Module):
    """Two convolutions with batch norm, global average pooling: conv, vector and matrix weights."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.proj(self.conv2(x).mean(dim=(2, 3)))


class AudioVisual(nn.Module):
    """Concatenation fusion of an audio and a visual encoder, as in OGM-GE's released code."""

    def __init__(self, width: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.audio_net = Encoder(1, width)
        self.visual_net = Encoder(3, width)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, v = self.features(audio, visual)
        return a, v, self.fc(torch.cat([a, v], dim=1))

    def features(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        return self.audio_net(audio), self.visual_net(visual)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"audio": self.audio_net, "visual": self.visual_net}


class ThreeHeads(AudioVisual):
    """A head on both features, and one of its own for each modality, as in RedReg's."""

    def __init__(self, width: int = 6, classes: int = 5) -> None:
        super().__init__(width, classes)
        self.head_audio = nn.Linear(width, classes)
        self.head_visual = nn.Linear(width, classes)


class TwoEncoders(nn.Module):
    """Encoders of audio [B, 5] and visual [B, 7] features, and a head: small enough for ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.visual_net = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))
        self.head = nn.Linear(8, 3)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"audio": self.audio_net, "visual": self.visual_net}


def batch(size: int = 12, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Audio that gives the class away, and an image that hardly does."""
    labels = torch.randint(0, classes, (size,))
    audio = torch.randn(size, 1, 9, 8) + labels.view(-1, 1, 1, 1).float()
    return audio, torch.randn(size, 3, 7, 7), labels


def start_third_epoch(inforeg: InfoReg) -> None:
    """Acts as two epochs of equal traces: the window opens in the third one at the earliest."""
    state = copy.deepcopy(inforeg.state_dict())
    state["state"]["epochs"].fill_(2)
    state["state"]["traces"].fill_(1.0)
    inforeg.load_state_dict(state)
    next_epoch(inforeg)
