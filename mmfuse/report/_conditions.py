"""The model's outputs under every condition, from one pass over a loader."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..loop.masking import Baseline, called_with, check_inputs, masks_of
from ..noise import NoiseStream
from ._batches import Batch

#: Its kind, then what tells it from others of the kind.
Key = tuple[Any, ...]
#: Name, input and severity → the input with noise.
Corrupt = Callable[[str, Tensor, float], Tensor]

#: All outputs by key, and all labels.
Gathered = tuple[dict[Key, Tensor], Tensor]

#: With more modalities the 2^M passes of exact Shapley values are left out, unless asked for.
MOST_EXACT = 6


@dataclass
class Conditions:
    """The questions to a batch; one call gives the outputs of each condition.

    Attributes:
        model: Without DistributedDataParallel.
        names: The M ≥ 2 modalities.
        alone: Name → a model that was trained on this modality alone.
        shapley: True if all coalitions are needed.
        notes: The parts that had to be left out, in sentences.
    """

    model: Callable[..., Any]
    names: tuple[str, ...]
    baseline: Baseline
    severities: tuple[float, ...]
    corrupt: Corrupt | None
    alone: Mapping[str, Callable[..., Any]]
    shapley: bool
    forward: Callable[..., Any] | None
    output: Callable[[Any], Tensor] | None
    stream: NoiseStream
    notes: list[str] = field(default_factory=list)
    _batches: int = 0
    _single: int = 0

    @property
    def every(self) -> int:
        """The coalition of all modalities, as a mask of bits."""
        return (1 << len(self.names)) - 1

    def coalitions(self) -> list[int]:
        """All that are asked for; that of all modalities is the first."""
        if self.shapley:
            return list(range(self.every, -1, -1))
        single = [1 << m for m in range(len(self.names))]
        return list(dict.fromkeys([self.every, *single, *(self.every ^ one for one in single), 0]))

    def __call__(self, batch: Batch) -> Iterator[tuple[Key, Tensor]]:
        """Each condition's outputs for a batch."""
        check_inputs(self.model, batch.modalities, self.baseline)
        self._batches += 1
        self._single += len(batch.labels) == 1
        masks = masks_of(batch.modalities, self.baseline)
        for coalition in self.coalitions():
            given = {
                name: batch.modalities[name] if coalition >> m & 1 else masks[name]
                for m, name in enumerate(self.names)
            }
            masked = [name for m, name in enumerate(self.names) if not coalition >> m & 1]
            where = f"with {' and '.join(map(repr, masked))} masked" if masked else "for all inputs"
            yield ("masked", coalition), self._outputs(given, batch, where)
        for m, name in enumerate(self.names):
            for severity, noisy in self._noisy(m, name, batch.modalities[name]):
                given = {**batch.modalities, name: noisy}
                where = f"with noise of severity {severity} on {name!r}"
                yield ("noisy", name, severity), self._outputs(given, batch, where)
        for name, model in self.alone.items():
            found = model(batch.modalities[name].clone())
            if not isinstance(found, Tensor) and self.output is not None:
                found = self.output(found)
            what = f"unimodal_models[{name!r}]"
            if not isinstance(found, Tensor):
                raise TypeError(
                    f"{what} returns {type(found).__name__}, not a tensor: wrap it, as "
                    "lambda x: model(x).logits"
                )
            yield ("trained alone", name), finite(found, what)
        self.stream.advance()

    def check_means(self) -> None:
        """Notes batches of one sample, whose mean is the sample itself, so that nothing is masked.

        Raises:
            ValueError: there are no others.
        """
        if self.baseline != "mean" or not self._single:
            return
        if self._single == self._batches:
            raise ValueError(
                'baseline="mean" is the mean of a batch, but each batch of the loader has one '
                'sample, which would not be masked: take larger batches, or baseline="zero"'
            )
        self.notes.append(
            f"In {self._single} of {self._batches} batches nothing was masked: they have one "
            'sample, which is its own mean. Take batches of equal size, or baseline="zero".'
        )

    def _outputs(self, given: dict[str, Tensor], batch: Batch, where: str) -> Tensor:
        every = {**given, **batch.others}
        found = called_with(self.model, self.forward, self.output, where, every)
        return finite(found, f"the model {where}")

    def _noisy(self, m: int, name: str, x: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Severity → noisy input; the severities of a batch have the same noise in other sizes."""
        if self.corrupt is None and not x.is_floating_point():
            note = (
                f"Noise on {name} was left out: its input is {x.dtype}, to which nothing can be "
                "added. Give corrupt=."
            )
            if note not in self.notes and self.severities:
                self.notes.append(note)
            return
        for severity in self.severities:
            if self.corrupt is not None:
                found = self.corrupt(name, x.clone(), severity)
                if not isinstance(found, Tensor) or found.shape != x.shape:
                    kind = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                    raise ValueError(
                        f"corrupt= must return a tensor like the input of {name!r}, "
                        f"{list(x.shape)}; got {kind}"
                    )
                yield severity, found
            else:
                spread = float(x.detach().float().std(correction=0))
                if not math.isfinite(spread):
                    raise ValueError(
                        f"the input of {name!r} holds NaN or infinity, so that no size of the noise"
                        " can be told: give corrupt=, or severities=() to leave noise out"
                    )
                stream = self.stream.place([2 * m, 2 * m + 1])
                yield severity, ops.noisy_views(x, severity * spread, stream).first


def finite(found: Tensor, who: str) -> Tensor:
    """The tensor itself.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"{who} returns NaN or infinity, of which no metric can be taken; if masked inputs "
            'are the reason, give another baseline=, as "mean"'
        )
    return found


def features_of(
    encoders: Mapping[str, Callable[..., Any]], called: str, batch: Batch
) -> Iterator[tuple[Key, Tensor]]:
    """Each encoder's features of a batch, [B, D]."""
    for name, encoder in encoders.items():
        found = encoder(batch.modalities[name].clone())
        if not isinstance(found, Tensor) or found.dim() < 2:
            kind = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"{called}[{name!r}] must return features [B, ...], got {kind}: give a callable, "
                "as lambda x: net(x).last_hidden_state.mean(1)"
            )
        yield (called, name), finite(found.flatten(1), f"{called}[{name!r}]")


def gathered(
    read: Iterable[Batch], *asked: Callable[[Batch], Iterable[tuple[Key, Tensor]]]
) -> Gathered:
    """All batches' outputs of each key on the CPU, and all labels.

    Raises:
        ValueError: outputs have not one row for each label.
    """
    found: dict[Key, list[Tensor]] = defaultdict(list)
    labels: list[Tensor] = []
    for batch in read:
        for ask in asked:
            for key, value in ask(batch):
                if not value.dim() or len(value) != len(batch.labels):
                    raise ValueError(
                        f"for {len(batch.labels)} samples the output ({' '.join(map(str, key))}) "
                        f"has shape {list(value.shape)}; output= picks the tensor with a row for "
                        "each sample"
                    )
                wide = torch.promote_types(value.dtype, torch.float32)
                found[key].append(value.detach().to("cpu", wide, copy=True))
        labels.append(batch.labels.to("cpu", copy=True))
    return {key: torch.cat(parts) for key, parts in found.items()}, torch.cat(labels)
