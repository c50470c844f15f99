"""The contract between a paper and the training loop: sense, decide, act.

A *rule* is one paper: its hyper-parameters, and functions from small tensors to small tensors. It
never sees an encoder, a gradient, another rank or an optimizer. `mmfuse.loop.gradients` has those,
and calls the rule in this order:

    sense     what one micro-batch shows: means and sums over its samples
    decide    the paper's equations: what becomes of each tensor's gradient
    settle    what the update has measured on the way, such as each gradient's square
    epoch     what changes when a new epoch begins

The state is a dictionary of tensors. A function returns those that change as new tensors; the loop
puts them in place where the step counts: not where a GradScaler skips it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from ..noise import NoiseStream
from ..ops import GradStats, ModalityScores
from ..ops._tensors import index_tensor
from ..ops.modulation_factors import Started
from ._parameters import Select, Shared
from .given import Kind, Loss
from .modalities import Modalities, per_modality, per_tensor
from .ranks import Group, Observed, agree, rank_and_size

State = Mapping[str, Tensor]
ApplyTo = Literal["gradient", "update"]
#: The place where a method acts; `Card` describes them.
Acts = Literal["gradient", "feature", "logits", "loss", "head", "parameter"]
#: Makes standard normal noise like a gradient.
MakesNoise = Callable[[Tensor], Tensor]


class Common(TypedDict, total=False):
    """The arguments that every method on gradients takes; `GradientMethod` describes them."""

    select: Select
    shared: Shared | None
    starts: int
    ends: int | None
    apply_to: ApplyTo
    process_group: Group
    criterion: Loss
    anchor_dtype: torch.dtype | None
    anchor_device: torch.device | str | None
    stream: NoiseStream | None
    name: str | None
    backend: str | None


#: The proof by `tests/golden`, as docstrings and documents say it.
BY_NUMBERS = "tested against numbers that the authors' code computed"


class Source(NamedTuple):
    """A release of the authors' code, which `official()` follows.

    Attributes:
        code: The repository and the commit.
        golden: True if numbers that this code has computed (`tests/golden`) prove it; else it is
            made from the formulas in it.
        release: Its name, where there are several.
    """

    code: str
    golden: bool
    release: str = ""

    @property
    def fidelity(self) -> str:
        """The proof that holds `official()` to it."""
        return BY_NUMBERS if self.golden else "tested against the formulas of the authors' code"


class Card(NamedTuple):
    """A method's entry in the catalogue, beside the needs of its rule.

    Attributes:
        paper: Authors, place and year.
        acts: Its place: between backward pass and optimizer on the "gradient"; in the forward
            pass on a "feature", on "logits", or as a part of the "loss"; in a step of each modality
            on a "head"'s gradient; between epochs on a "parameter".
        needs: The arguments that the user gives in a step, beside labels: "logits", "features" and
            "inputs" of each modality, "fused" representation and logits, "unimodal_losses".
        official: The releases that `official()` follows, its default first; none for a control,
            which has no code of authors to follow.
        golden: True if numbers from the authors' code also prove what the class is by default,
            without `official()`; else it is made from the paper's formulas.
        own_losses: True if its authors train on every modality's own loss as well, beside what the
            method itself needs.
        scales_back: True if its forward pass changes no value, and scales gradients on the way
            back. (Of methods on gradients `Need.scales` says that they scale.)
    """

    paper: str
    acts: Acts
    needs: tuple[str, ...]
    official: tuple[Source, ...]
    golden: bool
    own_losses: bool = False
    scales_back: bool = False

    @property
    def fidelity(self) -> str:
        """The proof that holds the class by default to its paper."""
        return BY_NUMBERS if self.golden else "tested against the paper's formulas"


class Need(NamedTuple):
    """A rule's needs, which the loop meets.

    Attributes:
        inputs: The arguments of `observe` and `step` beside logits and labels.
        stats: True if `decide` gets `grad_stats` of every tensor, of both lists if there are two.
        second: The second list of tensors that `Act.pull` multiplies. "anchor" are displacements
            w − w₀ from the parameters at the start of the epoch, which the loop keeps. "unimodal"
            are gradients of the unimodal losses, while the first list has the joint loss's.
        squares: When Σg² of each gradient, which `settle` gets, is taken; None if it gets none.
        stream: True if noise is drawn from the stream, in `sense` or for `Act.noise_std`.
        noise: The source of `Act.noise_std`'s noise: "stream", or a callable; None for no noise.
        draws: True if `sense` draws from the stream: then it advances, and `Clock.step` counts, in
            every step.
        neutral: The coefficient of a modality that nothing is done to.
        means: How many means for each modality `sense` returns.
        accuracy: True if the scores are shares of samples that a modality gets right, in the place
            of the true class's probability.
        factors: True if `decide` is `modulation_factors`, which then takes the statistics itself
            where it can: `Tensors.fused`.
    """

    inputs: tuple[str, ...] = ()
    stats: bool = False
    second: Literal["anchor", "unimodal"] | None = None
    squares: Literal["before", "after"] | None = None
    stream: bool = False
    noise: MakesNoise | Literal["stream"] | None = None
    draws: bool = False
    neutral: float = 1.0
    means: int = 1
    accuracy: bool = False
    factors: bool = False

    @property
    def anchors(self) -> bool:
        """True if the second list is of displacements."""
        return self.second == "anchor"

    @property
    def scales(self) -> bool:
        """True if a gradient gets a factor, and noise, alone: adaptive optimizers divide it out."""
        return self.second is None and self.squares is None


class Act(NamedTuple):
    """The change of each tensor's gradient: g ← scale·g + pull·second + noise_std·N(0, 1).

    [T] each, on the gradients' device; None leaves the term out, or the gradient its size.
    """

    scale: Tensor | None = None
    pull: Tensor | None = None
    noise_std: Tensor | None = None


class Decision(NamedTuple):
    """The result of `decide`.

    Attributes:
        act: The changes of the gradients.
        report: The fields of the rule's `result` but the last, which is `finite`; the first is
            the [M] coefficients.
        state: The tensors of the state that change.
        counted: [M] bool, the modalities that some sample has: of the others, `settle` gets squares
            of 0. None for all.
        started: The beginning of the update, if the decision has made it.
    """

    act: Act
    report: tuple[Tensor, ...]
    state: State = MappingProxyType({})
    counted: Tensor | None = None
    started: Started | None = None


class Sensed(NamedTuple):
    """The numbers that one micro-batch shows.

    Attributes:
        means: [K] means over the labelled samples, `Need.means` of each modality's scores.
        parts: The input of `Rule.sums`, where there is more than one micro-batch or rank.
        rows: The number of samples, for rules that number them.
    """

    means: Tensor
    parts: Any = None
    rows: int = 0


class Clock(NamedTuple):
    """The progress of training, counted from 0 on the host; `step` with `Need.draws` only."""

    epoch: int
    step: int


class Batch(NamedTuple):
    """One micro-batch, checked where the loop can.

    Attributes:
        scores: Each modality's, in the order of the modalities; tables of M·M numbers each, flat,
            where modalities are missing or the scores are the user's (see `mmfuse.loop.pairs`).
            With `Need.accuracy` there may be no log_prob.
        given: The inputs named in `Need.inputs`, M tensors each, in the order of the modalities.
        modalities: The encoders' names.
        state: The rule's.
        clock: Of the step.
        stream: The method's; `agreed_stream` to draw from it.
        process_group: The ranks.
        rows_before: Samples of this step's earlier micro-batches on this rank.
        present: [M, B] bool, which modalities each sample has; None if all have all.
        backend: Name of a backend; None for the best one.
    """

    scores: ModalityScores
    given: Mapping[str, Sequence[Tensor]]
    modalities: Modalities
    state: State
    clock: Clock
    stream: NoiseStream
    process_group: Group
    rows_before: int
    present: Tensor | None
    backend: str | None

    def agreed_stream(self) -> NoiseStream:
        """The stream, the same on all ranks."""
        agree(self.stream, self.process_group)
        return self.stream

    def first_row(self, rows: int) -> int:
        """The place of this batch's first sample among those of all ranks in this step."""
        rank, size = rank_and_size(self.process_group)
        return self.rows_before * size + rank * rows


