"""A small convolutional audio-visual network, and the released training step in our own words."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
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
        a, v = self.audio_net(audio), self.visual_net(visual)
        return a, v, self.fc(torch.cat([a, v], dim=1))

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"audio": self.audio_net, "visual": self.visual_net}


def batch(size: int = 12, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Audio that gives the class away, and an image that hardly does."""
    labels = torch.randint(0, classes, (size,))
    audio = torch.randn(size, 1, 9, 8) + labels.view(-1, 1, 1, 1).float()
    return audio, torch.randn(size, 3, 7, 7), labels


def start_third_epoch(inforeg: InfoReg) -> None:
    """As after two epochs of equal traces: the window opens in the third one at the earliest."""
    state = copy.deepcopy(inforeg.state_dict())
    state["epochs"].fill_(2)
    state["traces"].fill_(1.0)
    inforeg.load_state_dict(state)
    inforeg.start_epoch()


def released_step(
    model: AudioVisual,
    audio: Tensor,
    visual: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    noise: Callable[[str, Tensor, float], Tensor] | None,
    conv_only: bool = True,
    formula: str = "cvpr",
) -> dict[str, float]:
    """One step of the released code: two modalities, found by name, sample by sample."""
    a, v, out = model(audio, visual)
    half = model.fc.weight.shape[1] // 2
    out_a = a @ model.fc.weight[:, :half].t() + model.fc.bias / 2
    out_v = v @ model.fc.weight[:, half:].t() + model.fc.bias / 2
    F.cross_entropy(out, labels).backward()

    out_a, out_v = out_a.detach(), out_v.detach()
    score_a = sum(torch.softmax(out_a, dim=1)[i][labels[i]] for i in range(len(labels)))
    score_v = sum(torch.softmax(out_v, dim=1)[i][labels[i]] for i in range(len(labels)))
    ratio = {"audio": float(score_a / score_v), "visual": float(score_v / score_a)}
    k = {}
    for name, rho in ratio.items():
        if rho <= 1:
            k[name] = 1.0
        elif formula == "cvpr":
            k[name] = 1 - float(torch.tanh(torch.tensor(alpha * rho)))
        else:
            k[name] = max(0.0, 1 - alpha * float(torch.tanh(torch.tensor(rho - 1))))

    for name, parameter in model.named_parameters():
        modality = name.split("_")[0]
        if modality not in k or (conv_only and parameter.dim() != 4):
            continue
        grad = parameter.grad
        if noise is None:
            parameter.grad = grad * k[modality]
        elif grad.numel() > 1:
            std = grad.std().item() + 1e-8
            parameter.grad = grad * k[modality] + noise(name, grad, std)
        else:
            parameter.grad = grad * k[modality]
    return k
