"""The act stage of every method on gradients or updates: one read and one write of each tensor.

`act_on` does it to any tensors; `carry_out` to gradients, with what a `GradScaler`, shards and the
sums of squares add.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._devices import WIDE
from ..noise import NoiseStream
from ..ops import GradStats, grad_stats, update_grads_
from ..ops.grad_stats import stats_of_checked
from ..ops.update_grads import update_checked_
from .anchors import Anchors
from .contract import Act, MakesNoise, Need
from .modalities import Active


class Second(NamedTuple):
    """A second list of tensors, this rank's parts: `tensors`, less `origins` if there are any."""

    tensors: Sequence[Tensor]
    origins: Sequence[Tensor] | None = None


def act_on(
    active: Active,
    act: Act,
    finite: Tensor,
    *,
    second: Anchors | Second | None = None,
    noise: NoiseStream | MakesNoise | None = None,
    sq_norm: Tensor | None = None,
    backend: str | None = None,
    advance: bool = False,
    done: Tensor | None = None,
) -> bool:
    """Changes in place: g ← scale·g + pull·second + noise_std·N(0, 1).

    Args:
        active: The tensors g; this rank's parts of them.
        act: The changes.
        finite: 0-d bool, set to False where one ends up with a NaN or an Inf on this rank.
        second: The second list, with `act.pull`.
        noise: The stream of the noise, or a callable that makes it; with `act.noise_std`.
        sq_norm: [T] float64, receives Σg² before the update; with parts that are whole.
        backend: Name of a backend; None for the best one.
        advance: True to have the noise's stream, if there is one, go on to its next step if all
            gradients are finite.
        done: As in `Started`.

    Returns:
        True if the stream has been dealt with so; it needs one launch with the update alone.
    """
    scale, pull, noise_std = act
    device, dtype, shape = active.device, active.dtype, (len(active.grads),)
    if device is not None and pull is None and scale is not None and scale.shape == shape:
        stream = noise if noise_std is not None else None
        std = state = None
        if noise_std is not None and isinstance(stream, NoiseStream) and noise_std.shape == shape:
            std, state = noise_std.to(device, dtype).contiguous(), stream.state.to(device)
            advance = advance and state is stream.state
        if noise_std is None or std is not None:  # there is nothing to check or to cut
            scale = scale.to(device, dtype).contiguous()
            return update_checked_(
                backend,
                device,
                active.grads,
                scale,
                finite,
                sq_norm,
                noise_std=std,
                state=state,
                ids=() if std is None else active.ids,
                table=active.table,
                advance=advance and std is not None,
                done=done,
            )
    if scale is None:
        like = pull if pull is not None else noise_std
        if like is None:
            like = finite.new_empty(len(active.grads), dtype=torch.float32)
        scale = torch.ones_like(like)
    if isinstance(second, Anchors) and pull is not None:
        assert noise_std is None
        second.update_(active, scale, pull, finite, backend, sq_norm)
        return False
    if noise_std is not None and noise is not None and not isinstance(noise, NoiseStream):
        made = [noise(g) for g in active.grads]
        update_grads_(active.grads, scale, finite=finite, backend=backend)
        for grad, z, std in zip(active.grads, made, noise_std.unbind(), strict=True):
            grad.addcmul_(z, std.to(grad.device, grad.dtype))
        return False
    if noise_std is None and pull is None:
        update_grads_(active.grads, scale, finite=finite, sq_norm=sq_norm, backend=backend)
        return False
    params = anchors = None
    if pull is not None:
        assert isinstance(second, Second)
        params = active.cut(second.tensors)
        anchors = None if second.origins is None else active.cut(second.origins)
    update_grads_(
        active.cut(active.grads),
        active.spread(scale),
        params=params,
        anchors=anchors,
        pull=None if pull is None else active.spread(pull),
        noise_std=None if noise_std is None else active.spread(noise_std),
        stream=active.place(noise)
        if isinstance(noise, NoiseStream) and noise_std is not None
        else None,
        finite=finite,
        backend=backend,
    )
    return False


def carry_out(
    active: Active,
    act: Act,
    finite: Tensor,
    *,
    need: Need,
    second: Anchors | Second | None,
    noise: NoiseStream | MakesNoise | None,
    grad_scale: Tensor | None,
    backend: str | None,
) -> Tensor | None:
    """`act_on` the gradients; each one's Σg², float64 [T] and unscaled, if the rule needs it."""
    squares = fused = None
    if need.squares == "before" and active.grads:
        if active.shards:  # merged over the ranks
            squares = _squares(active, backend)
        else:  # by the update's own read
            squares = fused = finite.new_empty(len(active.grads), dtype=WIDE[finite.device.type])
    if act.pull is not None and grad_scale is not None and need.anchors:
        act = act._replace(pull=act.pull * grad_scale.to(act.pull))
    act_on(active, act, finite, second=second, noise=noise, sq_norm=fused, backend=backend)
    if need.squares == "after" and active.grads:
        squares = _squares(active, backend)
    if squares is not None and grad_scale is not None:
        squares = squares / grad_scale.to(squares).square()
    return squares


def stats_of(
    active: Active,
    second: Anchors | Second | None,
    grad_scale: Tensor | None,
    backend: str | None,
) -> GradStats:
    """Statistics of whole tensors; unscaled where there are anchors, which are not scaled."""
    if second is None:
        if active.device is not None:
            return stats_of_checked(backend, active.device, active.grads, table=active.table)
        return active.stats(backend)
    if isinstance(second, Second):
        stats = grad_stats(active.grads, second.tensors, second.origins, backend=backend)
        return active.whole(stats)
    stats = second.stats(active, backend)
    if grad_scale is None:
        return stats
    scale = grad_scale.to(stats.mean)
    dot = None if stats.dot is None else stats.dot / scale
    return stats._replace(mean=stats.mean / scale, m2=stats.m2 / scale.square(), dot=dot)


def _squares(active: Active, backend: str | None) -> Tensor:
    """Σg² of each whole tensor: [T], float64 where the device has it."""
    squares = active.stats(backend).sq_norm
    return squares.to(WIDE[squares.device.type])
