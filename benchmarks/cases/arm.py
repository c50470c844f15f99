"""ARM: a whole training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine import sequences
from engine.case import register
from engine.networks import AudioVisual, SharedHead
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, take_step
from engine.training_gate import pulled_step, true_class
from torch import Tensor
from torch.nn import functional as F

import mmfuse

from .shared_information import exact_arm


@register
class Training(TrainingCase):
    """The released rule, in which nothing is clamped."""

    name = "arm_training"
    title = "ARM: a whole training step"
    method = "ARM"
    network = SharedHead
    ops = ("modality_scores", "joint_entropies")

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
            a, v = model.features(i.audio, i.visual)
            weights = torch.ones(2, dtype=i.dtype, device=i.device)
            if regulated:
                with torch.no_grad():
                    weights = _weights(model, a, v, i).to(i.dtype)
            joint = torch.cat([weights[1] * v, weights[0] * a], dim=1)
            return [a, v], [], F.cross_entropy(model.fc(model.fc_out(joint)), i.labels)

        return pulled_step(i, forward)

    def plain(self, i: TrainingInputs) -> None:
        def losses(model: AudioVisual) -> Sequence[Tensor]:
            a, v = model.features(i.audio, i.visual)
            out = model.fc(model.fc_out(torch.cat([v, a], dim=1)))
            return [F.cross_entropy(out, i.labels)]

        take_step(i, losses)

    def official(self, i: TrainingInputs) -> None:
        sequences.arm.step(i.model, i.optimizer, i.audio, i.visual, i.labels, bins=i.workload.bins)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        model = i.model
        method = i.cached(
            ("ARM", backend), lambda: mmfuse.ARM.official(backend=backend).to(i.device)
        )
        i.optimizer.zero_grad()
        a, v = model.features(i.audio, i.visual)
        features = {"visual": v, "audio": a}
        fused = model.neck(torch.cat([v, a], dim=1))
        logits = {name: model.fc(feature) for name, feature in features.items()}
        out = method(features, fused, logits, model.fc(fused), i.labels)
        joint = torch.cat(list(out.features.values()), dim=1)
        F.cross_entropy(model.fc(model.fc_out(joint)), i.labels).backward()
        i.optimizer.step()


def _weights(model: AudioVisual, a: Tensor, v: Tensor, i: TrainingInputs) -> Tensor:
    """[2], of audio and visual, from the reference's counts."""
    c = model.neck(torch.cat([v, a], dim=1))
    p_a, p_v, p_c = (true_class(model.fc(x).double(), i.labels).mean() for x in (a, v, c))
    nmi_a, nmi_v, ncmi_a, ncmi_v = exact_arm((a, v, c), i.workload.bins, released=True)
    gain_a = p_c * nmi_a + p_v * (nmi_a - ncmi_a)
    gain_v = p_c * nmi_v + p_a * (nmi_v - ncmi_v)
    return torch.stack([gain_v / gain_a, gain_a / gain_v])
