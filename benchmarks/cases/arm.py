"""ARM: normalised informations, and a whole training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import as_vector, close
from engine.inputs import Inputs
from engine.networks import AudioVisual, SharedHead
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, take_step
from engine.training_gate import pulled_step, true_class
from engine.workloads import Workload
from torch import Tensor
from torch.nn import functional as F

import mmfuse
from mmfuse.methods._arm_information import normalised_information, released_ncmi
from mmfuse.reference import joint_entropies as reference

from .mutual_information import TOLERANCE, bins_of, counts_of, entropy

#: Of the conditional mutual information.
CONDITIONAL_BINS = 2


class FusionInputs(Inputs):
    """Features of two modalities after a ReLU, and the fused representation."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.width)
        self.audio, self.visual = (self._randn(shape, 1.0).relu_() for _ in range(2))
        self.fused = 0.5 * self.audio - self.visual + self._randn(shape, 0.5)
        self.bins = workload.bins
        self.nbytes = 3 * self.fused.nbytes

    @property
    def features(self) -> tuple[Tensor, Tensor, Tensor]:
        """Audio, visual, fused."""
        return self.audio, self.visual, self.fused


def exact_arm(features: Sequence[Tensor], bins: int, *, released: bool) -> Tensor:
    """[4], nmi of both modalities and ncmi of both, from the reference's counts."""
    rows = [feature.reshape(1, -1) for feature in features]
    pairs, _ = reference.joint_entropies(rows, [0, 2, 1, 2], 2, bins)
    h_m, h_c, h_mc = pairs[:, 0].unbind(-1)
    triple, counts = reference.joint_entropies(rows, [0, 1, 2], 3, CONDITIONAL_BINS)
    if released:
        n = counts[0, 0].view([CONDITIONAL_BINS] * 3)
        ncmi = [released_ncmi(n.permute(order)) for order in ((0, 2, 1), (1, 2, 0))]
    else:
        h_a, h_v, h_av, _, h_ac, h_vc, h_avc = triple[0, 0].unbind()
        ncmi = [
            2 * (h_mz + h_cz - h_avc - h_z) / (h_mz + h_cz - 2 * h_z)
            for h_mz, h_cz, h_z in ((h_av, h_vc, h_v), (h_av, h_ac, h_a))
        ]
    return torch.stack([*(2 * (h_m + h_c - h_mc) / (h_m + h_c)), *ncmi])


@compiled(dynamic=False)
def _arm(rows: list[Tensor], bins: int) -> Tensor:
    pairs, _ = reference.joint_entropies(rows, [0, 2, 1, 2], 2, bins)
    triple, _ = reference.joint_entropies(rows, [0, 1, 2], 3, CONDITIONAL_BINS)
    h_m, h_c, h_mc = pairs[:, 0].unbind(-1)
    h_a, h_v, h_av, _, h_ac, h_vc, h_avc = triple[0, 0].unbind(-1)
    given, with_c = torch.stack([h_v, h_a]), torch.stack([h_vc, h_ac])
    ncmi = 2 - 2 * (h_avc - given) / (h_av + with_c - 2 * given)
    return torch.cat([2 - 2 * h_mc / (h_m + h_c), ncmi])


@register
class ArmInformation(Case):
    """All four quantities of a batch; NumPy's memory is not PyTorch's."""

    name = "arm_information"
    title = "ARM: nmi and ncmi"
    kind = "fusion"
    ops = ("joint_entropies",)
    passes = 1
    workloads = (Workload("fusion", "three features 64×512", "fusion"),)
    make = staticmethod(FusionInputs)

    def check(self, provider: str, i: FusionInputs, result: Tensor | Sequence[float]) -> None:
        """Compares both pairs, the released ncmi with its own closed form."""
        want = exact_arm(i.features, i.bins, released=provider == "official")
        close("nmi and ncmi", as_vector(result, i.device), want, TOLERANCE, TOLERANCE)

    def official(self, i: FusionInputs) -> tuple[float, ...]:
        return sequences.arm.information(*i.features, i.bins)

    def foreach(self, i: FusionInputs) -> Tensor:
        rows = torch.stack([feature.flatten() for feature in i.features])
        indices = bins_of(rows, i.bins)
        p = counts_of(indices[:2], indices[2].expand(2, -1), bins=i.bins) / rows.shape[1]
        h_m, h_c = entropy(p, 2), entropy(p, 1)
        nmi = 2 - 2 * entropy(p) / (h_m + h_c)
        a, v, c = bins_of(rows, CONDITIONAL_BINS).unsqueeze(1)
        p = counts_of(a, v, c, bins=CONDITIONAL_BINS) / rows.shape[1]
        h_avc, h_av = entropy(p), entropy(p, 3)
        given = torch.cat([entropy(p, 1, 3), entropy(p, 2, 3)])  # v, a
        with_c = torch.cat([entropy(p, 1), entropy(p, 2)])
        ncmi = 2 - 2 * (h_avc - given) / (h_av + with_c - 2 * given)
        return torch.cat([nmi, ncmi])

    def compile(self, i: FusionInputs) -> Tensor:
        return _arm([feature.view(1, -1) for feature in i.features], i.bins)

    def mmfuse(self, i: FusionInputs, backend: str) -> Tensor:
        rows = [feature.view(1, -1) for feature in i.features]
        found = normalised_information(rows, i.bins, CONDITIONAL_BINS, backend=backend)
        return torch.cat(found).squeeze(1)


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
