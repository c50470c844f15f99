"""`shared_information`: ARM's normalised informations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import as_vector, close
from engine.inputs import Inputs
from engine.workloads import Workload
from torch import Tensor

from mmfuse.methods._arm_information import normalised_information, released_ncmi
from mmfuse.reference import joint_entropies as reference

from .mutual_information import TOLERANCE, bins_of, counts_of, entropy

#: The conditional mutual information has these.
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
    ops = ("shared_information",)
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
