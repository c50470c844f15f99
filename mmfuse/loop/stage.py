"""One step of a method on gradients: decide, act, settle, and what of it counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .act import Second, carry_out, stats_of
from .contract import Act, Clock, Decision, Tensors
from .modalities import Active
from .ranks import Observed, agree
from .shards import local_part
from .updates import Decided

if TYPE_CHECKING:
    from .gradients import GradientMethod


def take_step(
    method: GradientMethod,
    seen: Observed,
    active: Active | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    unimodal: Sequence[Tensor | None] | None = None,
) -> Any:
    """Changes the gradients, or decides about updates to come; called without autograd.

    Returns the rule's result.

    Args:
        method: The method.
        seen: Everything that was sensed for this step.
        active: The gradients; None if updates are changed.
        grad_scale: As in `GradientMethod.step`.
        found_inf: As there.
        unimodal: The gradient of the unimodal losses for every parameter of the encoders.
    """
    method._follow()
    if active is None:
        return _postpone(method, seen)
    rule, state, stream, backend = method.rule, method._state, method.stream, method.backend
    need, modalities = rule.need, method.modalities
    device = active.grads[0].device if active.grads else modalities.device
    finite = torch.ones((), dtype=torch.bool, device=device)
    second = method.anchors if unimodal is None else _second(active, unimodal)
    stats = None
    if need.stats and method.modulating and active.grads:
        stats = stats_of(active, second, grad_scale, backend)
    place = None if len(active.ids) == len(modalities.parameters) else tuple(active.ids)
    count = len(modalities.names)
    tensors = Tensors(active.modality, count, device, stats, place, backend)
    decision = _decide(method, seen, tensors)
    drawn = decision.act.noise_std is not None and need.noise is None
    if drawn:
        agree(stream, method.process_group)
    squares = carry_out(
        active,
        decision.act,
        finite,
        need=need,
        second=second,
        stream=stream,
        grad_scale=grad_scale,
        backend=backend,
    )
    sums = squares if squares is not None or stats is None else stats.m2
    if active.shards and sums is not None:  # another rank's part shows in the sums alone
        finite.logical_and_(sums.isfinite().all().to(device))
    counts = finite
    if squares is not None:  # they may overflow where the gradient does not
        counts = counts & squares.isfinite().all()
    if found_inf is not None:
        counts = counts & (found_inf == 0).all().to(device)
    state.set(decision.state, counts)
    if squares is not None:
        state.set(rule.settle(state, squares.to(state.device), tensors), counts)
    # A number that changed in every step would have every step compiled anew.
    method._steps += need.draws
    if drawn or need.draws:
        stream.advance(counts)
    return rule.result(*decision.report, finite=finite)


def _second(active: Active, unimodal: Sequence[Tensor | None]) -> Second:
    """The unimodal gradients of the active tensors; zero where there are none."""
    found = []
    for i, grad in zip(active.ids, active.grads, strict=True):
        given = unimodal[i]
        found.append(torch.zeros_like(grad) if given is None else local_part(given))
    return Second(found)


def _decide(method: GradientMethod, seen: Observed, tensors: Tensors) -> Decision:
    clock, state = Clock(method.epoch, method._steps), method._state
    if method.modulating:
        return method.rule.decide(state, seen, tensors, clock)
    idle = method.rule.idle()
    if idle is not None:
        return idle.decide(state, seen, tensors, clock)
    decision = method.rule.decide(state, seen, tensors, clock)
    neutral = torch.full_like(decision.report[0], method.rule.need.neutral)
    return Decision(Act(), (neutral, *decision.report[1:]), decision.state)


def _postpone(method: GradientMethod, seen: Observed) -> Any:
    """Decides about updates that are to come."""
    device, count = method.modalities.device, len(method.modalities.names)
    decision = _decide(method, seen, Tensors((), count, device, None, None, method.backend))
    method._state.set(decision.state)
    finite = torch.ones((), dtype=torch.bool, device=device)
    stream = method.stream if method.rule.need.stats and method.modulating else None
    if stream is not None:
        agree(stream, method.process_group)
    state = None if stream is None else stream.state.clone()
    method._updates.decide(Decided(decision.report[0], stream, state, finite))
    return method.rule.result(*decision.report, finite=finite)
