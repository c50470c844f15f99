"""RedReg's rule: what it senses, and its equations in their order.

`mmfuse.methods.redreg` has the paper; each equation of a step is a function of
`mmfuse.reference.redundancy_pull`, those of the epochs are in `_redreg_equations`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..loop.contract import Act, Batch, Clock, Decision, Need, Sensed, State, Stateless, Tensors
from ..loop.given import Kind
from ..loop.pairs import own
from ..loop.ranks import Observed
from ..loop.result import Result
from ..ops._tensors import check_named
from ..ops.co_information_gate import gate_of_aligned
from ..ops.paired_cosine import aligned, paired_cosine
from ..ops.redundancy_pull import RedundancyRule, RedundancyState, redundancy_pull_of_checked
from . import _redreg_equations as equations
from ._redreg_equations import EPS
from ._redreg_monitor import Monitor

#: The parts of the state that a step changes.
_HISTORY = ("scores", "steps", "redundancy", "average", "average_weight")

Projection = Literal["tensor", "encoder"]


@dataclass(frozen=True)
class RedRegResult(Result):
    """Scores and decision of one step; nothing here has waited for the device.

    Attributes:
        coefficients: [M] beta_m after the gate, in the order of `encoders`.
        scores: [M] h_m, batch mean of the true class's probability.
        growth: [M] s_m, the gain's growth rate.
        redundancy: [M] red_m, of this step or of the last one that was monitored.
        phase: [M] r_m; above `threshold` the modality is taken to be redundant.
        gate: 0-d, 0 or 1, whether the modalities agree.
        finite: 0-d bool, False if a gradient holds a NaN or an Inf after the step.
    """

    coefficients: Tensor
    scores: Tensor
    growth: Tensor
    redundancy: Tensor
    phase: Tensor
    gate: Tensor
    finite: Tensor


class Seen(NamedTuple):
    """The parts of one micro-batch.

    Attributes:
        features: M tensors [B, D], contiguous and of one dtype.
        backend: Name of a backend; None for the best one.
        redundancy: [M]; None in a step without a monitor.
        input_sq: [M] mean squares of the differences between the views; None likewise.
        present: [M, B] bool, which modalities each sample has; None if all have all.
    """

    features: list[Tensor]
    backend: str | None
    redundancy: Tensor | None = None
    input_sq: Tensor | None = None
    present: Tensor | None = None

    def above(self, threshold: Tensor) -> Tensor:
        """The mean cosine of all pairs of modalities less the threshold; 0-d.

        If some are missing, the sum of the pairs' shared samples over the number of all: its
        sign is that of the mean.
        """
        cosines = []
        for m, j in combinations(range(len(self.features)), 2):
            a, b = self.features[m], self.features[j]
            if self.present is None:
                cosines.append(paired_cosine(a, b, backend=self.backend) - threshold)
                continue
            both = self.present[m] & self.present[j]
            # A row of zeros has the cosine 0.
            a, b = (torch.where(both.unsqueeze(1), x, 0.0) for x in (a, b))
            share = both.to(threshold).mean()
            cosines.append(paired_cosine(a, b, backend=self.backend) - threshold * share)
        return torch.stack(cosines).mean()


@dataclass(frozen=True, kw_only=True)
class RedRegRule(Stateless):
    """The rule of the paper; `mmfuse.RedReg` describes the hyper-parameters."""

    epochs: int
    threshold: float
    gamma: float
    beta: float
    window: int
    momentum: float
    agreement: tuple[float, float]
    projection: Projection
    monitor_every: int
    monitor: Monitor | None = field(default=None, repr=False)

    #: The redundancy's moving average is freed of the bias of its beginning at 0.
    unbiased: ClassVar[bool] = True

    result = RedRegResult
    need: ClassVar[Need] = Need(
        inputs=("features", "inputs"),
        stats=True,
        second="anchor",
        stream=True,
        draws=True,
        neutral=0.0,
    )

    def __post_init__(self) -> None:
        equations.check_hyperparameters(
            self.epochs,
            self.beta,
            self.window,
            self.momentum,
            self.projection,
            self.monitor_every,
        )

    def init(self, modalities: int, tensors: int) -> dict[str, Tensor]:
        """The history of gains, the redundancy and its average, and the gate's threshold."""

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64)

        return {
            # h_m of the last W + 1 steps, the latest in the last column.
            "scores": zeros(modalities, self.window + 1),
            "steps": torch.zeros(modalities, dtype=torch.int64),
            "redundancy": zeros(modalities),
            "average": zeros(modalities),
            "average_weight": zeros(modalities),  # what the average's coefficients add up to
            "gate_threshold": zeros(),
        }

    def _monitored(self, clock: Clock) -> bool:
        return clock.step % self.monitor_every == 0

    def sense(self, batch: Batch) -> Sensed:
        """h_m, the features, and in a step with a monitor the redundancy."""
        names, xs = batch.modalities.names, batch.given["inputs"]
        check_named(xs, lambda m: f"inputs[{names[m]!r}]")
        h = batch.scores.prob
        labelled = [f"features[{name!r}]" for name in names]
        flat = [
            f.flatten(1) if isinstance(f, Tensor) and f.dim() > 2 else f
            for f in batch.given["features"]
        ]
        seen = Seen(aligned(labelled, flat), batch.backend, present=batch.present)
        rows = len(seen.features[0])
        if self._monitored(batch.clock):
            to = batch.state["average"]
            assert self.monitor is not None
            first = batch.first_row(rows)
            found = self.monitor(xs, batch.agreed_stream(), first, batch.present)
            redundancy, input_sq = (
                torch.stack([number.to(to.device) for number in numbers]).to(to)
                for numbers in found
            )
            if batch.present is not None:
                here = batch.present.any(1).to(redundancy.device)
                redundancy = torch.where(here, redundancy, torch.nan)
            seen = seen._replace(redundancy=redundancy, input_sq=input_sq)
        return Sensed(h, seen, rows)

    def sums(self, sensed: Sensed, state: State) -> Tensor | None:
        """[2M + 1], which add up over micro-batches and ranks; `_together` takes them apart.

        The numerators and the denominators of the redundancy, and by how much the mean cosine of
        all pairs of modalities is above the gate's threshold, each times the number of samples.
        """
        seen: Seen = sensed.parts
        threshold, rows, count = state["gate_threshold"], sensed.rows, len(seen.features)
        if not rows:
            return threshold.new_zeros(2 * count + 1)
        above = seen.above(threshold)
        if seen.redundancy is None or seen.input_sq is None:
            return torch.cat([above.new_zeros(2 * count), rows * above.unsqueeze(0)])
        square = seen.input_sq + EPS
        changed = seen.redundancy * square
        if seen.present is not None:  # 0 / 0 where no sample has it
            here = seen.present.any(1).to(square.device)
            changed, square = torch.where(here, changed, 0.0), torch.where(here, square, 0.0)
        parts = [changed, square, above.to(square).unsqueeze(0)]
        return rows * torch.cat(parts)

    def width(self, modalities: int) -> int:
        """The sums above."""
        return 2 * modalities + 1

    def check_takes(self, kind: Kind) -> None:
        """Takes coefficients."""
        if kind == "ratios":
            raise TypeError("RedReg has no ratios; give scores, or coefficients beta_m")

    def _together(
        self, seen: Observed, state: State, count: int, clock: Clock
    ) -> tuple[Tensor | None, Tensor]:
        """Redundancy and gate of all micro-batches and ranks."""
        if seen.parts is not None:
            only: Seen = seen.parts
            threshold = state["gate_threshold"]
            if only.present is not None:
                return only.redundancy, (only.above(threshold) > 0).to(seen.means)
            return only.redundancy, gate_of_aligned(only.features, threshold, only.backend)
        assert seen.sums is not None
        numerator, denominator, above = seen.sums.split([count, count, 1])
        redundancy = numerator / denominator if self._monitored(clock) else None
        return redundancy, (above[0] > 0).to(seen.means)

    def decide(self, state: State, seen: Observed, tensors: Tensors, clock: Clock) -> Decision:
        """Growth, phase, strength and gate of each modality; c of each tensor: in one launch."""
        if seen.kind == "coefficients":
            return self._decided(seen.means.nan_to_num(0.0), state, tensors)
        compared = seen.tables()[0] if seen.paired else seen.means
        redundancy, gate = self._together(seen, state, tensors.modalities, clock)
        device = tensors.device
        found = redundancy_pull_of_checked(
            tensors.backend,
            compared.to(device).contiguous(),
            None if redundancy is None else redundancy.to(device),
            gate.to(device),
            RedundancyState(*[state[name].to(device) for name in _HISTORY]),
            self._equations,
            tensors.owner,
            tensors.stats,
        )
        h = own(compared) if seen.paired else compared
        new = dict(zip(_HISTORY, found.state, strict=True))
        seen_now = (h, found.growth, found.state.redundancy, found.phase, gate)
        act = Act() if tensors.stats is None else Act(found.scale, found.pull)
        return Decision(act, (found.coefficients, *seen_now), new)

    @property
    def _equations(self) -> RedundancyRule:
        """The numbers of `mmfuse.reference.redundancy_pull`, which has the equations."""
        by_encoder = self.projection == "encoder"
        numbers = self.momentum, self.gamma, self.beta, self.threshold
        return RedundancyRule(*numbers, self.unbiased, by_encoder)

    def _decided(self, beta: Tensor, state: State, tensors: Tensors) -> Decision:
        """Decides by the user's beta_m; nothing enters the history. Rare, and so without an op."""
        nothing = torch.full_like(beta, torch.nan)
        report = (beta, nothing, nothing, state["redundancy"].clone(), nothing, nothing[0])
        return Decision(self._act(beta, tensors), report)

    def _act(self, beta: Tensor, tensors: Tensors) -> Act:
        if tensors.stats is None:
            return Act()
        c = self._share(tensors)
        pull = tensors.each(beta).to(c)
        # 1 outright where nothing is pulled: there the share may be anything.
        scale = torch.where(pull == 0, 1.0, 1.0 - pull * c)
        return Act(scale=scale, pull=pull)

    def _share(self, tensors: Tensors) -> Tensor:
        """[T] c, of each tensor or of all tensors of its encoder together."""
        assert tensors.stats is not None and tensors.stats.dot is not None
        dot, square = tensors.stats.dot, tensors.stats.sq_norm
        if self.projection == "tensor":
            return equations.share(dot, square)
        return tensors.each(equations.share(tensors.sums(dot), tensors.sums(square)))

    def epoch(self, state: State, epoch: int, tensors: Tensors) -> State:
        """The gate's threshold in this epoch."""
        threshold = equations.gate_threshold(self.agreement, epoch, self.epochs)
        return {"gate_threshold": torch.full_like(state["gate_threshold"], threshold)}


class RedRegReleased(RedRegRule):
    """The rule of the released code; `RedReg.official` says how it differs."""

    #: The moving average counts as it is.
    unbiased: ClassVar[bool] = False

    def epoch(self, state: State, epoch: int, tensors: Tensors) -> State:
        """Every epoch has a history of its own."""
        anew = ("scores", "steps", "average", "average_weight")
        begins = {name: torch.zeros_like(state[name]) for name in anew}
        # Over an average of nothing, the redundancy of the last epoch would be of any size.
        begins["redundancy"] = torch.full_like(state["redundancy"], torch.nan)
        return {**begins, **super().epoch(state, epoch, tensors)}
