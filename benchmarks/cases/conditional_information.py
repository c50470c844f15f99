"""`conditional_mutual_information`: what two modalities share beyond the fused feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine.case import Case, register
from engine.gate import close
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import joint_entropies as reference

from .mutual_information import TOLERANCE, bins_of, counts_of, entropy
from .shared_information import CONDITIONAL_BINS, FusionInputs


def _from_entropies(h_xz: Tensor, h_yz: Tensor, h_xyz: Tensor, h_z: Tensor) -> tuple[Tensor, ...]:
    h_x, h_y = h_xz - h_z, h_yz - h_z
    cmi = h_xz + h_yz - h_xyz - h_z
    return cmi, h_x, h_y, 2 * cmi / (h_x + h_y)


@register
class ConditionalInformation(Case):
    """A whole batch; the released ncmi has another denominator, see `arm_information`."""

    name = "conditional_information"
    title = "conditional_mutual_information"
    kind = "fusion"
    ops = ("joint_entropies",)
    passes = 1
    named_only = True
    make = staticmethod(FusionInputs)

    def check(self, provider: str, i: FusionInputs, result: Sequence[Tensor]) -> None:
        """Compares I(x; y | z), both entropies given z, and the normalised information."""
        rows = [feature.reshape(1, -1) for feature in i.features]
        found, _ = reference.joint_entropies(rows, [0, 1, 2], 3, CONDITIONAL_BINS)
        _, _, _, h_z, h_xz, h_yz, h_xyz = found[0, 0].unbind(-1)
        want = _from_entropies(h_xz, h_yz, h_xyz, h_z)
        names = ("information", "entropy of x", "entropy of y", "normalised information")
        for name, got, exact in zip(names, result, want, strict=True):
            close(name, got.reshape(()), exact, TOLERANCE, TOLERANCE)

    def foreach(self, i: FusionInputs) -> Sequence[Tensor]:
        rows = torch.stack([feature.flatten() for feature in i.features])
        indices = bins_of(rows, CONDITIONAL_BINS).unsqueeze(1)
        p = counts_of(*indices, bins=CONDITIONAL_BINS) / rows.shape[1]
        return _from_entropies(entropy(p, 2), entropy(p, 1), entropy(p), entropy(p, 1, 2))

    def mmfuse(self, i: FusionInputs, backend: str) -> Sequence[Tensor]:
        rows = [feature.flatten() for feature in i.features]
        return ops.conditional_mutual_information(*rows, CONDITIONAL_BINS, backend=backend)
