"""Scales an optimizer's updates of the encoders' parameters.

Adaptive optimizers divide a gradient by its own size, so that a factor on the gradient is divided
out again. A factor on the update is not:

    w <- w' + k (w - w')  [+ std(w - w') * N(0, 1)],   w' the parameter before the optimizer's step
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..noise import NoiseStream
from ..ops import grad_stats
from .act import Second, act_on
from .contract import Act, ApplyTo, Rule
from .modalities import Modalities, per_tensor
from .state import State


class Decided(NamedTuple):
    """The decision of a step for the optimizers' steps that follow it.

    Attributes:
        coefficients: [M].
        stream: Of the noise, or None for none.
        state: The stream's in this step: int64 [2], the same for all optimizers; None for none.
        finite: 0-d bool, set to False where a parameter ends up with a NaN or an Inf.
        kept: The rule's state, and what changes of it if the update is not skipped.
        missing: [M] bool, the modalities that no sample had, which get no noise; None for none.
    """

    coefficients: Tensor
    stream: NoiseStream | None
    state: Tensor | None
    finite: Tensor
    kept: tuple[State, Mapping[str, Tensor]] | None = None
    missing: Tensor | None = None


class ScaledUpdates:
    """Hooks on an optimizer that scale its updates of the encoders' parameters.

    Args:
        method: Whose it is, for error texts.
        modalities: The encoders.
        optimizer: The optimizer.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it has none of the encoders' parameters.
    """

    def __init__(
        self,
        method: str,
        modalities: Modalities,
        optimizer: torch.optim.Optimizer,
        backend: str | None,
    ) -> None:
        kind = type(optimizer).__name__
        # A wrapper that only looks like an optimizer, as Accelerate's, calls no hooks.
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"expected a torch.optim.Optimizer, got {kind}; if it wraps an optimizer, pass "
                "that one (see mmfuse.adapters.accelerate)"
            )
        self.method = method
        self.modalities = modalities
        self.optimizer = optimizer
        self.backend = backend
        self.decided: Decided | None = None
        self._before: dict[int, Tensor] = {}
        #: The encoders' parameters that no other attached optimizer has.
        self.alone: list[Tensor] = []
        #: How often these had been changed when it was decided; None if that is not known.
        self.versions: int | None = None
        self._stepping = False
        if not self._held().ids:
            raise ValueError(
                f"this {kind} has no parameter of the encoders; attach the optimizer that has them"
            )
        self._register()

    def _register(self) -> None:
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._copy),
            self.optimizer.register_step_post_hook(self._scale),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """The state but for hooks, copies and versions, which are of this very optimizer."""
        return {**self.__dict__, "_hooks": [], "_before": {}, "versions": None, "_stepping": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def remove(self) -> None:
        """Leaves the optimizer alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def places(self) -> list[int]:
        """The places of the encoders' parameters that the optimizer has now."""
        found: list[int] = self._held().ids
        return found

    def count(self) -> int:
        """How often the parameters that are its alone have been changed so far."""
        return sum([p._version for p in self.alone])

    def waiting(self) -> bool:
        """True if a decision waits for a step; a closure decides within one, maybe repeatedly."""
        return self.decided is not None and not self._stepping

    def _check_decided(self) -> None:
        if self.decided is None:
            raise RuntimeError(
                f'{self.method} with apply_to="update" has not decided about this step: call '
                f"{self.method}.step(logits, labels) before every optimizer.step()"
            )

    def _idle(self) -> bool:
        """True if nothing was decided about a step that moves nothing.

        By such a step torch.distributed.checkpoint makes a new optimizer's state, to load into it.
        """
        rates = [group.get("lr", 1.0) for group in self.optimizer.param_groups]
        # A rate on a GPU is not looked at: that would wait for it.
        known = all(not isinstance(lr, Tensor) or lr.device.type == "cpu" for lr in rates)
        return self.decided is None and known and not any(map(float, rates))

    def _held(self) -> Any:
        groups = self.optimizer.param_groups
        return self.modalities.held(p for group in groups for p in group["params"])

    @torch.no_grad()
    def _copy(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._idle():
            return
        # A closure runs within the step, and may be what decides.
        if not (kwargs.get("closure") or any(callable(arg) for arg in args[1:])):
            self._check_decided()
        self._stepping = True
        held = self._held()
        for i, part in zip(held.ids, held.params, strict=True):
            if i not in self._before or not _alike(self._before[i], part):
                self._before[i] = torch.empty_like(part)
        torch._foreach_copy_([self._before[i] for i in held.ids], held.params)

    @torch.no_grad()
    def _scale(self, *_: Any) -> None:
        self._stepping = False
        if self._idle():
            return
        self._check_decided()
        assert self.decided is not None
        (coefficients, stream, state, finite, kept, missing), self.decided = self.decided, None
        held = self._held()
        before = [self._before[i] for i in held.ids]
        pull = per_tensor(coefficients.to(finite.device), held.modality) - 1.0
        std = noise = None
        moved = finite
        if state is not None or kept is not None:
            updates = torch._foreach_sub(held.params, before)
            stats = held.whole(grad_stats(updates, backend=self.backend))
            del updates
            # A step that the optimizer has skipped has moved nothing: it gets no noise, and does
            # not count.
            moved = (stats.sq_norm > 0).any().to(finite.device)
            if state is not None:
                std, noise = stats.std, NoiseStream.from_state(state.to(finite.device))
                if missing is not None:
                    std = torch.where(per_tensor(missing.to(std.device), held.modality), 0.0, std)
            if held.shards:  # what another rank's part holds shows in the sum alone
                finite.logical_and_(stats.m2.isfinite().all().to(finite.device))
        act = Act(pull=pull, noise_std=std)
        second = Second(held.params, before)
        act_on(held, act, finite, second=second, noise=noise, backend=self.backend)
        moved = moved & finite
        if kept is not None:
            kept[0].set(kept[1], moved)
        if stream is not None and state is not None and std is not None:
            # One step, however many optimizers take part in it.
            stream.state[1].copy_(torch.maximum(stream.state[1], state[1] + moved))


class AttachedOptimizers:
    """The optimizers whose updates a method scales.

    Args:
        method: Its name, for error texts.
        modalities: The encoders.
        backend: Name of a backend; None for the best one.
    """

    def __init__(self, method: str, modalities: Modalities, backend: str | None) -> None:
        self.method = method
        self.modalities = modalities
        self.backend = backend
        self._known: list[ScaledUpdates] = []
        # Modalities of which no optimizer has a parameter.
        self._bare: frozenset[int] = frozenset(modalities.modality)
        self._warned = False

    def __contains__(self, optimizer: torch.optim.Optimizer) -> bool:
        """True if it is one of them."""
        return any(known.optimizer is optimizer for known in self._known)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scales this optimizer's updates from now on; see `GradientMethod.attach`."""
        if optimizer in self:
            raise ValueError(f"this {type(optimizer).__name__} is attached already")
        made = ScaledUpdates(self.method, self.modalities, optimizer, self.backend)
        self._known.append(made)
        self._arrange()

    def detach(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves this optimizer's updates alone from now on; see `GradientMethod.detach`."""
        found = [known for known in self._known if known.optimizer is optimizer]
        if not found:
            raise ValueError(f"this {type(optimizer).__name__} is not attached")
        found[0].remove()
        self._known.remove(found[0])
        self._arrange()

    def _arrange(self) -> None:
        """Looks at whose parameters the optimizers have now."""
        held = [known.places() for known in self._known]
        parameters, owner = self.modalities.parameters, self.modalities.modality
        times = Counter(i for places in held for i in places)
        for known, places in zip(self._known, held, strict=True):
            known.alone = [parameters[i] for i in places if times[i] == 1]
            known.versions = None
        self._bare = frozenset(owner) - {owner[i] for i in times}

    def check(self) -> None:
        """Checks that every modality that is trained has parameters in an attached optimizer.

        Raises:
            RuntimeError: one has none; it is named.
        """
        if not self._known:
            raise RuntimeError(
                f'{self.method}(apply_to="update"): pass the optimizer to attach() first'
            )
        if not self._bare or torch.compiler.is_dynamo_compiling():
            return
        pairs = zip(self.modalities.parameters, self.modalities.modality, strict=True)
        trained = {m for p, m in pairs if m in self._bare and p.requires_grad}
        if trained:
            self._arrange()  # an optimizer may have been given more parameters since
        for m in sorted(trained & self._bare):
            name = self.modalities.names[m]
            raise RuntimeError(
                f'{self.method}(apply_to="update"): no attached optimizer has a parameter of the '
                f"encoder of {name!r}, whose updates would stay as they are: pass the optimizer "
                "that has them to attach(), or freeze the encoder"
            )

    def decide(self, decided: Decided | None, eager: bool = True) -> None:
        """Sets the change of every optimizer's next update; None forgets it.

        Args:
            decided: The change.
            eager: Nothing is compiled: a version is a constant to the compiler.
        """
        for known in self._known:
            versions = known.count() if eager and decided is not None else None
            if versions is not None and known.waiting() and known.versions not in (None, versions):
                self._warn(known)
            known.decided, known.versions = decided, versions

    def _warn(self, known: ScaledUpdates) -> None:
        """Warns, once, of parameters that move while an attached optimizer does not step.

        No error: besides an optimizer that is not attached, weights that are clamped after a step
        that a GradScaler has skipped, or loaded from a file, have moved as well.
        """
        if self._warned:
            return
        self._warned = True
        kind = type(known.optimizer).__name__
        warnings.warn(
            f'{self.method}(apply_to="update"): parameters have moved since the last decision, but '
            f"the attached {kind} that has them has not stepped, so that their updates were not "
            "scaled. If it was replaced by another optimizer, detach() it and attach() the other",
            RuntimeWarning,
            stacklevel=7,
        )


def _alike(kept: Tensor, part: Tensor) -> bool:
    """True if a copy can hold the part; not where a model was moved or cast in between."""
    return (kept.shape, kept.dtype, kept.device) == (part.shape, part.dtype, part.device)


class ActsOnUpdates:
    """A mixin: attaches optimizers to a `GradientMethod`."""

    name: str
    rule: Rule
    apply_to: ApplyTo
    _updates: AttachedOptimizers

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scales this optimizer's updates of the encoders; for ``apply_to="update"``.

        The optimizer's step then needs one more copy of the encoders' parameters.

        Raises:
            TypeError: it is no optimizer.
            ValueError: ``apply_to`` is "gradient", or the optimizer has no parameter of the
                encoders, or is attached already.
        """
        need = self.rule.need
        if need.second is not None or need.squares is not None:
            raise ValueError(f"{self.name} acts on gradients only; there is nothing to attach")
        if self.apply_to != "update":
            raise ValueError(f'attach is for {self.name}(..., apply_to="update")')
        self._updates.attach(optimizer)

    def detach(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves this optimizer's updates alone from now on, and frees the copy of the parameters.

        Raises:
            ValueError: it is not attached.
        """
        self._updates.detach(optimizer)
