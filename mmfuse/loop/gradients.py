"""The loop around a rule that acts on gradients: everything in a training step but the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..noise import NoiseStream
from ..ops._arguments import check_stream
from ..ops._eager import Eager
from ._observing import Observes
from ._parameters import Encoders, Select, Shared
from .anchors import Anchors
from .contract import ApplyTo, Clock, Rule, Tensors, check_fits
from .epochs import EpochWindow
from .given import Loss, More, check_criterion, scaler_numbers
from .modalities import Modalities
from .ranks import Group
from .result import method_text, names_for
from .resume import Resumes
from .sense import Senses
from .stage import take_step
from .state import State
from .two_gradients import check_loss, checked_losses, two_gradients
from .updates import ActsOnUpdates, AttachedOptimizers


class GradientMethod(EpochWindow, Observes, ActsOnUpdates, Resumes):
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
    every micro-batch and `step` once: the accumulated gradient is changed by the scores of all of
    them. Under data parallelism (DDP, FSDP2) scores are averaged over the ranks, by their numbers
    of samples, and the noise is the same everywhere.

    `observe`, `step` and `backward` take more by keyword, all of it name → value. Micro-batches of
    one step, and ranks, must be given the same of it.

    - ``present``: [B] bool, which samples have the modality. Two modalities are then compared over
      the samples that have both, so that missing samples fake no dominance. A modality that is
      missing from the whole batch keeps its gradients and its histories, if it has any.
    - ``scores``: one positive number for each modality in place of logits and labels, higher is
      better (see `mmfuse.scores`); NaN for one that is missing. Micro-batches and ranks are
      averaged by ``count``, 1 unless given.
    - ``ratios`` or ``coefficients``: the same, one or two steps further in the method's formulas.

    Args:
        rule: The method's formulas; subclasses such as `mmfuse.OGM` set it.
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities. Parameters are
            collected once; freezing and unfreezing them later is seen. Make this object after
            `fully_shard`, which replaces them.
        select: Which parameters take part: "all", "matrix" (ndim ≥ 2), "conv" (ndim = 4), or a
            callable on a parameter.
        shared: Parameters of no modality, which stay as they are even where encoders hold them: a
            module, a parameter, or several of them, such as layers that all modalities go through.
        starts: First epoch in which gradients are changed; see `set_epoch`.
        ends: Last such epoch; None for no end.
        apply_to: "gradient" (the papers), or "update" for adaptive optimizers, which divide a
            factor on the gradient out again: then the optimizer's update of the parameters is
            scaled, and gets noise of its own standard deviation. Pass every such optimizer to
            `attach`. Not for methods with anchors.
        process_group: The ranks whose samples the scores are averaged over; None for all ranks
            where torch.distributed is initialized, False for this rank alone.
        criterion: The loss that logits and labels are for: `nn.CrossEntropyLoss` (its `weight` and
            `ignore_index` count; label smoothing changes the loss only) or
            `nn.BCEWithLogitsLoss`, for several labels or a single logit; None for
            ``nn.CrossEntropyLoss()``. See `mmfuse.ops.modality_scores` for the scores.
        anchor_dtype: Of the epoch-start copies w₀ of methods that have them; ``torch.bfloat16``
            halves them, at the cost of w₀'s rounding in every displacement.
        anchor_device: Of these copies; "cpu" frees the GPU, and copies them to it in every step.
        stream: The random stream; None makes one from `torch.initial_seed()`, the method and the
            encoders' names, at step 0. In a distributed run all take over the first rank's.
        name: Of this object, where there are several with encoders of the same names: their
            streams differ by it.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: a parameter has an unsupported type, or `anchor_dtype` is not a floating dtype.
        ValueError: a modality has no parameter of its own, a parameter is in two and not in
            `shared`, `ends` is before `starts`, or an argument does not go with the method.
    """

    def __init__(
        self,
        rule: Rule,
        encoders: Encoders,
        *,
        select: Select = "all",
        shared: Shared | None = None,
        starts: int = 0,
        ends: int | None = None,
        apply_to: ApplyTo = "gradient",
        process_group: Group = None,
        criterion: Loss = None,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        stream: NoiseStream | None = None,
        name: str | None = None,
        backend: str | None = None,
    ) -> None:
        self.name: str = type(self).__name__
        self._set_window(starts, ends)
        anchored = anchor_dtype is not None or anchor_device is not None
        check_fits(self.name, rule.need, apply_to, anchored, stream is not None)
        self.apply_to: ApplyTo = apply_to
        self.modalities: Modalities = Modalities(encoders, select, shared)
        self.process_group: Group = process_group
        self.criterion: Loss = check_criterion(criterion)
        self.backend = backend
        self.anchors: Anchors | None = (
            Anchors(anchor_dtype, anchor_device) if rule.need.anchors else None
        )
        on_meta = self.modalities.device.type == "meta"
        self.stream = self._new_stream(name) if stream is None else check_stream(stream, on_meta)
        self._updates = AttachedOptimizers(self.name, self.modalities, backend)
        self._clock = Clock(0, 0)
        self._adopt(rule)

    def _adopt(self, rule: Rule) -> None:
        """Takes a rule of the same needs, and begins its state anew."""
        self.rule: Rule = rule
        self._need = rule.need
        self._named = names_for(rule.result, self.modalities.names)
        self._senses = Senses(self.name, rule, self.modalities, self.process_group, self.criterion)
        count, tensors = len(self.modalities.names), len(self.modalities.parameters)
        self._state = State(self.name, self.modalities.device, rule.init(count, tensors))

    def __repr__(self) -> str:
        stream = [f"stream={self.stream}"] if self.rule.need.stream else []
        return method_text(self, f"apply_to={self.apply_to!r}", *stream)

    def _new_stream(self, name: str | None) -> NoiseStream:
        parts = [self.name, *self.modalities.names] + ([] if name is None else [name])
        wrong = [type(part).__name__ for part in parts if not isinstance(part, str)]
        if wrong:
            raise TypeError(f"name and the names of encoders must be texts, got {wrong[0]}")
        return NoiseStream(device=self.modalities.device, name="/".join(parts))

    # Epochs ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, counted from 0, and ends the one before.

        Copies the encoders, for methods with anchors. Without effect if this epoch runs already, as
        where a run is resumed within it. Micro-batches that were observed in the epoch before, and
        have had no step, count in the first one; it warns of them, once.

        Raises:
            TypeError: it is no integer.
            ValueError: it is negative, or the encoders have other parameters than when this object
                was made.
        """
        before = self.epoch if self._told else None
        if self.anchors is not None:
            self.modalities.check_unchanged()
        super().set_epoch(epoch)
        self._clock = Clock(self.epoch, self._clock.step)
        if before == self.epoch:
            return
        if self.anchors is not None:
            self.anchors.take(self.modalities.parameters)
        self._follow()
        self._state.set(self.rule.epoch(self._state, self.epoch, self._all_tensors()))
        self._warn_of_pending()

    def begin(self) -> None:
        """Says that a new run begins: the next `set_epoch` begins its epoch whatever its number.

        Forgets what an unfinished step has observed. Knowledge of earlier epochs stays; make a
        new object for a run that shall not know of them.
        """
        super().begin()
        self._clock = Clock(self.epoch, self._clock.step)
        self._forget()

    def _forget(self) -> None:
        self.forget()
        self._updates.decide(None)

    # Decide and act -------------------------------------------------------------------------------

    def backward(
        self,
        loss: Tensor,
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        *,
        unimodal_losses: Mapping[str, Tensor] | None = None,
        retain_graph: bool = False,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | float | None = None,
        **more: Unpack[More],
    ) -> Any:
        """Takes the place of ``loss.backward()``: back-propagates, then does what `step` does.

        Args:
            loss: The scalar loss.
            logits: As in `step`.
            labels: See there.
            features: See there.
            inputs: See there.
            unimodal_losses: Name → scalar loss of each modality alone, for methods that compare its
                gradient with the joint loss's; `loss` is then the joint one alone. Others ignore
                them. With several ranks the model must be in DistributedDataParallel or FSDP2.
            retain_graph: As for ``loss.backward``.
            grad_scale: See there.
            found_inf: See there.
            **more: As in `observe`.

        Raises:
            RuntimeError: as `step`, or the gradients are those that the last step has left, so that
                a backward pass would add to them.
            TypeError: as `step`.
            ValueError: as `step`.
        """
        self._check_ready()
        self.modalities.guard.check_before(
            self.modalities, self.name, accumulates=self._need.second != "unimodal"
        )
        if grad_scale is not None or found_inf is not None:
            grad_scale, found_inf = scaler_numbers(grad_scale, found_inf)
        check_loss(loss, retain_graph, self.modalities.device)
        unimodal = None
        if self._need.second == "unimodal":
            useless = more.keys() - {"present"}
            if useless:
                raise TypeError(f"{self.name}.backward takes no {', '.join(sorted(useless))}")
            if unimodal_losses is None:
                raise TypeError(
                    f"{self.name}.backward needs unimodal_losses, one for each modality"
                )
            seen, self._senses.missing = None, frozenset()
            if more:
                seen = self._senses.who(more.get("present"))
            missing = self._senses.missing
            losses = checked_losses(self.modalities, unimodal_losses, missing)
            group = self.process_group
            unimodal = two_gradients(loss, losses, self.modalities, group, retain_graph)
        elif logits is None and not more:
            raise TypeError(f"{self.name}.backward needs logits and labels")
        else:
            with torch.no_grad():
                seen = self._sense(logits, labels, features, inputs, more)
            if seen is not None:  # after the backward pass it would be too late
                self._senses.check(seen)
            loss.backward(retain_graph=retain_graph)
        with torch.no_grad():
            self._follow()
            eager = not torch.compiler.is_dynamo_compiling()
            backend = Eager(self.backend or "") if eager else self.backend
            return take_step(self, backend, seen, unimodal, grad_scale, found_inf)

    def step(
        self,
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        *,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | float | None = None,
        **more: Unpack[More],
    ) -> Any:
        """Changes the gradients that a backward pass has left, before the optimizer's step.

        With ``apply_to="update"`` it only decides; the attached optimizers' next steps are scaled.
        A step with a NaN or an Inf in a gradient leaves state and stream as they were, since a
        GradScaler skips it.

        Args:
            logits: As in `observe`, of the last micro-batch; None, as the next three, if all were
                given to `observe`.
            labels: See there.
            features: See there.
            inputs: See there.
            grad_scale: The factor, 0-d or a number, by which gradients are scaled still, where they
                cannot be unscaled before (see `mmfuse.amp.grad_scale`); for methods with anchors.
            found_inf: Not zero where a GradScaler will skip this step for another reason than the
                encoders' gradients, which are looked at here (see `mmfuse.amp.found_inf`).
            **more: As in `observe`.

        Returns:
            The method's result, such as `OGMResult`.

        Raises:
            RuntimeError: nothing was observed, `set_epoch` was not called for a method with
                anchors, ``apply_to="update"`` without `attach`, an encoder's gradients are those
                that the last step has left, or another rank has an error.
            TypeError: a gradient, logits, labels, or a number of the scaler's is of another type.
            ValueError: names, shapes or labels do not fit, or a parameter has changed its shape or
                device since `set_epoch`. Nothing has been changed then.
        """
        if not self._told or self._need.second == "unimodal" or self.apply_to == "update":
            self._check_ready(one_list=True)
        if grad_scale is not None or found_inf is not None:
            grad_scale, found_inf = scaler_numbers(grad_scale, found_inf)
        given = (logits, labels, features, inputs, more)
        if torch.compiler.is_dynamo_compiling():
            with torch.no_grad():
                return self._step(self.backend, given, grad_scale, found_inf)
        recording = torch.is_grad_enabled()
        # This is torch.no_grad, but for its seven Python calls: every call here counts.
        torch._C._set_grad_enabled(False)
        try:
            return self._step(Eager(self.backend or ""), given, grad_scale, found_inf)
        finally:
            torch._C._set_grad_enabled(recording)

    def _step(
        self,
        backend: str | None,
        given: tuple[Any, ...],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Any:
        device = self.modalities.parameters[0].device
        if self._state.device != device or self.stream.state.device != device:
            self._follow()
        seen = None
        if given[0] is not None or given[4]:
            try:
                seen = self._senses(self._state, self.stream, self._clock, backend, *given)
            except Exception as error:
                if not self._senses.keeps(error, self.stream):
                    raise
        return take_step(self, backend, seen, None, grad_scale, found_inf)

    def _check_ready(self, one_list: bool = False) -> None:
        """Checks that a step can be taken; of one list of gradients, if so."""
        if one_list and self._need.second == "unimodal":
            raise TypeError(
                f"{self.name} needs two gradients of each encoder: call {self.name}.backward(loss, "
                "unimodal_losses=...) in place of loss.backward()"
            )
        if self.anchors is not None or self.ends is not None or self.starts:
            self._check_told(self.name, needed=self.anchors is not None)
        if self.apply_to == "update":
            self._updates.check()

    def _all_tensors(self) -> Tensors:
        owner = tuple(self.modalities.modality)
        device, count = self.modalities.device, len(self.modalities.names)
        return Tensors(owner, count, device, None, None, self.backend)

    def _follow(self) -> None:
        """Moves state and stream to where the encoders are now."""
        device = self.modalities.device
        self._state.follow(device)
        if self.stream.device != device:
            self.stream: NoiseStream = self.stream.to(device)
