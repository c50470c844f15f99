"""PMR: a whole training step."""

from __future__ import annotations

import torch
from engine import sequences
from engine.case import register
from engine.networks import AudioVisual
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, joint_step
from engine.training_gate import backward, joint_forward, stepped, true_class
from torch import Tensor
from torch.nn import functional as F

import mmfuse

ALPHA = 1.0


def prototypes(i: TrainingInputs) -> list[Tensor]:
    """[C, D] of both modalities; those of a class are far from nobody's."""
    width = i.model.fc.in_features // 2
    generator = torch.Generator().manual_seed(5)
    made = torch.randn(2, i.workload.classes, width, generator=generator)
    return list(made.to(i.device, i.dtype))


@register
class Training(TrainingCase):
    """With prototypes that are there: they are made once in an epoch.

    The released rule, with a constant weight for who is behind and without entropies.
    """

    name = "pmr_training"
    title = "PMR: a whole training step"
    method = "PMR"
    ops = ("modality_scores",)

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
            features, logits, loss = joint_forward(i)(model)
            near = [-torch.cdist(x, c) for x, c in zip(features, prototypes(i), strict=True)]
            audio, visual = (true_class(z, i.labels).mean() for z in near)
            behind = near[0] if audio < visual else near[1]
            return features, logits, loss + ALPHA * F.cross_entropy(behind, i.labels)

        seen = backward(i, forward if regulated else joint_forward(i))
        return stepped(i, [grad for _, grad in seen.named_gradients()])

    def plain(self, i: TrainingInputs) -> None:
        joint_step(i)

    def official(self, i: TrainingInputs) -> None:
        made = i.cached("prototypes", lambda: prototypes(i))
        sequences.pmr.step(
            i.model, i.optimizer, i.audio, i.visual, i.labels, prototypes=made, alpha=ALPHA
        )

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        def start() -> mmfuse.PMR:
            made = mmfuse.PMR.official(ALPHA, backend=backend).to(i.device)
            audio, visual = prototypes(i)
            labels = torch.arange(i.workload.classes, device=i.device)
            # The mean of a class's one sample is that sample.
            made.update_prototypes([({"audio": audio, "visual": visual}, labels)])
            made.set_epoch(0)
            return made

        method = i.cached(("PMR", backend), start)
        i.optimizer.zero_grad()
        a, v, out = i.model(i.audio, i.visual)
        seen = method({"audio": a, "visual": v}, i.labels)
        (F.cross_entropy(out, i.labels) + seen.loss).backward()
        i.optimizer.step()
