"""MLA: multimodal learning with alternating unimodal adaptation.

Zhang, Yoon, Bansal & Yao, "Multimodal Representation Learning by Alternating Unimodal Adaptation",
CVPR 2024; the formulas are those of the released code.

All modalities share one linear head, and take turns: the loss of head(phi_m) trains encoder m and
the head, and the optimizer steps before the next one's turn. So that a turn does not undo what the
others have taught the head, its gradient is projected away from the features that the head has
seen, by a running D x D matrix P, the identity at first, as in recursive least squares:

    mean feature   r = mean over the batch of phi_m, [1, D];  k = P r^T
    projector      P <- P - k k^T / (a + r k),  a = alpha^(1 + batch / batches)
                   P <- P / |P|, of the Frobenius norm
    gradient       G <- G P^T

The very first turn leaves both as they are. Predictions are weighed by how sure each modality is:

    fusion         z = sum_m w_m z_m,  w = softmax over m of -H(softmax z_m), sample by sample
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..loop.contract import Card, Source
from ..loop.epochs import EpochWindow, EpochWindowModule
from ..loop.given import Loss, check_mask
from ..loop.ranks import Group, Observed, over_ranks
from ..loop.result import Result
from ..loop.shards import is_dtensor, local_part, placed_gradient
from ..ops._tensors import FLOATING, why_unsupported
from ._mla_rule import MLAFusion, MLALatest, MLAReleased, MLARule, fused, may_be_empty, observed

__all__ = ["MLA", "MLAFusion", "MLAResult"]

_CODE = "Cecile-hi/Multimodal-Learning-with-Alternating-Unimodal-Adaptation"


@dataclass(frozen=True)
class MLAResult(Result):
    """The outcome of one turn; nothing here has waited for the device.

    Attributes:
        kept: 0-d, the projected gradient's norm over that of the gradient; 1 where it stays.
        alpha: 0-d, the regularisation a.
        finite: 0-d bool, False if gradient or features hold a NaN or an Inf: then nothing changes.
    """

    kept: Tensor
    alpha: Tensor
    finite: Tensor


class MLA(EpochWindowModule):
    """MLA on a head that all modalities share; the alternation is your loop's.

    ::

        model.mla = mmfuse.MLA(head, batches=len(loader))      # head: nn.Linear(D, C)
        for batch, labels in loader:
            features = {"audio": audio_net(...), "visual": visual_net(...)}
            for feature in features.values():                  # one modality after the other
                optimizer.zero_grad()
                F.cross_entropy(head(feature), labels).backward()
                model.mla.step(feature)
                optimizer.step()
        out = model.mla.fuse({name: head(feature) for name, feature in features.items()})

    `step` comes after the backward pass (and a GradScaler's unscaling) and before the optimizer's
    step, in every turn. The projector is a buffer of the dtype of the head's weight, at least
    float32; in a distributed run r is the mean over the samples of all ranks. FSDP2 may shard the
    head by its classes. Formulas: `mmfuse.methods.mla`. Tested against them; `official()` against
    numbers that the authors' code computed.

    Args:
        head: The linear layer, or any module with a `weight` [C, D]; the layer itself, where it is
            part of an `nn.Sequential`. It becomes no submodule of this one.
        num_modalities: M ≥ 2, the turns in each batch.
        alpha: The base of the regularisation a, positive.
        batches: Batches in an epoch, over which a falls from alpha to its square; None for an a
            that stays at alpha. Turns are counted where the step counts.
        starts: First epoch in which gradients are projected; see `set_epoch`.
        ends: Last such epoch; None for no end.
        process_group: The ranks whose samples r is averaged over: None for all where
            torch.distributed is initialized, False for this rank alone.
        backend: Name of a backend, for `fuse`; None for the best one.

    Raises:
        TypeError: the head has no floating weight [C, D].
        ValueError: a hyper-parameter is out of range, or the head is lazy and was not used yet.
    """

    card: ClassVar[Card] = Card(
        "Zhang et al., CVPR 2024",
        "head",
        ("features",),
        (
            Source(f"{_CODE} at 4735bbc", golden=True, release="first"),
            Source(f"{_CODE} at ab6c184", golden=True, release="head"),
        ),
        golden=False,
    )
    rule: MLARule
    projector: Tensor
    turns: Tensor

    def __init__(
        self,
        head: nn.Module,
        *,
        num_modalities: int = 2,
        alpha: float = 0.1,
        batches: int | None = None,
        starts: int = 0,
        ends: int | None = None,
        process_group: Group = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.rule = MLARule(alpha, batches)
        self._begin(num_modalities, starts, ends, process_group, backend)
        object.__setattr__(self, "_head", head)  # no submodule, whose weights a model saves twice
        weight = self._weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # On the CPU also within `torch.device("meta")`, where it would not be known later.
        self._begin_at("projector", torch.eye(weight.shape[1], dtype=dtype, device="cpu"))
        self.register_buffer("turns", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.to(weight.device)

    @classmethod
    def official(
        cls,
        head: nn.Module,
        *,
        release: str = "first",
        num_modalities: int = 2,
        alpha: float = 0.1,
        batches: int | None = None,
        **keywords: Any,
    ) -> MLA:
        """The method as the authors' released code runs it, to reproduce its tables.

        P loses k kᵀ divided entry by entry by a + k r, which is a matrix: an entry of it may be
        next to nothing. `fuse` gives NaN to a sample with a probability that has become 0. The
        release fuses with fixed weights (0.55 and 0.45) unless told otherwise. In its latest
        commit, "head", the projector is never applied: since 2024-03-18 the code looks for a
        parameter named "module.weight", and the layer that it looks at calls it "weight". "head" is
        plain alternation, and P stays the identity.

        Tested against numbers that the authors' code computed
        (Cecile-hi/Multimodal-Learning-with-Alternating-Unimodal-Adaptation at 4735bbc), and numbers
        that the authors' code computed
        (Cecile-hi/Multimodal-Learning-with-Alternating-Unimodal-Adaptation at ab6c184).

        Args:
            head: As in `MLA`.
            release: "first" or "head".
            num_modalities: As in `MLA`.
            alpha: As in `MLA`.
            batches: As in `MLA`; the release has the loader's length.
            **keywords: As in `MLA`.

        Raises:
            ValueError: there is no such release, or as `MLA`.
        """
        rules = {"first": MLAReleased, "head": MLALatest}
        if release not in rules:
            raise ValueError(f"release must be 'first' or 'head', got {release!r}")
        settings: Any = {"num_modalities": num_modalities, "alpha": alpha, "batches": batches}
        made = cls(head, **settings, **keywords)
        made.rule = rules[release](alpha, batches)
        return made

    def _weight(self) -> Tensor:
        """The head's, as it is now: `fully_shard` and others replace it."""
        head: Any = self._head
        weight = getattr(getattr(head, "module", head), "weight", None)
        if isinstance(weight, nn.UninitializedParameter):
            raise ValueError("head has not been used yet (lazy): call it once before MLA(head)")
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in FLOATING:
            raise TypeError(
                f"head must be a linear layer with a floating weight [C, D], got "
                f"{type(head).__name__}; of an nn.Sequential give the layer itself, head[-1]"
            )
        return weight

    @torch.no_grad()
    def step(self, features: Tensor, *, present: Tensor | None = None) -> MLAResult:
        """Takes a modality's features into P, and projects the gradient of the head's weight.

        In `eval()`, and outside of the method's epochs, nothing changes.

        Args:
            features: [B, D] that the head was given in this turn, or [B, …, D].
            present: [B] bool, which samples have the modality; None if all have. r is the mean over
                those. In a turn of a modality that no sample (of any rank) has P and the gradient,
                which may be missing, stay as they are; call `step` all the same, for turns count.

        Returns:
            `MLAResult`.

        Raises:
            RuntimeError: the head's weight has no gradient.
            TypeError: the features or the mask have an unsupported type.
            ValueError: shapes or devices do not fit; nothing has been changed.
        """
        if self.training:  # without gradients recorded, as between backward pass and optimizer
            EpochWindow._check_told(self, "MLA")
        grad, seen = over_ranks(
            lambda: self._look(features, present),
            self.process_group,
            len(self.projector) + 2,
            self.projector.device,
        )
        wide = torch.promote_types(self.projector.dtype, torch.float32)
        r, old = seen.means.to(wide), self.projector.to(wide)
        if present is not None:  # of no sample the mean is NaN
            r = torch.where(seen.count > 0, r, 0)
        assert seen.sums is not None
        finite = (seen.sums[0] == 0) & r.isfinite().all()
        a = self.rule.regularisation(self.turns, self.num_modalities).to(wide)
        one = torch.ones_like(a)
        if not (self.training and self._acting):
            return MLAResult(one, a, finite)
        moved, length = self.rule.moved(old, r, a)
        acts = finite & (self.turns > 0)
        if present is not None:
            acts = acts & (seen.count > 0)
        # A NaN or an Inf anywhere is one in the length.
        moves = acts & length.isfinite() & (length > 0)
        unscaled, length = torch.where(moves, moved, old), torch.where(moves, length, one)
        torch.div(unscaled, length, out=self.projector)
        self.turns.add_(finite)
        if grad is None:
            return MLAResult(one, a, finite)
        raw = grad.to(wide)
        found = torch.where(acts, raw @ self.projector.to(wide).T, raw)
        norm = torch.linalg.vector_norm
        kept = torch.where(found.ne(raw).any(), norm(found) / norm(raw), one)
        grad.copy_(found)
        return MLAResult(kept, a, finite)

    def _look(self, features: Tensor, present: Tensor | None) -> tuple[Tensor | None, Observed]:
        """The gradient, and r on this rank; with all checks."""
        weight, width = self._weight(), len(self.projector)
        if (why := why_unsupported(features)) is not None:
            raise TypeError(f"features must be a floating tensor [B, {width}]; it {why}")
        if features.dim() < 2 or features.shape[-1] != width:
            raise ValueError(f"features must be [B, {width}], got {list(features.shape)}")
        if present is not None:
            check_mask("present", present, len(features), features.device)
        if weight.grad is None and not may_be_empty(present):
            raise RuntimeError(
                "the head's weight has no gradient: call step after the backward pass of the "
                "modality's loss, and before zero_grad"
            )
        for what, tensor in (("features are", features), ("the head's weight is", weight)):
            if tensor.device != self.projector.device:
                raise ValueError(
                    f"{what} on {tensor.device}, the projector on {self.projector.device}: "
                    "make MLA a part of the model, or move it with to(device)"
                )
        placements = weight.placements if is_dtensor(weight) else ()  # type: ignore[attr-defined]
        if any(p.is_shard() and p.dim != 0 for p in placements):
            raise ValueError("head may be sharded by its classes, dimension 0, alone")
        grad = placed_gradient(weight)
        grad = None if grad is None else local_part(grad)
        dtype = torch.promote_types(self.projector.dtype, torch.float32)
        return grad, observed(features, present, grad, dtype)

    def fuse(
        self,
        logits: Mapping[str, Tensor],
        *,
        present: Mapping[str, Tensor] | None = None,
        criterion: Loss = None,
    ) -> MLAFusion:
        """Predictions of all modalities, each weighed by how sure it is of the sample.

        Args:
            logits: Name → [B, C] logits that the head gives to each modality; [B, C, d1, …], where
                each place has its own weights; or as `criterion` takes them.
            present: Name → [B] bool, which samples have the modality; the others weigh nothing, and
                the logits of a sample without any are 0.
            criterion: The loss that the logits are for: with ``nn.BCEWithLogitsLoss`` H is the sum
                of the entropies of all outputs, each a yes or no.

        Returns:
            `MLAFusion`.

        Raises:
            TypeError: logits are no floating tensors, or a mask is not of bools.
            ValueError: there are not two modalities, or shapes do not fit.
        """
        return fused(self.rule, logits, present, criterion, self.backend)