class Tensors(NamedTuple):
    """T tensors with gradients, as a rule sees them: whose they are, and their statistics.

    Attributes:
        owner: Each one's modality.
        modalities: M, how many there are.
        device: The device of the gradients, and so of all [T] tensors.
        stats: `grad_stats` of the T gradients, of whole tensors and unscaled; None if the rule
            does not need them, or does nothing in this epoch.
        place: Each one's index among all parameters of the method; None if T is all of them.
        backend: Name of a backend; None for the best one.
        dtype: The dtype in which the update takes [T] tensors as they are: float32 if no gradient
            is float64.
        fused: The kernel and the table of gradients that `factors_before_update` takes, in the
            place of `stats`, with `Need.factors` and means that are no tables; None where it cannot
            be called.
    """

    owner: tuple[int, ...]
    modalities: int
    device: torch.device
    stats: GradStats | None
    place: tuple[int, ...] | None
    backend: str | None
    dtype: torch.dtype = torch.float64
    fused: tuple[Callable[..., Any], Tensor] | None = None

    def each(self, values: Tensor) -> Tensor:
        """Each tensor's value of its modality: [M] to [T], on the gradients' device."""
        return per_tensor(values.to(self.device), self.owner)

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each modality's tensors: [T] to [M]."""
        return per_modality(values, self.owner, self.modalities)

    def added_to(self, total: Tensor, values: Tensor) -> Tensor:
        """`total`, [one for every parameter of the method], with the [T] values added."""
        if self.place is None:
            return total + values
        return total.index_add(0, index_tensor(self.place, values.device), values)


