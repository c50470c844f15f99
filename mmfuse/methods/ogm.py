"""OGM and OGM-GE: on-the-fly gradient modulation with generalization enhancement.

Peng, Wei, Deng, Wang & Hu, "Balanced Multimodal Learning via On-the-fly Gradient Modulation",
CVPR 2022; Wei, Hu, Du & Wen, "On-the-fly Modulation for Balanced Multimodal Learning", TPAMI 2024.

Every modality m gets a score S_m, how sure it alone is of the true classes, and a discrepancy ratio
rho_m, the mean of S_m / S_j over the other modalities. A modality that is ahead (rho_m > 1) has its
encoder's gradient scaled down by k_m; GE adds noise of the gradient's own standard deviation:

    TPAMI Eq. 11   k_m = max(0, 1 - alpha * tanh(rho_m - 1))     if rho_m > 1, else 1
    CVPR Eq. 10    k_m = 1 - tanh(alpha * rho_m)                 if rho_m > 1, else 1
    OGM            g <- k_m * g
    OGM-GE         g <- k_m * g + std(g) * N(0, 1),   per tensor, std taken before scaling
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._numbers import flag, real
from ..loop._parameters import Encoders
from ..loop.contract import (
    Act,
    Batch,
    Card,
    Clock,
    Common,
    Decision,
    Need,
    Sensed,
    Source,
    State,
    Stateless,
    Tensors,
)
from ..loop.gradients import GradientMethod
from ..loop.pairs import missing, stages
from ..loop.ranks import Observed
from ..loop.result import Result
from ..ops._tensors import check_named
from ..ops.modulation_factors import (
    Formula,
    check_strength,
    factors_before_update,
    factors_of_checked,
    noise_std,
)

Release = Literal["cvpr", "tpami"]
Noise = bool | Callable[[Tensor], Tensor]

# The released code adds this to the standard deviation of the noise.
_STD_EPS = 1e-8
# First and last epoch in which each release acts.
_EPOCHS = {"cvpr": (0, 50), "tpami": (6, 60)}
# A number to PyTorch's kernels, wherever the other operand is.
_ONE = torch.tensor(1.0, dtype=torch.float32)


@dataclass(frozen=True)
class OGMResult(Result):
    """The decision of one step; nothing here has waited for the device.

    Attributes:
        coefficients: [M] k_m, in the order of `encoders`.
        scores: [M] batch mean of the true class's probability.
        ratios: [M] discrepancy ratio rho_m.
        finite: 0-d bool, False if a modulated gradient holds a NaN or an Inf.
    """

    coefficients: Tensor
    scores: Tensor
    ratios: Tensor
    finite: Tensor


def ogm_coefficients(ratios: Tensor, alpha: float, formula: Formula = "tpami") -> Tensor:
    """k_m from rho_m: TPAMI Eq. 11 or CVPR Eq. 10; 1 where rho_m <= 1 or is NaN.

    A step takes them from `mmfuse.ops.modulation_factors`, which has the same formulas in one
    launch; a test holds both together.

    Args:
        ratios: [M] discrepancy ratios.
        alpha: Strength, at least 0.
        formula: "tpami" is continuous at rho = 1; "cvpr" jumps there to 1 - tanh(alpha).

    Returns:
        [M], in [0, 1].

    Raises:
        TypeError: `ratios` is no dense floating tensor, or `alpha` no number.
        ValueError: `alpha` is no finite number of the ratios' dtype, or there is no such formula.
    """
    check_named([ratios], lambda _: "ratios")
    if type(alpha) is not float:
        alpha = real("alpha", alpha)
    if not abs(alpha) <= torch.finfo(ratios.dtype).max:
        raise ValueError(f"alpha must be a finite number of {ratios.dtype}, got {alpha}")
    if formula == "tpami":
        # The maximum with 1 is the case rho <= 1, and fmax takes a NaN for the smaller number.
        k = torch.rsub(torch.fmax(ratios, _ONE).sub_(1.0).tanh_(), 1.0, alpha=alpha)
        return k.clamp_(min=0.0) if alpha > 1.0 else k
    if formula != "cvpr":
        raise ValueError(f"formula must be 'tpami' or 'cvpr', got {formula!r}")
    # An infinite ratio times an alpha of 0 is NaN.
    return torch.where((ratios > 1.0) & (alpha > 0), 1.0 - torch.tanh(alpha * ratios), 1.0)


@dataclass(frozen=True)
class OGMRule(Stateless):
    """The equations above, of paper and released code alike."""

    alpha: float = 0.8
    noise: Noise = True
    formula: Formula = "tpami"

    result = OGMResult

    def __post_init__(self) -> None:
        check_strength(self.alpha, self.formula)
        if not callable(self.noise):
            flag("noise", self.noise)

    @property
    def need(self) -> Need:
        """Statistics of the gradients, for GE's noise."""
        if not self.noise:
            return Need(stream=True, factors=True)
        made = self.noise if callable(self.noise) else None
        return Need(stats=True, stream=True, noise=made or "stream", factors=True)

    def idle(self) -> OGMRule:
        """Every coefficient is 1, and there is no noise: as many launches as OGM, none more."""
        return replace(self, alpha=0.0, noise=False)

    def sense(self, batch: Batch) -> Sensed:
        """S_m."""
        return Sensed(batch.scores.prob)

    def decide(self, state: State, seen: Observed, tensors: Tensors, clock: Clock) -> Decision:
        """rho_m, k_m and, for each tensor, k_m and the noise's standard deviation."""
        if seen.paired or seen.kind != "scores":
            scores, ratios, k = stages(seen)
            if k is None:
                k = ogm_coefficients(ratios, self.alpha, self.formula)
            k = torch.where(k.isnan(), 1.0, k)
            act = Act(scale=tensors.each(k))
            if tensors.stats is not None:
                # A zero gradient's noise would be of the number that is added to a deviation.
                std = noise_std(tensors.stats, _STD_EPS)
                std = torch.where(tensors.each(missing(seen)), 0.0, std)
                act = act._replace(noise_std=std)
            return Decision(act, (k, scores, ratios))
        means, started = seen.means.to(tensors.device), None
        rule = means, self.alpha, self.formula, tensors.owner
        if tensors.fused is not None:
            kernel, table = tensors.fused
            read = table if self.noise else None
            factors, started = factors_before_update(kernel, *rule, read, _STD_EPS)
        else:
            factors = factors_of_checked(tensors.backend, *rule, tensors.stats, _STD_EPS)
        act = Act(scale=factors.scale, noise_std=factors.noise_std)
        report = factors.coefficients, seen.means, factors.ratios
        return Decision(act, report, started=started)


