"""OPM: a whole training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine import sequences
from engine.case import register
from engine.gate import PLAIN, ParityError
from engine.networks import AudioVisual
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, joint_step
from engine.training_gate import backward, check_parameters, joint_forward, pulled_step
from torch import Tensor
from torch.nn import functional as F

import mmfuse
from mmfuse.methods.opm import drop_probabilities

from .drop_modalities import kept_samples
from .modulation_factors import OPS as DECISION
from .modulation_factors import exact_decision

#: Probability of a modality that is just ahead, and how much it rises.
Q_BASE, LAMBDA = 0.5, 0.5


@register
class Training(TrainingCase):
    """A step that drops, which the released script does in a share of the steps.

    The released rule selects samples, for which it waits once; `mmfuse.OPM()`, which users get by
    default, removes no sample and does not wait. Both without θ's gradient, which would take one
    more pass through the scores.
    """

    name = "opm_training"
    title = "OPM: a whole training step"
    method = "OPM"
    ops = (*DECISION, "drop_modalities", "drop_modalities_backward")
    noisy = True

    def check(self, provider: str, i: TrainingInputs, result: Sequence[Tensor] | None) -> None:
        """Compares who was dropped, and the parameters after a step with the same ones dropped."""
        if provider == PLAIN:
            check_parameters(i, pulled_step(i, joint_forward(i)))
            return
        seen = i.cached("exact OPM", lambda: backward(i, joint_forward(i)))
        _, rho = exact_decision(seen.logits[1:], i.labels)
        q = drop_probabilities(rho, Q_BASE, LAMBDA)
        if any(len(feature) != len(i.labels) for feature in result):
            raise ParityError("a sample was removed, though one modality is never dropped")
        keep = kept_samples(provider, result, q, i.state)
        factors = (keep.unsqueeze(2) / (1 - q.mean())).to(i.dtype)

        def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
            features = model.features(i.audio, i.visual)
            dropped = [f * factor for f, factor in zip(features, factors, strict=True)]
            loss = F.cross_entropy(model.fc(torch.cat(dropped, dim=1)), i.labels)
            return dropped, [], loss

        check_parameters(i, pulled_step(i, forward))

    def plain(self, i: TrainingInputs) -> None:
        joint_step(i)

    def official(self, i: TrainingInputs) -> tuple[Tensor, ...]:
        seen = sequences.opm.step(
            i.model, i.optimizer, i.audio, i.visual, i.labels, theta_gradient=False
        )
        return tuple(feature.detach() for feature in seen.features)

    def mmfuse(self, i: TrainingInputs, backend: str) -> tuple[Tensor, ...]:
        def start() -> mmfuse.OPM:
            made = mmfuse.OPM.official(
                Q_BASE,
                LAMBDA,
                p_exe=1.0,
                theta_gradient=False,
                starts=0,
                stream=i.stream,
                backend=backend,
            )
            return made.to(i.device)

        method = i.cached(("OPM", backend), start)
        i.optimizer.zero_grad()
        a, v = i.model.features(i.audio, i.visual)
        features = {"audio": a, "visual": v}
        out = method(features, mmfuse.unimodal_logits(i.model.fc, features), i.labels)
        kept = tuple(out.features.values())
        F.cross_entropy(i.model.fc(torch.cat(kept, dim=1)), i.labels[out.rows]).backward()
        i.optimizer.step()
        return tuple(feature.detach() for feature in kept)
