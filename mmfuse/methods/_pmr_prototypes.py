"""PMR's prototypes: class means of features, over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._devices import WIDE, known
from .._numbers import whole
from ..loop.epochs import EpochWindowModule
from ..loop.given import check_present
from ..loop.modalities import check_names
from ..loop.ranks import Group, Observed, over_ranks, several
from ..ops._arguments import check_sequence
from ._pmr_rule import PMRRule, check_labels

#: Rows of this label do not count.
IGNORED = -100

Named = Mapping[str, Tensor]
Batches = Iterable[tuple[Named, Tensor] | tuple[Named, Tensor, Named]]


@dataclass
class ClassSums:
    """Sums of features by class, batch after batch.

    Attributes:
        ordered: Checks features, and brings them into the order of the prototypes.
        modalities: M.
        classes: C; 0 for as many as the labels need.
        device: The device of the sums.
        names: The modalities, as the first batch has them.
        dtypes: Of their features.
        sums: [C, D] for each modality.
        counts: [C, M] samples.
    """

    ordered: Callable[[Named], Named]
    modalities: int
    classes: int
    device: torch.device
    names: list[str] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    counts: Tensor | None = None

    def add(self, features: Named, labels: Tensor, present: Named | None = None) -> None:
        """Adds a batch; `present` says which samples have which modality, if not all have all.

        Raises:
            TypeError: a feature or the labels have an unsupported type.
            ValueError: names, shapes or labels do not fit, or a feature is not finite.
        """
        features = self.ordered(features)
        self.names = self.names or list(features)
        check_names("features", features, self.names, "the prototypes")
        values = [features[name] for name in self.names]
        self.dtypes = self.dtypes or [value.dtype for value in values]
        check_labels(labels, len(values[0]))
        if not known(labels):
            raise ValueError("labels must be dense and have values, not on the meta device")
        masks = [torch.ones_like(labels, dtype=torch.bool)] * len(values)
        if present is not None:
            masks = [*check_present(self.names, present, len(labels), labels.device)]
        labels = labels.to(self.device)
        counted = labels != IGNORED
        least, most = torch.where(counted, labels, 0).aminmax() if len(labels) else (0, 0)
        if int(least) < 0 or (self.classes and int(most) >= self.classes):
            raise ValueError(
                f"labels are from {int(least)} to {int(most)}, but there are "
                f"{self.classes or 'no negative'} classes; rows of {IGNORED} do not count"
            )
        classes = self.classes or int(most) + 1
        wide = WIDE[self.device.type]
        rows = torch.arange(classes, device=self.device).unsqueeze(1) == labels
        # A product with 0 and 1, not atomic additions, whose order changes from run to run.
        members = rows.to(wide)
        found, members_of = [], []
        for name, value, mask in zip(self.names, values, masks, strict=True):
            x = value.detach().to(self.device, wide).flatten(1)
            here = counted & mask.to(self.device)
            # Rows that do not count may hold anything, and 0 times NaN is NaN.
            x = torch.where(here.unsqueeze(1), x, 0.0)
            if not bool(x.isfinite().all()):
                raise ValueError(f"features[{name!r}] holds a NaN or an Inf; it has no class means")
            found.append(members @ x)
            members_of.append(members @ here.to(wide))
        counts = torch.stack(members_of, 1)
        if self.counts is None:
            self.sums, self.counts = found, counts
            return
        for name, old, new in zip(self.names, self.sums, found, strict=True):
            if old.shape[1] != new.shape[1]:
                raise ValueError(
                    f"features[{name!r}] has {new.shape[1]} values a sample, "
                    f"in the first batch {old.shape[1]}"
                )
        self.sums = [_added(old, new) for old, new in zip(self.sums, found, strict=True)]
        self.counts = _added(self.counts, counts)

    def check_widths(self, widths: Iterable[int]) -> None:
        """Checks how many values a sample has.

        Raises:
            ValueError: more or fewer than the prototypes have.
        """
        for name, total, width in zip(self.names, self.sums, widths, strict=True):
            if width and total.shape[1] != width:
                raise ValueError(
                    f"features[{name!r}] has {total.shape[1]} values a sample, "
                    f"the prototypes have {width}"
                )


def _added(a: Tensor, b: Tensor) -> Tensor:
    """Their sum; classes that one of them lacks count 0."""
    classes = max(len(a), len(b))
    return sum(torch.nn.functional.pad(x, (0, 0, 0, classes - len(x))) for x in (a, b))  # type: ignore[return-value]


def class_sums(
    collected: ClassSums, batches: Batches, widths: list[int], process_group: Group
) -> tuple[list[Tensor], Tensor]:
    """Sums of features by class over all batches and ranks, [C, D] each, and their counts [C, M].

    Args:
        collected: This rank's sums, which are added to.
        batches: This rank's.
        widths: D of each modality; 0 where it is not known.
        process_group: The ranks.

    Raises:
        Exception: what `ClassSums.add` raises, here, and as a RuntimeError on the other ranks.
    """
    device = collected.device
    error: Exception | None = None
    try:
        if not isinstance(batches, Iterable):
            kind = type(batches).__name__
            raise TypeError(f"batches must be an iterable of (features, labels), got {kind}")
        for number, batch in enumerate(batches):
            if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
                raise TypeError(
                    "batches must give pairs (features, labels), or present as a third, got "
                    f"{type(batch).__name__} as number {number}; a single batch is "
                    "[(features, labels)]"
                )
            collected.add(*batch)
        if collected.counts is None:
            raise ValueError("batches is empty, so that there are no class means")
        collected.check_widths(widths)
    except Exception as raised:
        error = raised
    shape = [0] * (collected.modalities + 1)
    if error is None and collected.counts is not None:
        shape = [len(collected.counts), *(total.shape[1] for total in collected.sums)]
    group = several(process_group)
    if group is not None:
        # A rank may have seen fewer classes, or have failed; all have to send as many numbers.
        known = torch.tensor(shape, dtype=torch.int64, device=device)
        dist.all_reduce(known, op=dist.ReduceOp.MAX, group=group)
        most = known.tolist()
    else:
        most = shape

    def look() -> tuple[None, Observed]:
        if error is not None:
            raise error
        assert collected.counts is not None
        collected.check_widths(most[1:])
        rows = [collected.counts, *collected.sums]
        padded = [
            _added(part, part.new_zeros(most[0], 1).expand(-1, part.shape[1])) for part in rows
        ]
        one = collected.counts.new_ones(())
        return None, Observed(one.view(1), one, torch.cat([part.flatten() for part in padded]))

    every = [collected.modalities, *most[1:]]
    _, seen = over_ranks(look, process_group, 2 + most[0] * sum(every), device)
    assert seen.sums is not None
    counts, *sums = (
        part.view(most[0], -1) for part in seen.sums.split([most[0] * width for width in every])
    )
    return sums, counts


class PrototypeModule(EpochWindowModule):
    """A method with prototypes of every class in each modality, which are buffers."""

    rule: PMRRule
    num_modalities: int
    num_classes: int | None
    # True if there are prototypes; a step that looked at the buffers would wait for the device.
    _ready = False
    _origin = "the prototypes"

    def _begin_prototypes(self, num_classes: int | None, widths: Sequence[int] | None) -> None:
        count = self.num_modalities
        if num_classes is not None:
            num_classes = whole("num_classes", num_classes, least=1)
        self.num_classes = num_classes
        if widths is not None and not isinstance(widths, (list, tuple)):
            check_sequence("widths", widths, "integers")
        if widths is not None and (num_classes is None or len(widths) != count):
            raise ValueError(
                f"widths go with num_classes, one number for each of the {count} modalities; got "
                f"{list(widths)} with num_classes={num_classes}"
            )
        for m in range(count):
            shape = (0, 0)
            if widths is not None and num_classes is not None:
                shape = (num_classes, whole(f"widths[{m}]", widths[m], least=1))
            # Known on the CPU also within `torch.device("meta")`.
            self._first[_name(m)] = torch.full(shape, torch.nan, dtype=torch.float32, device="cpu")
            self.register_buffer(_name(m), torch.full(shape, torch.nan, dtype=torch.float32))
        self._begin_names()

    @property
    def prototypes(self) -> list[Tensor]:
        """[C, D] of each modality, in the order of `names`; NaN for a class without a sample."""
        return [getattr(self, _name(m)) for m in range(self.num_modalities)]

    @torch.no_grad()
    def update_prototypes(self, batches: Batches) -> None:
        """Takes class means over batches as the new prototypes, later mixed with the old ones.

        Call it before the first epoch and between epochs, on all ranks, with features that the
        encoders give in evaluation mode; each rank brings its part of the data. (Under FSDP2 in as
        many batches as the others, if a generator calls encoders.) It reads the labels on the host,
        for their range.

        Args:
            batches: Pairs of features, name → [B, …], and labels [B], of which rows of −100 do not
                count; with a third, name → [B] bool, which samples have the modality. One that no
                sample has keeps its prototypes. A generator runs without gradients.

        Raises:
            TypeError: a feature or the labels have an unsupported type.
            ValueError: there is no batch, a feature is not finite, or names, shapes or labels do
                not fit. Nothing has been changed then.
        """
        old, device = self.prototypes, self.epoch_state.device
        classes = len(old[0]) or self.num_classes or 0
        seen = ClassSums(self._features, self.num_modalities, classes, device)
        widths = [each.shape[1] for each in old]
        sums, counts = class_sums(seen, batches, widths, self.process_group)
        self._remember(seen.names)
        for m, (total, count) in enumerate(zip(sums, counts.unbind(1), strict=True)):
            means = total / count.unsqueeze(1)
            if old[m].numel():
                first = not self._ready or bool(old[m].isnan().all())
                moved = self.rule.prototype(old[m], means.to(old[m]), first)
                old[m].copy_(torch.where(count.any(), moved, old[m]))
            else:
                kept = torch.promote_types(seen.dtypes[m], torch.float32)
                with torch.inference_mode(False):  # or nothing could be written to it later
                    self._buffers[_name(m)] = torch.empty_like(means, dtype=kept).copy_(means)
        self._ready = True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets all buffers to what they are in a new object, but for the epoch, which stays."""
        for m, buffer in enumerate(self.prototypes):
            first = self._first[_name(m)]
            if first.shape != buffer.shape:
                self._buffers[_name(m)] = first.to(buffer.device, copy=True)
        super().reset_parameters()
        self._ready = False

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **keywords: Any
    ) -> None:
        """Takes the shapes of the state where there are no prototypes yet, or none in the state."""
        before = dict(self._buffers)
        for m, buffer in enumerate(self.prototypes):
            saved = state_dict.get(prefix + _name(m))
            if not isinstance(saved, Tensor) or saved.dim() != 2:
                continue
            if 0 in (saved.numel(), buffer.numel()):
                made = torch.empty_like(saved, device=buffer.device)
                self._buffers[_name(m)] = made.fill_(torch.nan)
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **keywords)
        except ValueError:
            self._buffers.update(before)
            raise
        self._ready = any(not bool(each.isnan().all()) for each in self.prototypes if each.numel())


def _name(m: int) -> str:
    return f"prototypes_{m}"
