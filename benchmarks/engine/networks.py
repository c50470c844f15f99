"""The networks of whole training steps: ResNet-18, and audio and visual with the released heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if before != width:
            convolution = nn.Conv2d(before, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


class ResNet18(nn.Module):
    """ResNet-18 in torchvision's layout, without pooling and classifier, as the releases use it.

    Args:
        channels: Of the input.
        width: Of the stem; 64 in the original. The result has eight times as many channels.

    The frames of a clip [B, F, C, H, W] are images of their own: the result has B·F rows.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, before = [], width
        for n, out in enumerate((width, 2 * width, 4 * width, 8 * width)):
            blocks += [_Block(before, out, 1 if n == 0 else 2), _Block(out, out, 1)]
            before = out
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, -4)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        return self.blocks(x)


class AudioVisual(nn.Module):
    """Two ResNet-18 and a head on both features: the network of OGM, OPM and InfoReg.

    Args:
        width: Of a feature, eight times the stem's.
        classes: Number of classes.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.audio_net = ResNet18(1, width // 8)
        self.visual_net = ResNet18(3, width // 8)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both features, and the joint logits."""
        a, v = self.features(audio, visual)
        return a, v, self.fc(torch.cat([a, v], dim=1))

    def features(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Means over space, and over the frames of a clip."""
        a, v = (
            F.adaptive_avg_pool2d(z, 1).flatten(1)
            for z in (self.audio_net(audio), self.visual_net(visual))
        )
        return a, v.unflatten(0, (len(a), -1)).mean(1) if visual.dim() == 5 else v

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """Name → encoder."""
        return {"audio": self.audio_net, "visual": self.visual_net}


class SharedHead(AudioVisual):
    """ARM's network: one head for the joint, the fused and each modality's own feature."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.neck = nn.Linear(2 * width, width)
        self.fc_out = nn.Linear(2 * width, width)
        self.fc = nn.Linear(width, classes)


class ThreeHeads(AudioVisual):
    """RedReg's network, in which each modality has a head of its own too."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.head_audio = nn.Linear(width, classes)
        self.head_visual = nn.Linear(width, classes)
