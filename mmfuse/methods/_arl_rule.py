"""ARL's rule: how much larger a gradient becomes. `mmfuse.methods.arl` has the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._numbers import finite
from ..loop.result import Result


@dataclass(frozen=True)
class ARLResult(Result):
    """The decision of one step; nothing here has waited for the device.

    Attributes:
        features: Name → the feature, with its values as they were.
        coefficients: [M] 1 + w_m that the backward pass uses, in the order of `features`; 1 for a
            modality without another to compare with, whose w_m, v_m, H_m and u_m are NaN.
        scores: [M] batch mean of the true class's probability; None in `eval()` or without labels.
        weights: [M] w_m of this step's logits; None in `eval()`.
        magnitudes: [M] v_m; None in `eval()`.
        entropies: [M] H_m; None in `eval()`.
        certainties: [M] u_m; None in `eval()`.
    """

    features: dict[str, Tensor]
    coefficients: Tensor
    scores: Tensor | None = None
    weights: Tensor | None = None
    magnitudes: Tensor | None = None
    entropies: Tensor | None = None
    certainties: Tensor | None = None


@dataclass(frozen=True)
class ARLRule:
    """The equations above.

    Attributes:
        temperature: T.
        gamma: γ.
        release: Whose weights act: None for this step's.
    """

    temperature: float = 8.0
    gamma: float = 4.0
    release: Literal["later", "july"] | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "gamma"):
            value = getattr(self, name)
            if not (finite(name, value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")

    def decide(self, magnitudes: Tensor, entropies: Tensor) -> tuple[Tensor, ...]:
        """w_m, v_m, H_m and u_m, of [M] means."""
        count = len(magnitudes)
        v, h = _shares(magnitudes), _shares(entropies).clamp(min=0.6 / count)
        u = _shares(1 / h)
        others = (v.sum() - v) / (count - 1)
        return torch.softmax(self.temperature * others * u, 0), v, h, u

    def decide_by_pairs(
        self, magnitudes: Tensor, entropies: Tensor, compared: Tensor
    ) -> tuple[Tensor, ...]:
        """The same of tables [M, M], see `mmfuse.loop.pairs`; NaN for one compared with no other.

        A share follows from the mean over j of (value of j) / (value of m), each over what m and j
        share: v_m = 1 / (1 + (count - 1) mean_j V_jm / V_mj), of the `count` that are compared.

        Args:
            magnitudes: Means over the samples that two modalities share.
            entropies: Likewise.
            compared: [M, M] bool, which others share samples with each; none does with itself.
        """
        some = compared.any(1)
        count = some.sum().to(magnitudes)
        v = _shares_by_pairs(magnitudes, compared, count)
        h = _shares_by_pairs(entropies, compared, count)
        h = torch.maximum(h, 0.6 / count)
        u = torch.where(some, 1 / h, 0.0)
        u = u / u.sum()
        said = torch.where(some, v, 0.0)
        others = (said.sum() - said) / (count - 1)
        strength = torch.where(some, self.temperature * others * u, -torch.inf)
        found = torch.softmax(strength, 0), v, h, u
        return tuple(torch.where(some, x, torch.nan) for x in found)

    def in_force(self, new: Tensor, last: Tensor) -> Tensor:
        """The weights that act in this step, of its own and the last one's."""
        if self.release == "july":
            return torch.full_like(new, 1 / len(new))
        return last if self.release == "later" else new


def _shares(values: Tensor) -> Tensor:
    """Shares of their sum; even ones if it is 0, as where all modalities are certain."""
    total = values.sum()
    return torch.where(total == 0, 1 / len(values), values / total)


def _shares_by_pairs(table: Tensor, compared: Tensor, count: Tensor) -> Tensor:
    """[M] shares of the `count` that are compared with others; even ones of values that are 0."""
    total = table + table.T
    of_pair = torch.where(total == 0, 0.5, table / total)
    others = torch.where(compared, 1 / of_pair - 1, 0.0).sum(1) / compared.sum(1)
    return 1 / (1 + (count - 1) * others)
