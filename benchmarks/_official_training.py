"""Provider `official`: whole training steps of InfoReg and RedReg, as `_official`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from _inputs import AGREEMENT, DROP, TrainingInputs
from _networks import AudioVisual
from _official import agreement_gate, batch_scores, mean_square, noisy_view, orthogonal
from _official_modulation import own_logits
from torch import Tensor, nn
from torch.nn import functional as F


class _Epoch:
    """What both releases keep during an epoch. TensorBoard and running losses are left out."""

    def __init__(self, i: TrainingInputs) -> None:
        with i.at_start():
            self.start = copy.deepcopy(i.model)
        named = list(i.model.named_parameters())
        self.records = {
            modality: [(name, p) for name, p in named if "head" not in name and modality in name]
            for modality in ("audio", "visual")
        }
        self.fisher = self._zeros(i.model)
        self.fisher_of_parts = self._zeros(i.model)
        self.norms = dict.fromkeys(self.records, 0.0)
        self.counts = dict.fromkeys(self.records, 0)
        # RedReg's.
        self.scores: dict[str, list[float]] = {"audio": [], "visual": []}
        self.averages = dict.fromkeys(self.records, 0.0)

    @staticmethod
    def _zeros(model: nn.Module) -> dict[str, Tensor]:
        return {name: torch.zeros_like(module.weight) for name, module in layers(model)}


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose Fisher information is kept."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            yield name, module


def log_gradients(
    i: TrainingInputs, epoch: _Epoch, losses: Sequence[Tensor]
) -> list[tuple[dict[str, Tensor], float]]:
    """A backward pass of each loss, of which only the mean gradients are logged.

    The copies are returned, because the released code keeps them until the next step.
    """
    kept = []
    for loss, seen in zip(losses, (("audio", "visual"), ("audio",), ("visual",)), strict=True):
        loss.backward(retain_graph=True)
        for modality in seen:
            rows = {name: p.grad.data.clone() for name, p in epoch.records[modality]}
            rows["concat"] = torch.cat([row.flatten() for row in rows.values()])
            kept.append((rows, torch.mean(rows["concat"]).item()))
        i.optimizer.zero_grad()
    return kept


def backward_thrice(loss: Tensor, loss_a: Tensor, loss_v: Tensor) -> None:
    """The gradient that is used: of the sum of the losses."""
    loss_v.backward(retain_graph=True)
    loss_a.backward(retain_graph=True)
    loss.backward()


def belongs(parameter: Tensor, encoder: nn.Module) -> bool:
    """Whether it is one of the encoder's parameters, found by going through all of them."""
    return any(parameter is other for other in encoder.parameters())


def log_fisher_and_norms(i: TrainingInputs, epoch: _Epoch) -> None:
    """Both accumulators, the model's and its parts', and the norms of the convolutions."""
    for sums in (epoch.fisher, epoch.fisher_of_parts):
        for name, module in layers(i.model):
            sums[name] += module.weight.grad * module.weight.grad
            sums[name].detach_()
    rate = i.optimizer.param_groups[0]["lr"]
    for name, p in i.model.named_parameters():
        for modality in epoch.norms:
            if modality in name.split(".")[0] and p.grad.dim() == 4:
                epoch.norms[modality] += rate * torch.sum(p.grad**2).item()
                epoch.counts[modality] += 1


def inforeg_training(i: TrainingInputs) -> None:
    """With autograd on in the update too, and scores that are not detached, as released."""
    model, optimizer, labels = i.model, i.optimizer, i.labels
    epoch = i.cached("official InfoReg", lambda: _Epoch(i))
    growth = 1.0  # in the first epoch
    optimizer.zero_grad()
    a, v, out = model(i.audio, i.visual)
    out_a, out_v = own_logits(i, a, v)
    loss, loss_v, loss_a = (F.cross_entropy(z, labels) for z in (out, out_v, out_a))
    kept = log_gradients(i, epoch, (loss, loss_a, loss_v))
    backward_thrice(loss, loss_a, loss_v)

    score_v, score_a = batch_scores([out_v, out_a], labels)
    alpha_a = alpha_v = 0
    if score_a > score_v and growth > 0.05:
        alpha_a = 0.95 * torch.exp(torch.tanh(score_a - score_v))
    elif score_a < score_v and growth > 0.05:
        alpha_v = 0.1 * torch.exp(torch.tanh(score_v - score_a))
    for p, anchor in zip(model.parameters(), epoch.start.parameters(), strict=True):
        if belongs(p, model.audio_net):
            p.grad += alpha_a * (p - anchor)
        if belongs(p, model.visual_net):
            p.grad += alpha_v * (p - anchor)
    log_fisher_and_norms(i, epoch)
    optimizer.step()
    del kept


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)