class Rule(Protocol):
    """One paper, or one release of its authors' code."""

    @property
    def need(self) -> Need:
        """Its needs, which the loop meets."""

    @property
    def result(self) -> Callable[..., Any]:
        """The dataclass that a step returns."""

    def idle(self) -> Rule | None:
        """The rule outside of the epochs in which the method acts, with the same state.

        None lets the loop leave out what this rule decides.
        """

    def init(self, modalities: int, tensors: int) -> dict[str, Tensor]:
        """The state before training, on the CPU; every tensor that it will ever have."""

    def sense(self, batch: Batch) -> Sensed:
        """Means, and parts of sums, that one micro-batch shows."""

    def sums(self, sensed: Sensed, state: State) -> Tensor | None:
        """[E] sums over the samples beside the means, which add up over micro-batches and ranks."""

    def width(self, modalities: int) -> int:
        """E, for `modalities` modalities."""

    def check_takes(self, kind: Kind) -> None:
        """Raises a TypeError if `decide` cannot start from the user's ratios or coefficients."""

    def decide(self, state: State, seen: Observed, tensors: Tensors, clock: Clock) -> Decision:
        """The paper's equations.

        `seen` holds the parts of the one micro-batch on one rank, or else the sums of all. Its
        means may be tables, or the user's ratios or coefficients.
        """

    def settle(self, state: State, squares: Tensor, tensors: Tensors) -> State:
        """The tensors of the state that change with each gradient's Σg², [T] and unscaled."""

    def epoch(self, state: State, epoch: int, tensors: Tensors) -> State:
        """The tensors of the state that change before an epoch; `tensors` are all the method's."""


class Stateless:
    """A base for rules without a state, or without some of the stages."""

    def idle(self) -> Rule | None:
        """Leaves it to the loop."""
        return None

    def init(self, modalities: int, tensors: int) -> dict[str, Tensor]:
        """No state."""
        return {}

    def sums(self, sensed: Sensed, state: State) -> Tensor | None:
        """No sums beside the means."""
        return None

    def width(self, modalities: int) -> int:
        """No sums."""
        return 0

    def check_takes(self, kind: Kind) -> None:
        """Takes both."""

    def settle(self, state: State, squares: Tensor, tensors: Tensors) -> State:
        """Nothing changes."""
        return {}

    def epoch(self, state: State, epoch: int, tensors: Tensors) -> State:
        """Nothing changes."""
        return {}


def check_fits(method: str, need: Need, apply_to: str, anchored: bool, streamed: bool) -> None:
    """Checks that a method can use its arguments.

    Args:
        method: Its name.
        need: The needs of its rule.
        apply_to: "gradient" or "update".
        anchored: True if there are arguments for anchors.
        streamed: True if there is a stream.

    Raises:
        ValueError: it has no use for one of them.
    """
    if not isinstance(apply_to, str) or apply_to not in ("gradient", "update"):
        raise ValueError(f"apply_to must be 'gradient' or 'update', got {apply_to!r}")
    if apply_to == "update" and not need.scales:
        raise ValueError(f'{method} acts on gradients only; use apply_to="gradient"')
    if apply_to == "update" and callable(need.noise):
        raise ValueError('noise from a callable is for gradients; use apply_to="gradient"')
    if anchored and not need.anchors:
        raise ValueError(f"{method} keeps no anchors; leave out anchor_dtype and anchor_device")
    if streamed and not need.stream:
        raise ValueError(f"{method} draws no random numbers; leave out stream")
