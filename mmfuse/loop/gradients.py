"""The loop around a rule that acts on gradients: everything in a training step but the paper."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from ..noise import NoiseStream, saved_state
from ..ops import GradStats
from .act import act_on, squares_of
from .anchors import Anchors
from .contract import Act, Batch, Clock, Decision, Rule, Sensed, Tensors
from .epochs import EpochWindow
from .modalities import Active, Encoder, Modalities, Select, given
from .ranks import Group, Observations, Observed, agree, several
from .state import FORMAT, State, check_format
from .updates import Decided, ScaledUpdates

ApplyTo = Literal["gradient", "update"]


class Common(TypedDict, total=False):
    """The arguments that every method on gradients takes; `GradientMethod` describes them."""

    select: Select
    starts: int
    ends: int | None
    apply_to: ApplyTo
    process_group: Group
    anchor_dtype: torch.dtype | None
    anchor_device: torch.device | str | None
    stream: NoiseStream | None
    backend: str | None


class GradientMethod(EpochWindow):
    """A method that acts between ``loss.backward()`` and ``optimizer.step()``.

    ::

        for epoch in range(epochs):
            method.set_epoch(epoch)
            for batch, labels in loader:
                loss, logits = ...
                loss.backward()
                method.step(logits, labels)      # or method.backward(loss, logits, labels)
                optimizer.step()

    `step` comes after AMP's unscaling and before clipping. With gradient accumulation, `observe`
    every micro-batch and `step` once: the accumulated gradient is treated by what all of them have
    shown. Under data parallelism (DDP, FSDP2) scores are averaged over the ranks, by their numbers
    of samples, and the noise is the same everywhere.

    Args:
        rule: The paper.
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities. Parameters are
            collected once; freezing and unfreezing them later is seen. Make this object after
            `fully_shard`, which replaces them.
        select: Which parameters take part: "all", "matrix" (ndim ≥ 2), "conv" (ndim = 4), or a
            callable on a parameter.
        starts: First epoch in which gradients are changed; see `set_epoch`.
        ends: Last such epoch; None for no end.
        apply_to: "gradient" (the papers), or "update" for adaptive optimizers, which divide a
            factor on the gradient out again: then the optimizer's update of the parameters is
            scaled, and gets noise of its own standard deviation. Pass every such optimizer to
            `attach`. Not for methods with anchors.
        process_group: The ranks whose samples the scores are averaged over; None for all ranks
            where torch.distributed is initialized, False for this rank alone.
        anchor_dtype: Of the epoch-start copies w₀ of methods that have them; ``torch.bfloat16``
            halves them, at the cost of w₀'s rounding in every displacement.
        anchor_device: Where they are; "cpu" frees the GPU of them and copies them there in every
            step.
        stream: The random stream; None makes one from `torch.initial_seed()`, at step 0. In a
            distributed run the first rank's is taken over by all.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: a parameter has an unsupported type, or `anchor_dtype` is not a floating dtype.
        ValueError: a modality has no parameter, a parameter is in two, `ends` is before `starts`,
            or an argument does not go with the method.
    """

    def __init__(
        self,
        rule: Rule,
        encoders: Mapping[str, Encoder],
        *,
        select: Select = "all",
        starts: int = 0,
        ends: int | None = None,
        apply_to: ApplyTo = "gradient",
        process_group: Group = None,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        stream: NoiseStream | None = None,
        backend: str | None = None,
    ) -> None:
        self.name = type(self).__name__
        self.rule = rule
        self._set_window(starts, ends)
        self._check_fits(apply_to, anchor_dtype, anchor_device)
        self.apply_to: ApplyTo = apply_to
        self.modalities = Modalities(encoders, select)
        self.process_group = process_group
        self.backend = backend
        self.anchors = Anchors(anchor_dtype, anchor_device) if rule.need.anchors else None
        self.stream = stream or self._new_stream()
        self._observations = Observations(self.name, process_group)
        self._updates: list[ScaledUpdates] = []
        self._warned = False
        self._steps = 0
        self._rows = 0  # of this step's earlier micro-batches
        self._adopt(rule)

    def _adopt(self, rule: Rule) -> None:
        """Takes a rule of the same needs, and begins its state anew."""
        self.rule = rule
        count, tensors = len(self.modalities.names), len(self.modalities.parameters)
        self._state = State(self.name, self.modalities.device, rule.init(count, tensors))

    def _check_fits(self, apply_to: str, dtype: torch.dtype | None, device: Any) -> None:
        need = self.rule.need
        if apply_to not in ("gradient", "update"):
            raise ValueError(f"apply_to must be 'gradient' or 'update', got {apply_to!r}")
        if apply_to == "update" and (need.anchors or need.squares):
            raise ValueError(f'{self.name} acts on gradients only; use apply_to="gradient"')
        if apply_to == "update" and need.noise is not None:
            raise ValueError('noise from a callable is for gradients; use apply_to="gradient"')
        if not need.anchors and (dtype is not None or device is not None):
            raise ValueError(f"{self.name} keeps no anchors; leave out anchor_dtype, anchor_device")

    def _new_stream(self) -> NoiseStream:
        return NoiseStream(device=self.modalities.device)

    # Epochs ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, counted from 0; that ends the one before.

        Copies the encoders, for methods with anchors. Without effect if this epoch runs already, as
        where a run is resumed within it.

        Raises:
            TypeError: it is no integer.
            ValueError: it is negative, or the encoders have other parameters than when this object
                was made.
        """
        before = self.epoch if self._told else None
        if self.anchors is not None:
            self.modalities.check_unchanged()
        super().set_epoch(epoch)
        if before == self.epoch:
            return
        if self.anchors is not None:
            self.anchors.take(self.modalities.parameters)
        self._follow()
        self._state.set(self.rule.epoch(self._state, self.epoch, self._all_tensors()))

    def begin(self) -> None:
        """Says that a new run begins: the next `set_epoch` begins its epoch whatever its number.

        Forgets what an unfinished step has observed. What was learned of earlier epochs stays; make
        a new object for a run that shall not know of them.
        """
        super().begin()
        self._forget()

    def _forget(self) -> None:
        self._observations.clear()
        self._rows = 0
        for update in self._updates:
            update.decided = None

    # Sense ----------------------------------------------------------------------------------------

    def observe(
        self,
        logits: Mapping[str, Tensor],
        labels: Tensor,
        features: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Takes in what one micro-batch shows; `step` then uses all since the last step.

        Args:
            logits: Name → [B, C] logits of each modality alone (see `mmfuse.unimodal_logits`).
            labels: [B] integer class indices; rows labelled −100 do not count.
            features: Name → [B, …] features, for methods that need them; others ignore them.
            inputs: Name → input of each encoder, likewise.

        Raises:
            RuntimeError: `set_epoch` was not called, for methods with anchors.
            TypeError: logits or labels have an unsupported type, or something is missing.
            ValueError: names, shapes or labels do not fit.
        """
        self._check_told()
        sensed = self._sense(logits, labels, features, inputs)
        self._add(sensed, labels)
        self._rows += sensed.rows

    @torch.no_grad()
    def _sense(
        self,
        logits: Mapping[str, Tensor],
        labels: Tensor | None,
        features: Mapping[str, Tensor] | None,
        inputs: Mapping[str, Tensor] | None,
    ) -> Sensed:
        self._follow()
        more = {"features": features, "inputs": inputs}
        needed = self.rule.need.inputs
        if labels is None or any(more[name] is None for name in needed):
            if needed:
                every = ", ".join(["logits", "labels", *needed[:-1]])
                raise TypeError(f"{every} and {needed[-1]} go together: give all or none")
            labels = given(labels)
        found = {name: self.modalities.ordered(name, more[name] or {}) for name in needed}
        batch = Batch(
            logits,
            labels,
            found,
            self.modalities,
            self._state,
            Clock(self.epoch, self._steps),
            self.stream,
            self.process_group,
            self._rows,
            self.backend,
        )
        return self.rule.sense(batch)

    @torch.no_grad()
    def _add(self, sensed: Sensed, labels: Tensor) -> None:
        sums = self.rule.sums(sensed, self._state)
        self._observations.add(sensed.means, labels, sums)

    def _take(self, sensed: Sensed | None, labels: Tensor | None) -> Observed:
        """Everything that was seen since the last step; the last micro-batch may still be new."""
        if sensed is not None and labels is not None:
            if not self._observations and several(self.process_group) is None:
                return Observed(sensed.means, None, None, labels, sensed.parts)
            self._add(sensed, labels)
        self._rows = 0
        return self._observations.take()

    # Decide and act -------------------------------------------------------------------------------

    def backward(
        self,
        loss: Tensor,
        logits: Mapping[str, Tensor],
        labels: Tensor,
        features: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        *,
        retain_graph: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Any:
        """Takes the place of ``loss.backward()``: back-propagates, then does what `step` does.

        Args:
            loss: The scalar loss.
            logits: As in `step`, and so are the others.
            labels: See `step`.
            features: See `step`.
            inputs: See `step`.
            retain_graph: As for ``loss.backward``.
            grad_scale: See `step`.
            found_inf: See `step`.
        """
        self._check_ready()
        sensed = self._sense(logits, labels, features, inputs)
        loss.backward(retain_graph=retain_graph)
        return self._step(sensed, labels, self._active(), grad_scale, found_inf)

    def step(
        self,
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Any:
        """Changes the gradients that a backward pass has left, before the optimizer's step.

        With ``apply_to="update"`` it only decides; the attached optimizers' next steps are scaled.
        A step with a NaN or an Inf in a gradient leaves state and stream as they were, since a
        GradScaler skips it.

        Args:
            logits: Name → [B, C] logits of each modality alone (see `mmfuse.unimodal_logits`), of
                the last micro-batch; None, as the next three, if all were given to `observe`.
            labels: [B] integer class indices; rows labelled −100 do not count.
            features: Name → [B, …] features, for methods that need them; others ignore them.
            inputs: Name → floating input of each encoder, likewise.
            grad_scale: 0-d factor by which the gradients are scaled still, where they cannot be
                unscaled before (see `mmfuse.amp.grad_scale`). It matters to methods with anchors.
            found_inf: Not zero where a GradScaler will skip this step for another reason than the
                encoders' gradients, which are looked at here (see `mmfuse.amp.found_inf`).

        Returns:
            The method's result, such as `OGMResult`.

        Raises:
            RuntimeError: nothing was observed, `set_epoch` was not called for a method with
                anchors, or ``apply_to="update"`` without `attach`.
            TypeError: a gradient, logits or labels have an unsupported type.
            ValueError: names, shapes or labels do not fit, or a parameter has changed its shape or
                device since `set_epoch`. Nothing has been changed then.
        """
        self._check_ready()
        active = self._active()
        sensed = None if logits is None else self._sense(logits, labels, features, inputs)
        return self._step(sensed, labels, active, grad_scale, found_inf)

    def _check_ready(self) -> None:
        self._check_told()
        if self.apply_to == "update" and not self._updates:
            name = self.name
            raise RuntimeError(f'{name}(apply_to="update"): pass the optimizer to attach() first')

    def _check_told(self) -> None:
        if self._told:
            return
        if self.anchors is not None:
            raise RuntimeError(
                f"{self.name}: call set_epoch(epoch) first, in every epoch; it copies the "
                "parameters that gradients are compared with"
            )
        if not self._warned and (self.ends is not None or self.starts > 0):
            self._warned = True
            warnings.warn(
                f"{self.name} was made with starts={self.starts}, ends={self.ends}, but set_epoch "
                "was never called: every epoch counts as the first; call set_epoch(epoch) in each",
                RuntimeWarning,
                stacklevel=3,
            )

    def _active(self) -> Active | None:
        """The gradients; None if updates are changed. Its errors come before anything changes."""
        if self.apply_to == "update":
            return None
        active = self.modalities.active()
        if self.anchors is not None:
            self.anchors.check(active, self.modalities.parameter_names)
        return active

    @torch.no_grad()
    def _step(
        self,
        sensed: Sensed | None,
        labels: Tensor | None,
        active: Active | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Any:
        seen = self._take(sensed, labels)
        self._follow()
        if active is None:
            return self._postpone(seen)
        need, on = self.rule.need, self.modulating
        device = active.grads[0].device if active.grads else self.modalities.device
        finite = torch.ones((), dtype=torch.bool, device=device)
        stats = None
        if need.stats and on and active.grads:
            stats = self._stats(active, grad_scale)
        tensors = self._tensors(active, device, stats)
        clock = Clock(self.epoch, self._steps)
        decision = self._decide(seen, tensors, clock)
        drawn, squares = self._act(active, decision.act, finite, grad_scale)
        if active.shards:  # what another rank's part holds shows in the sums alone
            sums = squares if squares is not None else None if stats is None else stats.m2
            if sums is not None:
                finite.logical_and_(sums.isfinite().all().to(finite.device))
        counts = self._counts(finite, squares, found_inf)
        if squares is not None:
            settled = self.rule.settle(self._state, squares.to(self._state.device), tensors)
            decision = decision._replace(state={**decision.state, **settled})
        self._state.set(decision.state, counts)
        self._steps += 1
        if drawn or need.draws:
            self.stream.advance(counts)
        return self.rule.result(*decision.report, finite=finite)

    def _decide(self, seen: Observed, tensors: Tensors, clock: Clock) -> Decision:
        decision = self.rule.decide(self._state, seen, tensors, clock)
        if self.modulating:
            return decision
        neutral = torch.full_like(decision.report[0], self.rule.need.neutral)
        return Decision(Act(), (neutral, *decision.report[1:]), decision.state)

    def _stats(self, active: Active, grad_scale: Tensor | None) -> GradStats:
        """Of whole tensors; unscaled where there are anchors, which are not scaled."""
        if self.anchors is None:
            return active.stats(self.backend)
        stats = self.anchors.stats(active, self.backend)
        if grad_scale is None:
            return stats
        scale = grad_scale.to(stats.mean)
        dot = None if stats.dot is None else stats.dot / scale
        return stats._replace(mean=stats.mean / scale, m2=stats.m2 / scale.square(), dot=dot)

    def _act(
        self, active: Active, act: Act, finite: Tensor, grad_scale: Tensor | None
    ) -> tuple[bool, Tensor | None]:
        """Changes the gradients; whether the stream was drawn from, and Σg² if it is needed."""
        need = self.rule.need
        squares = fused = None
        if need.squares == "before" and active.grads:
            if active.shards:  # merged over the ranks
                squares = squares_of(active, self.backend)
            else:  # by the update's own read
                fused = squares = torch.empty(
                    len(active.grads), dtype=torch.float64, device=finite.device
                )
        if act.pull is not None and grad_scale is not None:
            act = act._replace(pull=act.pull * grad_scale.to(act.pull))
        noise: Any = None
        if act.noise_std is not None:
            noise = need.noise or self.stream
        drawn = noise is not None and need.noise is None
        if drawn:
            agree(self.stream, self.process_group)
        act_on(
            active,
            act,
            finite,
            second=self.anchors,
            noise=noise,
            sq_norm=fused,
            backend=self.backend,
        )
        if need.squares == "after" and active.grads:
            squares = squares_of(active, self.backend)
        if squares is not None and grad_scale is not None:
            squares = squares / grad_scale.to(squares).square()
        return drawn, squares

    def _counts(self, finite: Tensor, squares: Tensor | None, found_inf: Tensor | None) -> Tensor:
        """Whether the step counts: not if a GradScaler skips it, nor if a sum overflows."""
        counts = finite
        if squares is not None:
            counts = counts & squares.isfinite().all()
        if found_inf is not None:
            counts = counts & (found_inf == 0).all().to(counts.device)
        return counts

    def _postpone(self, seen: Observed) -> Any:
        """Decides about updates that are to come."""
        device = self.modalities.device
        tensors = Tensors((), len(self.modalities.names), device, None, None, self.backend)
        decision = self._decide(seen, tensors, Clock(self.epoch, self._steps))
        self._state.set(decision.state)
        self._steps += 1
        finite = torch.ones((), dtype=torch.bool, device=device)
        stream = self.stream if self.rule.need.stats and self.modulating else None
        if stream is not None:
            agree(stream, self.process_group)
        state = None if stream is None else stream.state.clone()
        for update in self._updates:
            update.decided = Decided(decision.report[0], stream, state, finite)
        return self.rule.result(*decision.report, finite=finite)

    def _tensors(self, active: Active, device: torch.device, stats: GradStats | None) -> Tensors:
        whole = len(active.ids) == len(self.modalities.parameters)
        place = None if whole else tuple(active.ids)
        count = len(self.modalities.names)
        return Tensors(active.modality, count, device, stats, place, self.backend)

    def _all_tensors(self) -> Tensors:
        modalities = self.modalities
        owner, count = tuple(modalities.modality), len(modalities.names)
        return Tensors(owner, count, modalities.device, None, None, self.backend)

    def _follow(self) -> None:
        """Moves state and stream to where the encoders are now."""
        device = self.modalities.device
        self._state.follow(device)
        if self.stream.device != device:
            self.stream = self.stream.to(device)

    # Updates --------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scales this optimizer's updates of the encoders; for ``apply_to="update"``.

        The optimizer's step then needs one more copy of the encoders' parameters.

        Raises:
            TypeError: it is no optimizer.
            ValueError: ``apply_to`` is "gradient", or the optimizer has no parameter of the
                encoders, or is attached already.
        """
        if self.apply_to != "update":
            raise ValueError(f'attach is for {self.name}(..., apply_to="update")')
        if any(known.optimizer is optimizer for known in self._updates):
            raise ValueError(f"this {type(optimizer).__name__} is attached already")
        self._updates.append(ScaledUpdates(self.name, self.modalities, optimizer, self.backend))

    def detach(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves this optimizer's updates alone from now on, and frees the copy of the parameters.

        Raises:
            ValueError: it is not attached.
        """
        found = [known for known in self._updates if known.optimizer is optimizer]
        if not found:
            raise ValueError(f"this {type(optimizer).__name__} is not attached")
        found[0].remove()
        self._updates.remove(found[0])

    # State ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on with the same numbers, also within an epoch.

        As with an optimizer the tensors are the object's own: save them, or copy them.
        """
        found: dict[str, Any] = {
            "format": FORMAT,
            "method": self.name,
            "epoch": self.epoch if self._told else None,
            "step": self._steps,
            "stream": self.stream.state_dict(),
            "state": dict(self._state),
        }
        if self.anchors is not None:
            found["anchors"] = self.anchors.state_dict(self.modalities)
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: it is of another method or version, or an entry is missing or does not fit;
                nothing has been changed then.
        """
        others = ["anchors"] if self.anchors is not None else []
        check_format(self.name, state_dict, ["epoch", "step", "stream", "state", *others])
        self._state.check(state_dict["state"])
        saved_state(state_dict["stream"])
        if self.anchors is not None:
            self.anchors.load_state_dict(state_dict["anchors"], self.modalities)
        self._follow()
        self._state.load(state_dict["state"])
        self.stream.load_state_dict(state_dict["stream"])
        epoch = state_dict["epoch"]
        self._told = epoch is not None
        self.epoch = 0 if epoch is None else int(epoch)
        self._steps = int(state_dict["step"])
        self._forget()