def growth_rate(scores: Sequence[float], window: int = 10) -> float:
    """How fast the gain grows; 1 until the window is full."""
    if len(scores) <= window:
        return 1.0
    now = sum(scores[-window:]) / window
    before = sum(scores[-window - 1 : -1]) / window
    return (now - before) / (abs(before) + 1e-12)


def redundancies(model: AudioVisual, audio: Tensor, visual: Tensor) -> dict[str, float]:
    """The monitor: two noisy views of each input through its encoder."""
    with torch.no_grad(), evaluating(model.audio_net), evaluating(model.visual_net):
        audios = noisy_view(audio), noisy_view(audio)
        visuals = [torch.clamp(noisy_view(visual), 0.0, 1.0) for _ in range(2)]
        maps_a = [model.audio_net(x) for x in audios]
        maps_v = [model.visual_net(x) for x in visuals]
        return {
            "audio": (mean_square(*maps_a) / (mean_square(*audios) + 1e-12)).item(),
            "visual": (mean_square(*maps_v) / (mean_square(*visuals) + 1e-12)).item(),
        }


def redreg_training(i: TrainingInputs) -> None:
    """A step of the first epoch; with autograd on in the update too, as released."""
    model, optimizer, labels = i.model, i.optimizer, i.labels
    epoch = i.cached("official RedReg", lambda: _Epoch(i))
    optimizer.zero_grad()
    u = i.uniform()
    drop_a = bool(u < DROP * 0.5)
    drop_v = bool((u >= DROP * 0.5) and (u < DROP))
    audio = torch.zeros_like(i.audio) if drop_a else i.audio
    visual = torch.zeros_like(i.visual) if drop_v else i.visual
    a, v, out = model(audio, visual)
    out_a, out_v = model.head_audio(a), model.head_visual(v)
    rows = torch.arange(len(labels), device=i.device)
    with torch.no_grad():
        prob = {
            "audio": F.softmax(out_a, dim=1)[rows, labels].mean().item(),
            "visual": F.softmax(out_v, dim=1)[rows, labels].mean().item(),
        }
    phase = {}
    seen = redundancies(model, i.audio, i.visual)
    for name, redundancy in seen.items():
        epoch.scores[name].append(prob[name])
        epoch.averages[name] = 0.9 * epoch.averages[name] + (1 - 0.9) * redundancy
        ratio = redundancy / (epoch.averages[name] + 1e-12)
        phase[name] = ratio - 0.6 * max(growth_rate(epoch.scores[name]), 0.0)

    beta = {name: torch.tensor(0.0, device=i.device) for name in prob}
    for ahead, behind in (("visual", "audio"), ("audio", "visual")):
        if prob[behind] < prob[ahead] and phase[ahead] > 0.15:
            delta = torch.tensor(prob[ahead] - prob[behind], device=i.device).clamp_min(0.0)
            beta[ahead] = torch.exp(torch.tensor(0.9, device=i.device) * torch.tanh(delta))
    with torch.no_grad():
        agree = agreement_gate(a.flatten(1), v.flatten(1), AGREEMENT)
    beta_a, beta_v = beta["audio"] * agree, beta["visual"] * agree

    loss, loss_v, loss_a = (F.cross_entropy(z, labels) for z in (out, out_v, out_a))
    kept = log_gradients(i, epoch, (loss, loss_a, loss_v))
    backward_thrice(loss, loss_a, loss_v)
    for p, anchor in zip(model.parameters(), epoch.start.parameters(), strict=True):
        displacement = orthogonal(p - anchor, p.grad)
        if belongs(p, model.audio_net):
            p.grad = p.grad + beta_a * displacement
        if belongs(p, model.visual_net):
            p.grad = p.grad + beta_v * displacement
    log_fisher_and_norms(i, epoch)
    optimizer.step()
    del kept
