"""PMR: its own part of a step, and a whole training step."""

from __future__ import annotations

import torch
from engine import sequences
from engine.case import Case, register
from engine.gate import close
from engine.inputs import Inputs
from engine.networks import AudioVisual
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, joint_step
from engine.training_gate import backward, joint_forward, stepped, true_class
from engine.workloads import Workload
from torch import Tensor
from torch.nn import functional as F

import mmfuse

ALPHA = 1.0


class Near(Inputs):
    """Two features and a prototype for each class; the first is nearer to those of its class."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        rows, classes, width = workload.batch, workload.classes, workload.width
        self.labels = torch.randint(classes, (rows,), generator=self._generator, device=device)
        self.prototypes = [self._randn((classes, width), 1.0) for _ in range(2)]
        self.features = [
            (lead * c[self.labels] + self._randn((rows, width), 1.0)).requires_grad_()
            for lead, c in zip((0.1, 0.02), self.prototypes, strict=True)
        ]

    def drawn(self, loss: Tensor) -> list[Tensor]:
        """The features' gradients, of None zeros."""
        found = torch.autograd.grad(loss, self.features, allow_unused=True)
        pairs = zip(found, self.features, strict=True)
        return [torch.zeros_like(x) if grad is None else grad for grad, x in pairs]


@register
class Step(Case):
    """The path from features to their gradients, with existing prototypes; the released rule.

    The release scores unimodal logits as well, for a ratio that only a log
    shows; that is left out.
    """

    name = "pmr_step"
    title = "PMR: the loss, and gradients of the features"
    kind = "prototypes"
    ops = ("modality_scores",)
    autograd = True
    half = False
    workloads = (Workload("prototypes", "two features 64×512, 6 classes", "prototypes"),)
    make = staticmethod(Near)

    def check(self, provider: str, i: Near, result: list[Tensor]) -> None:
        features = [x.detach().double().requires_grad_() for x in i.features]
        near = [
            -(x.unsqueeze(1) - c.double()).square().sum(2).sqrt()
            for x, c in zip(features, i.prototypes, strict=True)
        ]
        scores = [float(true_class(z.detach(), i.labels).mean()) for z in near]
        behind = int(scores[1] < scores[0])
        loss = ALPHA * F.cross_entropy(near[behind], i.labels)
        (want,) = torch.autograd.grad(loss, [features[behind]])
        # A distance of some 32 is a sum of 512 squares, and decides by its small differences.
        close(
            "gradient of who is behind", result[behind], want, 1e-4, 1e-4 * float(want.abs().max())
        )
        close("gradient of the other", result[1 - behind], torch.zeros_like(want), 0)

    def official(self, i: Near) -> list[Tensor]:
        pairs = zip(i.features, i.prototypes, strict=True)
        near = [-sequences.pmr.distances(x, c) for x, c in pairs]
        score_a, score_v = (sequences.pmr.score(z, i.labels) for z in near)
        ratio = score_a / score_v
        loss_a, loss_v = (F.cross_entropy(z, i.labels) for z in near)
        weights = (0.0, ALPHA) if ratio > 1 else (ALPHA, 0.0)
        loss = weights[0] * loss_a + weights[1] * loss_v
        found = i.drawn(loss)
        [x.item() for x in (loss_a, loss_v)]
        return found

    def foreach(self, i: Near) -> list[Tensor]:
        pairs = zip(i.features, i.prototypes, strict=True)
        near = torch.stack([torch.cdist(x, c) for x, c in pairs]).neg()
        log_p = near.log_softmax(2).gather(2, i.labels.expand(2, -1).unsqueeze(2)).squeeze(2)
        scores = log_p.detach().exp().mean(1)
        behind = scores < scores.flip(0)
        return i.drawn(-ALPHA * torch.where(behind, log_p.mean(1), 0.0).sum())

    def mmfuse(self, i: Near, backend: str) -> list[Tensor]:
        def start() -> mmfuse.PMR:
            made = mmfuse.PMR.official(ALPHA, backend=backend).to(i.device)
            labels = torch.arange(i.workload.classes, device=i.device)
            # The mean of a class's one sample is that sample.
            given = dict(zip("av", i.prototypes, strict=True))
            made.update_prototypes([(given, labels)])
            made.set_epoch(0)
            return made

        method = i.cached(("PMR", backend), start)
        return i.drawn(method(dict(zip("av", i.features, strict=True)), i.labels).loss)


def prototypes(i: TrainingInputs) -> list[Tensor]:
    """[C, D] of both modalities; those of a class are far from nobody's."""
    width = i.model.fc.in_features // 2
    generator = torch.Generator().manual_seed(5)
    made = torch.randn(2, i.workload.classes, width, generator=generator)
    return list(made.to(i.device, i.dtype))


@register
class Training(TrainingCase):
    """A step with existing prototypes: they are made once in an epoch.

    The released rule, with a constant weight for the one behind and without entropies.
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
