"""One step of a method on gradients: decide, act, settle, and keep the state if the step counts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from ..ops._eager import Eager
from ..ops.modulation_factors import before_update
from . import _in_turn, _surgery
from .act import Second, act_on, carry_out, stats_of
from .contract import Act, Clock, Decision, Tensors
from .modalities import Active
from .pairs import missing
from .ranks import NOTHING, Observed, agree, several
from .shards import local_part
from .updates import Decided

if TYPE_CHECKING:
    from .gradients import GradientMethod


# Those of which `_warn_of_noise` has warned.
_warned: set[str] = set()


def take_step(
    method: GradientMethod,
    backend: str | None,
    seen: Observed | None,
    unimodal: Sequence[Tensor | None] | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Any:
    """Changes the gradients, or decides about updates to come; called without autograd.

    Returns the rule's result. It raises its errors before anything changes.

    Args:
        method: The method, on the encoders' device.
        backend: Name of a backend; None for the best one.
        seen: Of the last micro-batch, if that is new.
        unimodal: The gradient of the unimodal losses for every parameter of the encoders, for rules
            that sense nothing else.
        grad_scale: As in `GradientMethod.step`.
        found_inf: As there.
    """
    group, active = several(method.process_group), None
    modalities = method.modalities
    try:
        if type(backend) is Eager and modalities.registrations != _surgery.registrations:
            modalities.check_unchanged()
        if method.apply_to == "gradient":
            anchors, eager = method.anchors, type(backend) is Eager
            copies = None if anchors is None else anchors.tensors
            active = modalities.active(method._senses.missing, eager, copies)
            if anchors is not None and not active.paired:
                anchors.check(active, modalities.parameter_names)
    except Exception as error:
        if unimodal is not None or not method._senses.keeps(error, method.stream):
            raise
    if unimodal is None:
        draws = group is not None and seen is None and method._need.draws
        if draws and not method._senses.pending:  # the other ranks have agreed when they looked
            agree(method.stream, group)
        seen = method._senses.take(method._state, seen, group)
    elif seen is None:
        seen = NOTHING
    if active is None:
        return _postpone(method, backend, seen)
    if method.anchors is not None and not active.paired:
        method.anchors.catch_up(active)  # now that nothing can be wrong any more
    rule, need, state, stream = method.rule, method._need, method._state, method.stream
    acting, eager = method._acting, type(backend) is Eager
    last_of = _in_turn.latest
    if eager and acting and active.ids and last_of is not None and last_of[0]() is not method:
        ours = modalities.parameters[active.ids[0]].grad
        _in_turn.check(method, ours, active.grads[0]._version)
    device = active.grads[0].device if active.grads else modalities.device
    second = method.anchors if unimodal is None else _second(active, unimodal)
    stats = fused = None
    table = None if active.device is None else active.table
    if need.factors and table is not None and not seen.paired and seen.kind == "scores":
        kernel = before_update(backend, device)
        fused = None if kernel is None else (kernel, table)
    if need.stats and acting and active.grads and fused is None:
        stats = stats_of(active, second, grad_scale, backend)
    place = None if len(active.ids) == len(modalities.parameters) else tuple(active.ids)
    count = len(modalities.names)
    tensors = Tensors(active.modality, count, device, stats, place, backend, active.dtype, fused)
    if acting:
        decision = rule.decide(state, seen, tensors, method._clock)
    else:
        decision = _idle(method, seen, tensors)
    if decision.started is None:
        finite, done = torch.ones((), dtype=torch.bool, device=device), None
    else:
        finite, done = decision.started
    noise = stream if isinstance(need.noise, str) else need.noise
    drawn = noise is stream and decision.act.noise_std is not None
    if drawn and group is not None:
        agree(stream, group)
    elif group is not None and decision.act.noise_std is not None:
        _warn_of_noise(method.name)
    squares, advanced = None, False
    if need.squares is None and need.second != "anchor":
        # Within the update, if nothing but its own finding decides about it.
        alone = drawn and found_inf is None and not active.shards
        advanced = act_on(
            active,
            decision.act,
            finite,
            second=second,
            noise=noise,
            backend=backend,
            advance=alone,
            done=done,
        )
    else:
        squares = carry_out(
            active,
            decision.act,
            finite,
            need=need,
            second=second,
            noise=noise,
            grad_scale=grad_scale,
            backend=backend,
        )
    if eager and active.ids:  # a version is a constant to the compiler
        modalities.guard.keep(modalities, active)
        if acting:
            first = modalities.parameters[active.ids[0]].grad
            assert first is not None
            version = active.grads[0]._version
            _in_turn.latest = ref(method), method.name, need, ref(first), version
    sums = squares if squares is not None or stats is None else stats.m2
    if active.shards and sums is None and decision.state:
        sums = active.stats(backend).m2
    if active.shards and sums is not None:  # another rank's part shows in the sums alone
        finite.logical_and_(sums.isfinite().all().to(device))
    counts, changed = finite, decision.state
    if found_inf is not None:
        counts = counts & (found_inf == 0).all().to(device)
    if squares is not None:
        squares = own = squares.to(state.device)
        if decision.counted is not None:
            own = torch.where(tensors.each(decision.counted).to(state.device), squares, 0.0)
        changed = {**changed, **rule.settle(state, own, tensors)}
    # The squares may overflow where the gradient does not.
    if changed:
        state.set(changed, counts, squares, backend)
    if need.draws:  # a number that changed in every step would have every step compiled anew
        clock = method._clock
        method._clock = Clock(clock.epoch, clock.step + 1)
    if (drawn or need.draws) and not advanced:
        stream.advance(counts if squares is None else counts & squares.isfinite().all().to(device))
    return rule.result(*decision.report, finite=finite, **method._named)


def _warn_of_noise(name: str) -> None:
    """Warns, once in a process, of noise that each rank makes for itself."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name}: the callable noise= makes other numbers on each rank, so that replicas of a "
            "model drift apart; leave it out, for the numbers of a NoiseStream are the same on all "
            "ranks, or have it draw from a generator with one seed everywhere",
            RuntimeWarning,
            stacklevel=5,
        )


