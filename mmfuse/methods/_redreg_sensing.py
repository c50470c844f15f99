"""RedReg's senses: what it sees in a step, over micro-batches and ranks, and the inputs it drops.

`mmfuse.methods.redreg` has the paper and the equations.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from ..loop.modalities import Modalities
from ..loop.ranks import Group, Observations, Observed, agree, rank_and_size, several
from ..loop.state import State
from ..noise import NoiseStream
from ..ops._tensors import check_named
from ..ops.co_information_gate import named_gate
from ..ops.paired_cosine import aligned, paired_cosine
from ._redreg_equations import EPS, drop_probability, dropped
from ._redreg_monitor import Monitor


class Seen(NamedTuple):
    """One micro-batch.

    Attributes:
        scores: [M].
        names: What errors call the features.
        features: M tensors [B, D].
        redundancy: [M]; None in a step without a monitor.
        input_sq: [M] mean squares of the differences between the views; None likewise.
    """

    scores: Tensor
    names: list[str]
    features: list[Tensor]
    redundancy: Tensor | None = None
    input_sq: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many samples."""
        return len(self.features[0])

    def sums(self, threshold: Tensor, backend: str | None) -> Tensor:
        """[2M + 1], which add up over micro-batches and ranks; `together` takes them apart.

        The numerators and the denominators of the redundancy, and by how much the mean cosine of
        all pairs of modalities is above the gate's threshold, each times the number of samples.
        """
        rows, count = self.rows, len(self.features)
        if not rows:
            return threshold.new_zeros(2 * count + 1)
        pairs = combinations(self.features, 2)
        cosine = torch.stack([paired_cosine(a, b, backend=backend) for a, b in pairs]).mean()
        above = cosine - threshold
        if self.redundancy is None or self.input_sq is None:
            return torch.cat([above.new_zeros(2 * count), rows * above.unsqueeze(0)])
        square = self.input_sq + EPS
        parts = [self.redundancy * square, square, above.to(square).unsqueeze(0)]
        return rows * torch.cat(parts)


def together(seen: Observed, count: int, monitored: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scores, redundancy and gate of all micro-batches and ranks."""
    assert seen.sums is not None
    numerator, denominator, above = seen.sums.split([count, count, 1])
    redundancy = numerator / denominator if monitored else None
    return seen.means, redundancy, (above[0] > 0).to(seen.means)


class Sensing:
    """A mixin: the part of `mmfuse.RedReg` that looks at forward passes."""

    modalities: Modalities
    epochs: int
    monitor_every: int
    input_dropout: tuple[float, float, float] | None
    process_group: Group
    stream: NoiseStream
    backend: str | None
    epoch: int
    _monitor: Monitor
    _observations: Observations
    _rows: int
    _state: State
    _steps: int

    def drop_inputs(
        self, inputs: Mapping[str, Tensor], uniform: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Sets one modality's whole input to zero, or none; for the forward pass of training.

        Give the inputs as they were to `step`, whose monitor looks at those. Nothing is read on the
        host: which modality is dropped is decided on the device.

        Args:
            inputs: Name → tensor.
            uniform: 0-d number in [0, 1) that decides; None draws it from the stream.

        Returns:
            Name → tensor like the input.

        Raises:
            ValueError: names do not fit.
        """
        tensors = self.modalities.ordered("inputs", inputs)
        if self.input_dropout is None:
            return dict(zip(self.modalities.names, tensors, strict=True))
        p = drop_probability(self.input_dropout, self.epoch, self.epochs)
        if uniform is None:
            self._follow()
            agree(self.stream, self.process_group)
            uniform = self.stream.uniform(1, stream_id=2 * len(tensors)).squeeze(0)
        out = {}
        for m, (name, x) in enumerate(zip(self.modalities.names, tensors, strict=True)):
            here = dropped(uniform.to(x.device), p, m, len(tensors))
            out[name] = torch.where(here, 0.0, x)
        return out

    @torch.no_grad()
    def observe(
        self,
        logits: Mapping[str, Tensor],
        labels: Tensor,
        features: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> None:
        """Takes in what one micro-batch shows; `step` then uses all since the last step.

        The arguments and errors are those of `step`.
        """
        seen = self._see(logits, labels, features, inputs)
        self._add(seen, labels)
        self._rows += seen.rows

    def _check_started(self) -> None:
        if self.epoch < 0:
            raise RuntimeError(
                "RedReg.step: call start_epoch() first; it copies the parameters that gradients "
                "are compared with"
            )

    def _see(
        self,
        logits: Mapping[str, Tensor],
        labels: Tensor,
        features: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> Seen:
        """Scores of one micro-batch, its features, and its redundancy in a step with a monitor."""
        self._check_started()
        self._follow()
        names = self.modalities.names
        xs = self.modalities.ordered("inputs", inputs)
        check_named(xs, lambda m: f"inputs[{names[m]!r}]")
        h = self.modalities.scores(logits, labels, self.backend).prob
        labelled = [f"features[{name!r}]" for name in names]
        flat = [
            f.flatten(1) if isinstance(f, Tensor) and f.dim() > 2 else f
            for f in self.modalities.ordered("features", features)
        ]
        seen = Seen(h, labelled, aligned(labelled, flat))
        if not self._monitored():
            return seen
        agree(self.stream, self.process_group)
        rank, size = rank_and_size(self.process_group)
        first_row = self._rows * size + rank * seen.rows
        to = self._state["average"]
        redundancy, input_sq = (
            torch.stack([number.to(to) for number in numbers])
            for numbers in self._monitor(xs, self.stream, first_row)
        )
        return seen._replace(redundancy=redundancy, input_sq=input_sq)

    def _monitored(self) -> bool:
        """Whether redundancy is measured in this step."""
        return self._steps % self.monitor_every == 0

    def _add(self, seen: Seen, labels: Tensor) -> None:
        sums = seen.sums(self._state["gate_threshold"], self.backend)
        self._observations.add(seen.scores, labels, sums)

    def _all_seen(
        self, latest: Seen | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Scores, redundancy and gate of all micro-batches of the step, and of all ranks."""
        if latest is not None and not self._observations and several(self.process_group) is None:
            threshold = self._state["gate_threshold"]
            gate = named_gate(latest.names, latest.features, threshold, self.backend)
            found = latest.scores, latest.redundancy, gate
        else:
            if latest is not None and labels is not None:
                self._add(latest, labels)
            count = len(self.modalities.names)
            found = together(self._observations.take(), count, self._monitored())
        self._rows = 0
        return found

    def _follow(self) -> None:
        """Moves state and stream to where the encoders are now."""
        device = self.modalities.device
        self._state.follow(device)
        if self.stream.device != device:
            self.stream = self.stream.to(device)
