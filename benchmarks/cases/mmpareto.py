"""MMPareto: a whole training step."""

from __future__ import annotations

import torch
from engine import sequences
from engine.case import register
from engine.networks import AudioVisual, ThreeHeads
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, own_heads_step
from engine.training_gate import backward, modality_of, stepped
from torch import Tensor
from torch.nn import functional as F

import mmfuse

#: How much longer the combined gradient is made.
GAMMA = 1.5


def _combined(joint: list[Tensor], unimodal: list[Tensor]) -> list[Tensor]:
    """One encoder's gradients by the released rule."""

    def product(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return sum((a * b).sum() for a, b in zip(x, y, strict=True))

    between = product(joint, unimodal)
    n1, n2 = product(joint, joint), product(unimodal, unimodal)
    if between > 0:
        first = torch.tensor(0.5)
    elif between >= n1:
        first = torch.tensor(0.999)
    elif between >= n2:
        first = torch.tensor(0.001)
    else:
        first = (n2 - between) / (n1 + n2 - 2 * between)
    out = []
    for g1, g2 in zip(joint, unimodal, strict=True):
        h = 2 * first * g1 + 2 * (1 - first) * g2
        ratio = (g1 + g2).norm() / h.norm()
        out.append(GAMMA * h * ratio if ratio > 1 else GAMMA * h)
    return out


@register
class Training(TrainingCase):
    """Two backward passes, where the released step has four."""

    name = "mmpareto_training"
    title = "MMPareto: a whole training step"
    method = "MMPareto"
    network = ThreeHeads
    ops = ("grad_stats", "update_grads_")
    # Two gradients that conflict add up to less than either, with the errors of both.
    slack = 2.0

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        def gradients(*wanted: int) -> list[tuple[str, Tensor | None]]:
            def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
                a, v, out = model(i.audio, i.visual)
                logits = [out, model.head_audio(a), model.head_visual(v)]
                loss = sum(F.cross_entropy(logits[n], i.labels) for n in wanted)
                return [a, v], logits, loss

            return backward(i, forward).named_gradients()

        together = gradients(0, 1, 2)
        grads = [grad for _, grad in together]
        if regulated:
            joint, unimodal = gradients(0), gradients(1, 2)
            for modality in range(2):
                mine = [n for n, (name, _) in enumerate(together) if modality_of(name) == modality]
                rows = [[side[n][1] for n in mine] for side in (joint, unimodal)]
                for n, combined in zip(mine, _combined(*rows), strict=True):
                    grads[n] = combined
        return stepped(i, grads)

    def plain(self, i: TrainingInputs) -> None:
        own_heads_step(i)

    def official(self, i: TrainingInputs) -> None:
        def start() -> sequences.mmpareto.Training:
            made = sequences.mmpareto.Training(i.model, i.optimizer)
            made.start_epoch()
            return made

        i.cached("official MMPareto", start).step(i.audio, i.visual, i.labels)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        method = i.cached(
            ("MMPareto", backend),
            lambda: mmfuse.MMPareto.official(i.model.encoders, gamma=GAMMA, backend=backend),
        )
        i.optimizer.zero_grad()
        a, v, out = i.model(i.audio, i.visual)
        logits = {"audio": i.model.head_audio(a), "visual": i.model.head_visual(v)}
        losses = {name: F.cross_entropy(z, i.labels) for name, z in logits.items()}
        method.backward(F.cross_entropy(out, i.labels), unimodal_losses=losses)
        i.optimizer.step()
