"""Modality dropout at a fixed rate: the control that OPM has to beat.

Neverova, Wolf, Taylor & Nebout, "ModDrop: Adaptive Multi-Modal Gesture Recognition", TPAMI 2016,
leave out whole modalities at random, sample by sample, whichever is ahead:

    drop  phi_i^m <- 0 with probability q_m

A sample that would lose all that it has keeps one of them, each as likely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._numbers import MOST_MODALITIES, whole
from ..loop.contract import Card
from ..loop.drawing import DrawingModule
from ..loop.epochs import typed_as
from ..loop.given import check_present
from ..loop.modalities import check_names, named_features
from ..loop.ranks import Group, check_group
from ..loop.result import Result
from ..noise import NoiseStream
from ..ops._forward import check_forward
from ..ops._tensors import kept_tensor


@dataclass(frozen=True)
class ModalityDropoutResult(Result):
    """The features that are left; nothing here has waited for the device.

    Attributes:
        features: Name → the feature, zero where it was dropped; one that a sample lacks passes as
            it is.
        keep: [M, B] bool, in the order of `features`; False where it was dropped, or the sample
            lacks the modality.
    """

    features: dict[str, Tensor]
    keep: Tensor


class ModalityDropout(DrawingModule):
    """Leaves out modalities at random, between the encoders and the fusion.

    ::

        model.dropout = mmfuse.ModalityDropout(0.3)  # part of the model, so that eval() reaches it
        features = {"audio": audio_net(sounds), "visual": visual_net(images)}
        kept = model.dropout(features).features
        loss = F.cross_entropy(head(torch.cat(list(kept.values()), 1)), labels)
        model.eval()                                 # the features pass unchanged

    Kept features are not made larger.

    Formulas: `mmfuse.methods.modalitydropout`. Tested against them.

    Args:
        rates: Probability in [0, 1] that a sample loses a modality: a number for all, or name →
            number.
        num_modalities: M ≥ 2; with names that of the names.
        starts: First epoch in which features are dropped; see `set_epoch`.
        ends: Last such epoch; None for no end.
        process_group: The ranks, each of which draws numbers for its own part of the batch.
        stream: The random stream, whose state becomes a buffer; None makes one from
            `torch.initial_seed()` and `name`, at step 0. In a distributed run all take the first's.
        name: Of this object, where there are several: their streams differ by it.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: a rate is no number.
        ValueError: a rate is no probability, or there are fewer than two modalities.
    """

    _shown = ("names", "rates")
    card: ClassVar[Card] = Card(
        "Neverova et al., TPAMI 2016", "feature", ("features",), (), golden=False
    )

    #: Nothing is averaged over the ranks.
    decides_over_ranks: ClassVar[bool] = False

    def __init__(
        self,
        rates: float | Mapping[str, float] = 0.3,
        *,
        num_modalities: int = 2,
        starts: int = 0,
        ends: int | None = None,
        process_group: Group = None,
        stream: NoiseStream | None = None,
        name: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(rates)
        self._set_window(starts, ends)
        named = isinstance(rates, Mapping)
        count = len(rates) if isinstance(rates, Mapping) else num_modalities
        self.num_modalities: int = whole("num_modalities", count, 2, MOST_MODALITIES)
        self.names: tuple[str, ...] | None = tuple(rates) if isinstance(rates, Mapping) else None
        each = list(rates.values()) if isinstance(rates, Mapping) else [rates] * count
        called = [f"rates[{n!r}]" for n in rates] if isinstance(rates, Mapping) else ["rates"]
        for what, rate in zip(called, each, strict=named):
            _check_rate(what, rate)
        self.rates: tuple[float, ...] = tuple(map(float, each))
        self.process_group: Group = check_group(process_group)
        self.backend = backend
        self._begin_stream(stream, name)

    def forward(
        self, features: Mapping[str, Tensor], *, present: Mapping[str, Tensor] | None = None
    ) -> ModalityDropoutResult:
        """Drops modalities, sample by sample.

        Args:
            features: Name → [B, …] for the M modalities.
            present: Name → [B] bool, which samples have the modality; no sample loses the last one
                that it has. A feature that it lacks passes as it is, also in `eval()`: set it to
                zero for your head.

        Returns:
            `ModalityDropoutResult`, differentiable in the features.

        Raises:
            RuntimeError: it is called in a backward pass, by activation checkpointing.
            TypeError: a feature or a mask has an unsupported type.
            ValueError: names, numbers or shapes do not fit.
        """
        names, values = named_features("ModalityDropout", features, self.num_modalities)
        rows, device = values[0].shape[0], values[0].device
        if self.names is not None:
            check_names("features", features, self.names, "rates")
        here = torch.ones(len(names), rows, dtype=torch.bool, device=device)
        if present is not None:
            here = check_present(names, present, rows, device)
        if not self.training:
            return ModalityDropoutResult(dict(features), here, modalities=tuple(names))
        check_forward("ModalityDropout", self.epoch_state, "and would draw another mask there")
        self._check_told("ModalityDropout")
        if not self._acting:
            self._advance()
            return ModalityDropoutResult(dict(features), here, modalities=tuple(names))
        order = self.names or names
        rates = tuple(self.rates[order.index(name)] for name in names)
        q = kept_tensor(rates, (len(rates),), torch.float32, device)
        out = self.drop_features(names, values, q, None)
        saved = self._saved(here, out.keep & here)
        self._advance()
        found = {}
        for m, (name, x) in enumerate(zip(names, out.features, strict=True)):
            found[name] = torch.where(saved[m].view(-1, *[1] * (x.dim() - 1)), values[m], x)
        kept = (out.keep | saved) & here
        return ModalityDropoutResult(found, kept, modalities=tuple(names))

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...  # noqa: D102

    def _saved(self, here: Tensor, left: Tensor) -> Tensor:
        """[M, B] bool, which one is given back to a sample that has lost all."""
        lost = here.any(0) & ~left.any(0)
        count = here.sum(0)
        # The id after those of the modalities, whose numbers choose the dropped.
        drawn = self.agreed_stream().uniform(
            here.shape[1], stream_id=len(here), offset=self.first_row(here.shape[1])
        )
        place = torch.minimum((drawn.to(here.device) * count).long(), count - 1)  # drawn may be 1
        return lost & here & (here.cumsum(0) - 1 == place)


def _check_rate(what: str, rate: object) -> None:
    if not isinstance(rate, (int, float)) or isinstance(rate, bool):
        raise TypeError(f"{what} must be a number, got {type(rate).__name__}")
    if not 0 <= rate <= 1:
        raise ValueError(f"{what} must be a probability in [0, 1], got {rate}")
