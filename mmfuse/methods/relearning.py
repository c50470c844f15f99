"""ReLearning: diagnosing and re-learning.

Wei, Li, Feng & Hu, "Diagnosing and Re-learning for Balanced Multimodal Learning", ECCV 2024.

Every few epochs each encoder goes part of the way back to its initial parameters, so that it can
learn anew: further if its features separate the training data much better than unseen data:

    purity  P_m = share of samples in clusters whose commonest class is theirs; k-means, k = C
    weight  alpha_m = tanh(lam |P_m of the training data - P_m of the validation data|)
    reset   theta_m <- alpha_m theta_m at the start + (1 - alpha_m) theta_m

Features are scaled to (-1, 1) column by column first. The optimizer's momentum and the buffers of
batch norm stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._devices import known, narrowed
from .._numbers import finite, whole
from ..loop._parameters import Encoders, Select, Shared
from ..loop.anchors import Anchors
from ..loop.contract import Card, Source
from ..loop.epochs import EpochWindow
from ..loop.modalities import Modalities, check_names, per_tensor
from ..loop.ranks import Group, check_group
from ..loop.result import Result, method_text
from ..loop.state import check_format, saved_as
from ..ops import update_grads_
from ._relearning_purity import Cluster, Features, checked, purities


@dataclass(frozen=True)
class ReLearningResult(Result):
    """How far every encoder is to go back.

    Attributes:
        coefficients: [M] alpha_m, in the order of `encoders`, on their device; 0 for a modality
            that no training or no validation sample has.
        purities: [2, M] P_m of the training data, and of the validation data; NaN where none has m.
    """

    coefficients: Tensor
    purities: Tensor


@dataclass(frozen=True)
class ReLearningRule:
    """The equations above, of paper and released code alike, and when they are used."""

    lam: float = 3.0
    every: int = 20
    times: int = 3

    def __post_init__(self) -> None:
        if not (finite("lam", self.lam) and self.lam >= 0):
            raise ValueError(f"lam must be a finite number of at least 0, got {self.lam}")
        whole("every", self.every, least=1)
        whole("times", self.times, least=0)

    def weights(self, purities: Tensor) -> Tensor:
        """[M] alpha_m from [2, M] purities; 0 where one of them is not known."""
        return torch.tanh(self.lam * (purities[0] - purities[1]).abs()).nan_to_num(0.0)

    def due(self, epoch: int) -> bool:
        """True if encoders are reset at the end of this epoch."""
        return epoch > 0 and epoch % self.every == 0 and epoch // self.every <= self.times


class ReLearning(EpochWindow):
    """ReLearning, between epochs.

    ::

        relearning = mmfuse.ReLearning({"audio": audio_net, "visual": visual_net})  # untrained yet
        for epoch in range(epochs):
            ...                                # train on the joint loss
            if relearning.due(epoch):          # at the end of epochs 20, 40 and 60
                model.eval()                   # features: name → [N, D], of all samples
                seen = relearning.weights(*features_of(train), *features_of(validation))
                relearning.reset(seen.coefficients)

    Keeps one copy of the encoders' parameters, as they are when it is made, in its `state_dict`.
    Purities are of classes; for another task give `reset` numbers of your own.

    Formulas: `mmfuse.methods.relearning`. Tested against numbers that the authors' code computed.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
        lam: λ ≥ 0, how far a gap in purity sends an encoder back.
        every: Epochs between resets.
        times: How many resets there are.
        num_classes: C, the number of clusters; None for as many as the labels need.
        select: Which parameters are reset, as in `mmfuse.GradientMethod`. Those that are frozen
            stay as they are.
        shared: Parameters of no modality, as there; they stay as they are.
        starts: First epoch at whose end there may be a reset.
        ends: Last such epoch; None for no end.
        process_group: The ranks whose samples are clustered together, by the first of them, and
            which take its weights: None for all where torch.distributed is initialized, False for
            this rank alone.
        anchor_dtype: Of the copy; None for each parameter's own.
        anchor_device: Of the copy; None for each parameter's own.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: a parameter or a number is of a wrong type.
        ValueError: a hyper-parameter is out of range, or the encoders are no modalities.
    """

    card: ClassVar[Card] = Card(
        "Wei et al., ECCV 2024",
        "parameter",
        ("features",),
        (Source("GeWu-Lab/Diagnosing_Relearning_ECCV2024 at 025085e", golden=True),),
        golden=True,
    )

    def __init__(
        self,
        encoders: Encoders,
        *,
        lam: float = 3.0,
        every: int = 20,
        times: int = 3,
        num_classes: int | None = None,
        select: Select = "all",
        shared: Shared | None = None,
        starts: int = 0,
        ends: int | None = None,
        process_group: Group = None,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> None:
        self.rule: ReLearningRule = ReLearningRule(lam, every, times)
        if num_classes is not None:
            num_classes = whole("num_classes", num_classes, least=1)
        self.num_classes = num_classes
        self._set_window(starts, ends)
        self.process_group: Group = check_group(process_group)
        self.backend = backend
        self.modalities: Modalities = Modalities(encoders, select, shared)
        self.anchors: Anchors = Anchors(anchor_dtype, anchor_device, frozen=True)
        self.anchors.take(self.modalities.parameters)

    def __repr__(self) -> str:
        return method_text(self, f"acts={self.card.acts!r}")

    @classmethod
    def official(
        cls,
        encoders: Encoders,
        *,
        lam: float = 3.0,
        every: int = 20,
        times: int = 3,
        **keywords: Any,
    ) -> ReLearning:
        """The method as the authors' released code runs it: the same.

        Its program trains 50 epochs by default, which do not reach the third reset; the script
        beside it trains 90. It finds encoders by the names audio_net and visual_net.

        Tested against numbers that the authors' code computed
        (GeWu-Lab/Diagnosing_Relearning_ECCV2024 at 025085e).

        Args:
            encoders: As in `ReLearning`.
            lam: As in `ReLearning`.
            every: As in `ReLearning`.
            times: As in `ReLearning`.
            **keywords: As in `ReLearning`.
        """
        return cls(encoders, lam=lam, every=every, times=times, **keywords)

    def due(self, epoch: int | None = None) -> bool:
        """True if encoders are to be reset at the end of this epoch.

        Args:
            epoch: Counted from 0; None for that of `set_epoch`.

        Raises:
            TypeError: it is no integer.
            ValueError: it is negative.
        """
        if epoch is not None:
            self.set_epoch(epoch)
        return self.modulating and self.rule.due(self.epoch)

    def weights(
        self,
        train_features: Features,
        train_labels: Tensor,
        val_features: Features,
        val_labels: Tensor,
        *,
        train_present: Features | None = None,
        val_present: Features | None = None,
        cluster: Cluster | None = None,
    ) -> ReLearningResult:
        """How far every encoder is to go back; on the host, where k-means runs.

        Args:
            train_features: Name → [N, …] features of the training data, in evaluation mode; of
                this rank's part.
            train_labels: [N] class indices.
            val_features: Name → [N', …] features of data that was not trained on.
            val_labels: [N'] class indices.
            train_present: Name → [N] bool, which samples have the modality; None if all have all.
                P_m is of the samples that have m; what the others' features hold does not matter.
            val_present: Name → [N'] bool, likewise.
            cluster: Gives which of the clusters each sample is in, from features [N, D] in
                (−1, 1); None for scikit-learn's k-means.

        Raises:
            ImportError: there is no scikit-learn, and no `cluster`.
            TypeError: features, labels or masks have an unsupported type.
            ValueError: names, numbers or shapes do not fit, or a feature is not finite.
        """
        names = self.modalities.names
        measured = purities(
            lambda: (
                checked("train", names, train_features, train_labels, train_present),
                checked("val", names, val_features, val_labels, val_present),
            ),
            *(cluster, self.num_classes, self.process_group, names),
        )
        table = torch.tensor(measured, dtype=torch.float64)
        weights, device = self.rule.weights(table), self.modalities.device
        dtype = narrowed(table.dtype, device)
        found = (weights.to(device, dtype), table.to(device, dtype))
        return ReLearningResult(*found, modalities=names)

    @torch.no_grad()
    def reset(self, weights: Tensor | Mapping[str, Tensor | float]) -> None:
        """Takes all encoders back towards their initial parameters; one launch.

        Args:
            weights: [M] α_m in the order of `encoders`, or name → number, from 0 (stay) to 1
                (begin anew). All ranks give the same.

        Raises:
            TypeError: `weights` is of a wrong type.
            ValueError: names or numbers do not fit; nothing has been changed.
        """
        alpha = self._checked(weights)
        self.modalities.check_unchanged()
        trained = [p for p in self.modalities.parameters if p.requires_grad]
        active = self.modalities.held(trained)
        self.anchors.check(active, self.modalities.parameter_names)
        if not active.grads:
            return
        each = per_tensor(alpha, active.modality)
        for part, anchors in self.anchors.parts(active):
            # The parameter stands in the gradient's place: (1 − α) w + α w₀.
            device = active.grads[part][0].device
            pull = each[part].to(device, narrowed(each.dtype, device))
            update_grads_(
                active.grads[part], 1 - pull, params=anchors, pull=pull, backend=self.backend
            )

    def _checked(self, weights: Tensor | Mapping[str, Tensor | float]) -> Tensor:
        """[M] on the CPU, float64."""
        names = self.modalities.names
        if isinstance(weights, Mapping):
            check_names("weights", weights, names, "encoders")  # type: ignore[arg-type]
            weights = torch.tensor([float(weights[name]) for name in names], dtype=torch.float64)
        if not isinstance(weights, Tensor) or not known(weights):
            kind = type(weights).__name__
            raise TypeError(f"weights must be a dense tensor or map names to numbers, got {kind}")
        if weights.shape != (len(names),):
            raise ValueError(f"weights must have shape [{len(names)}], got {list(weights.shape)}")
        alpha = weights.detach().cpu().double()
        for name, value in zip(names, alpha.tolist(), strict=True):
            if not 0 <= value <= 1:
                raise ValueError(f"weights[{name!r}] must be in [0, 1], got {value}")
        return alpha

    def state_dict(self) -> dict[str, Any]:
        """The parameters at the start; of a sharded encoder each rank's part, as DTensors."""
        anchors = self.anchors.state_dict(self.modalities)
        return saved_as("ReLearning", self.modalities.names) | {"anchors": anchors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on with the start of the run that the state is from.

        Raises:
            ValueError: the state does not fit; nothing has been changed then.
        """
        check_format("ReLearning", state_dict, ["anchors"], self.modalities.names)
        self.anchors.load_state_dict(state_dict["anchors"], self.modalities)