def _second(active: Active, unimodal: Sequence[Tensor | None]) -> Second:
    """The unimodal gradients of the active tensors; zero where there are none."""
    found = []
    for i, grad in zip(active.ids, active.grads, strict=True):
        given = unimodal[i]
        found.append(torch.zeros_like(grad) if given is None else local_part(given))
    return Second(found)


def _idle(method: GradientMethod, seen: Observed, tensors: Tensors) -> Decision:
    """The decision outside of the method's epochs."""
    clock, state = method._clock, method._state
    idle = None if seen.kind == "coefficients" else method.rule.idle()
    if idle is not None:
        return idle.decide(state, seen, tensors, clock)
    decision = method.rule.decide(state, seen, tensors, clock)
    neutral = torch.full_like(decision.report[0], method._need.neutral)
    return decision._replace(act=Act(), report=(neutral, *decision.report[1:]))


def _postpone(method: GradientMethod, backend: str | None, seen: Observed) -> Any:
    """Decides about updates that are to come."""
    device, count = method.modalities.device, len(method.modalities.names)
    tensors = Tensors((), count, device, None, None, method.backend)
    if method._acting:
        decision = method.rule.decide(method._state, seen, tensors, method._clock)
    else:
        decision = _idle(method, seen, tensors)
    kept = (method._state, decision.state) if decision.state else None
    finite = torch.ones((), dtype=torch.bool, device=device)
    stream = method.stream if method._need.noise is not None and method._acting else None
    if stream is not None:
        agree(stream, method.process_group)
    state = None if stream is None else stream.state.clone()
    gone = missing(seen) if seen.paired or seen.kind != "scores" else None
    eager = type(backend) is Eager
    method._updates.decide(Decided(decision.report[0], stream, state, finite, kept, gone), eager)
    if eager:
        method.modalities.guard.keep(method.modalities, None)
    return method.rule.result(*decision.report, finite=finite, **method._named)
