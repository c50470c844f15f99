"""OPM as its authors' released code has it; `mmfuse.OPM.official` says how it differs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from .._numbers import flag, real
from ..loop.given import criterion_of
from ..ops._tensors import kept_tensor
from ..ops.modality_scores import named_scores
from ._opm_rule import Given, OPMResult, OPMRule, drop_probabilities
from .opm import OPM


@dataclass(frozen=True)
class OPMReleased(OPMRule):
    """The rule of the released code."""

    p_exe: float = 0.7
    theta_gradient: bool = True

    same_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("theta_gradient", self.theta_gradient)
        if not 0 <= real("p_exe", self.p_exe) <= 1:
            raise ValueError(f"p_exe must be a probability in [0, 1], got {self.p_exe}")

    def drop(self, opm: OPM, given: Given, q: Tensor) -> OPMResult:
        """Drops in a share of the steps; divides the rest by 1 − θ, and removes empty samples."""
        q = self._executed(opm, q)
        if self.theta_gradient and opm._acting and torch.is_grad_enabled():
            given = given._replace(features=self._with_theta_gradient(opm, given, q))
        with torch.no_grad():
            scale = 1 / (1 - _theta(given.features, q))
        dropped = opm.drop(given, q, scale)
        rows = dropped.keep.any(0).nonzero().squeeze(1)
        left = {name: feature[rows] for name, feature in dropped.features.items()}
        return replace(dropped, features=left, rows=rows)

    @torch.no_grad()
    def _executed(self, opm: OPM, q: Tensor) -> Tensor:
        """Q in a share of the steps, 0 in the others."""
        drawn = opm.agreed_stream().uniform(1, stream_id=opm.num_modalities)[0]
        return torch.where(drawn >= 1 - self.p_exe, q, 0.0)

    def _with_theta_gradient(self, opm: OPM, given: Given, q: Tensor) -> list[Tensor]:
        """The features; in the backward pass they also get the gradient of θ²/2, θ that of `q`."""
        features = given.features
        wanted = [m for m, feature in enumerate(features) if feature.requires_grad]
        called = [f"logits[{name!r}]" for name in given.names]
        if given.labels is None or given.present is not None or not given.logits:
            return features  # the released code has all modalities, and logits
        criterion = criterion_of(opm.criterion)
        own = named_scores(called, given.logits, given.labels, opm.backend, criterion).prob
        if not wanted or not own.requires_grad:
            return features
        # All ranks' scores, through which this rank's pass their gradients.
        s = given.scores + (own - own.detach())
        ratios = ((s.unsqueeze(1) / s).sum(1) - 1) / (len(s) - 1)
        # If q is 0, nothing is dropped in this step, and nothing depends on the ratio.
        probabilities = drop_probabilities(ratios, self.q_base, self.lam).to(q)
        half_square = _theta(features, torch.where(q > 0, probabilities, 0.0)).square() / 2
        found = torch.autograd.grad(
            half_square, [features[m] for m in wanted], retain_graph=True, allow_unused=True
        )
        if all(gradient is None for gradient in found):
            # Compiled, features and logits are two results of one graph, whose inside is unknown.
            self._warn_of_no_path()
        out = list(features)
        for m, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                out[m] = _AddToGradient.apply(features[m], gradient)
        return out

    def _warn_of_no_path(self) -> None:
        warnings.warn(
            "OPM.official: the logits do not depend on the features as autograd sees it, so that "
            "theta's gradient is left out. In a compiled forward pass, compile the encoders and "
            "the head alone; theta_gradient=False says that it is meant",
            RuntimeWarning,
            stacklevel=6,
        )


def _theta(features: list[Tensor], q: Tensor) -> Tensor:
    """0-d θ = Σ d_m q_m / Σ d_m, d_m the widths of the features."""
    sizes = tuple(math.prod(f.shape[1:]) for f in features)
    widths = kept_tensor(sizes, (len(sizes),), q.dtype, q.device)
    return (widths * q).sum() / widths.sum()


class _AddToGradient(torch.autograd.Function):
    """x; the backward pass adds a given tensor to its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, gradient = ctx.saved_tensors
        found = grads[0] + gradient
        return _Once.apply(found, x) if torch.is_grad_enabled() else found, None


class _Once(torch.autograd.Function):
    """A gradient that depends on x by more than its graph holds."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "OPM.official has no second derivative, because theta's gradient has none; "
            "theta_gradient=False leaves it out"
        )