class OGM(GradientMethod):
    """OGM or OGM-GE for a whole training run.

    ::

        ogm = mmfuse.OGM({"audio": model.audio_net, "visual": model.visual_net}, ends=50)
        for epoch in range(epochs):
            ogm.set_epoch(epoch)
            for batch, labels in loader:
                loss, logits = ...
                out = ogm.backward(loss, logits, labels)   # or loss.backward(); ogm.step(...)
                optimizer.step()

    Formulas: `mmfuse.methods.ogm`. Tested against them; `official()` against numbers that the
    authors' code computed.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
        alpha: Strength; the papers use 0.8 for CREMA-D and 0.1 for VGGSound.
        noise: True to add noise (OGM-GE), False for OGM. A callable gets each gradient and
            returns standard normal noise of its shape, such as ``torch.randn_like``, and is used
            instead of the stream.
        formula: "tpami", the TPAMI paper's Eq. 11, or "cvpr", the CVPR paper's Eq. 10, which both
            released codes use.
        **common: As in `mmfuse.GradientMethod`.

    Raises:
        TypeError: as `mmfuse.GradientMethod`.
        ValueError: as `mmfuse.GradientMethod`, or a hyper-parameter is out of range.
    """

    card: ClassVar[Card] = Card(
        "Peng et al., CVPR 2022; Wei et al., TPAMI 2024",
        "gradient",
        ("logits",),
        (
            Source("GeWu-Lab/OGM-GE_CVPR2022 at 343dc1d", golden=True, release="cvpr"),
            Source("GeWu-Lab/BML_TPAMI2024 at 4b3aa4f", golden=True, release="tpami"),
        ),
        golden=False,
    )
    rule: OGMRule

    def __init__(
        self,
        encoders: Encoders,
        *,
        alpha: float = 0.8,
        noise: Noise = True,
        formula: Formula = "tpami",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(OGMRule(alpha, noise, formula), encoders, **common)

    @classmethod
    def official(
        cls,
        encoders: Encoders,
        *,
        alpha: float = 0.8,
        noise: Noise = True,
        formula: Formula = "cvpr",
        release: Release = "cvpr",
        **common: Unpack[Common],
    ) -> OGM:
        """The method as the authors' code runs it on CREMA-D, to reproduce its tables.

        It takes CVPR Eq. 10, in both releases, for four-dimensional weights only. With
        ``noise=torch.randn_like`` the noise comes from PyTorch's generator, tensor by tensor, as it
        does there. Equal scores change nothing, where the releases slow one encoder down.

        Tested against numbers that the authors' code computed (GeWu-Lab/OGM-GE_CVPR2022 at
        343dc1d), for ``release="tpami"`` numbers that the authors' code computed
        (GeWu-Lab/BML_TPAMI2024 at 4b3aa4f), of a run with OPM as well. Three modalities and more
        are from the formulas.

        Args:
            encoders: As in `OGM`.
            alpha: As in `OGM`.
            noise: As in `OGM`.
            formula: As in `OGM`.
            release: "cvpr" acts in epochs 0 to 50 inclusive, "tpami" in epochs 6 to 60.
            **common: As in `OGM`.

        Raises:
            TypeError: as `OGM`.
            ValueError: as `OGM`, or there is no such release.
        """
        if release not in _EPOCHS:
            raise ValueError(f"release must be 'cvpr' or 'tpami', got {release!r}")
        starts, ends = _EPOCHS[release]
        settings: Common = {"select": "conv", "starts": starts, "ends": ends}
        settings.update(common)
        return cls(encoders, alpha=alpha, noise=noise, formula=formula, **settings)
