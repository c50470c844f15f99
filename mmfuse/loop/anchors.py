"""Anchors: the encoders' parameters as they were at the start of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._devices import known
from ..ops import GradStats, grad_stats, update_grads_
from ..ops._tensors import FLOATING
from ..ops.grad_stats import stats_of_checked
from ..ops.update_grads import update_checked_
from .modalities import Active, Modalities
from .shards import like_shard, local_part, own_part

# How much of the anchors is on the gradients' device at a time when they are kept elsewhere.
_CHUNK_BYTES = 64 * 2**20


class Anchors:
    """One copy w₀ of every parameter: the only memory of a method that grows with the model.

    Args:
        dtype: Of the copies; None keeps each parameter's own. With bfloat16 the displacement
            w − w₀ carries the rounding of w₀, up to 2⁻⁹·|w|.
        device: The device of the copies; None for each parameter's own device. From "cpu" they are
            copied to the gradients' device in every step, 64 MiB at a time.
        frozen: True if frozen parameters are copied too; else when they are first unfrozen.

    Raises:
        TypeError: `dtype` is not a floating dtype.
    """

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        frozen: bool = False,
    ) -> None:
        known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if dtype is not None and not known:
            raise TypeError(f"anchor_dtype must be a floating dtype, got {dtype}")
        self.dtype = dtype
        try:
            self.device: torch.device | None = None if device is None else torch.device(device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"anchor_device must name a device, got {device!r}") from error
        self.frozen = frozen
        #: One for each parameter of the modalities, this rank's part; empty until `take`. Of one
        #: that was frozen then, an empty one: it stays what it is, and is copied once it has a
        #: gradient.
        self.tensors: list[Tensor] = []

    @torch.no_grad()
    def take(self, parameters: Sequence[Tensor]) -> None:
        """Copies the parameters as they are now, into the memory of the last copy if it fits."""
        parts = [local_part(p.detach()) for p in parameters]
        kept = [p.requires_grad or self.frozen for p in parameters]
        self._allocate(parts, kept)
        pairs = zip(self.tensors, parts, kept, strict=True)
        held = [(anchor, part) for anchor, part, keep in pairs if keep]
        if held:
            torch._foreach_copy_([anchor for anchor, _ in held], [part for _, part in held])

    def _allocate(self, parts: Sequence[Tensor], kept: Sequence[bool]) -> None:
        empty = self.tensors or [_nothing(part) for part in parts]
        self.tensors = [
            self._room(part, old) if keep else _nothing(part)
            for part, old, keep in zip(parts, empty, kept, strict=True)
        ]

    def _room(self, parameter: Tensor, old: Tensor) -> Tensor:
        device = self.device or parameter.device
        dtype = self.dtype or parameter.dtype
        if (
            old.shape == parameter.shape
            and old.stride() == parameter.stride()
            and (old.device, old.dtype) == (device, dtype)
        ):
            return old
        # Pinned, so that no step waits for its copy to the GPU.
        pinned = device.type == "cpu" and parameter.is_cuda
        with torch.inference_mode(False):  # or no later epoch could write to it
            return torch.empty_like(parameter, dtype=dtype, device=device, pin_memory=pinned)

    def check(self, active: Active, names: Sequence[str]) -> None:
        """Checks that the parameters still are what was copied; `catch_up` has the unfrozen ones.

        Raises:
            ValueError: one has another shape, or has moved to another device; it is named.
        """
        for i, parameter in zip(active.ids, active.params, strict=True):
            anchor = self.tensors[i]
            if anchor.shape != parameter.shape and _is_nothing(anchor, parameter):
                continue
            if anchor.shape != parameter.shape:
                raise ValueError(
                    f"{names[i]} had shape {list(anchor.shape)} at set_epoch and now has "
                    f"{list(parameter.shape)}"
                )
            if self.device is None and anchor.device != parameter.device:
                raise ValueError(
                    f"{names[i]} was on {anchor.device} at set_epoch and now is on "
                    f"{parameter.device}; move encoders between epochs"
                )

    def catch_up(self, active: Active) -> None:
        """Copies the parameters that were unfrozen since `take`: until now they have not moved."""
        for i, parameter in zip(active.ids, active.params, strict=True):
            anchor = self.tensors[i]
            if anchor.shape != parameter.shape and _is_nothing(anchor, parameter):
                self.tensors[i] = self._room(parameter, anchor)
                self.tensors[i].copy_(parameter.detach())

    def stats(self, active: Active, backend: str | None) -> GradStats:
        """`grad_stats` of the active gradients, with their parameters' displacements."""
        plain = self._plain(active)
        if plain is not None and active.device is not None:
            table = active.table if active.paired else None
            return stats_of_checked(
                backend, active.device, active.grads, active.params, plain, table
            )
        parts = [
            grad_stats(active.grads[part], active.params[part], anchors, backend=backend)
            for part, anchors in self.parts(active)
        ]
        found = parts[0]
        if len(parts) > 1:
            home = found.mean.device  # a later part's gradients may be on another device
            fields = zip(*parts, strict=True)
            found = GradStats(*(torch.cat([f.to(home) for f in field]) for field in fields))
        return active.whole(found)

    def update_(
        self,
        active: Active,
        scale: Tensor,
        pull: Tensor,
        finite: Tensor,
        backend: str | None,
        sq_norm: Tensor | None = None,
    ) -> None:
        """`update_grads_` on the active gradients: g ← scale·g + pull·(w − w₀).

        `sq_norm`, float64 [T] for T active gradients, receives each one's Σg² before that.
        """
        plain, shape = self._plain(active), (len(active.grads),)
        if plain is not None and active.device is not None and scale.shape == pull.shape == shape:
            update_checked_(
                backend,
                active.device,
                active.grads,
                scale.to(active.device, active.dtype).contiguous(),
                finite,
                sq_norm,
                params=active.params,
                anchors=plain,
                pull=pull.to(active.device, active.dtype).contiguous(),
                table=active.table if active.paired else None,
            )
            return
        for part, anchors in self.parts(active):
            squares = None
            if sq_norm is not None:
                # The part itself, unless its gradients are elsewhere.
                squares = sq_norm[part].to(active.grads[part][0].device)
            update_grads_(
                active.grads[part],
                scale[part],
                params=active.params[part],
                anchors=anchors,
                pull=pull[part],
                finite=finite,
                sq_norm=squares,
                backend=backend,
            )
            if sq_norm is not None and squares is not None and squares.device != sq_norm.device:
                sq_norm[part].copy_(squares)

    def _plain(self, active: Active) -> list[Tensor] | None:
        """The anchors, if kernels can have them, parameters and gradients as they are; or None."""
        device = active.device
        if device is None:
            return None
        anchors = self.tensors
        if len(active.ids) != len(anchors):
            anchors = [anchors[i] for i in active.ids]
        if active.paired:  # it has been looked at
            return anchors
        for tensors in (anchors, active.params):
            for tensor, grad in zip(tensors, active.grads, strict=True):
                if tensor.device != device or tensor.dtype not in FLOATING:
                    return None
                in_order = tensor.is_contiguous() and grad.is_contiguous()
                if not in_order and tensor.stride() != grad.stride():
                    return None
        return anchors

    def parts(self, active: Active) -> Iterator[tuple[slice, list[Tensor]]]:
        """Parts of the active tensors with their anchors on the gradients' devices."""
        anchors = [self.tensors[i] for i in active.ids]
        if all(a.device == g.device for a, g in zip(anchors, active.grads, strict=True)):
            yield slice(None), anchors
            return
        begin, size = 0, 0
        for end, anchor in enumerate(anchors, start=1):
            size += anchor.nbytes
            if size >= _CHUNK_BYTES or end == len(anchors):
                part = slice(begin, end)
                pairs = zip(anchors[part], active.grads[part], strict=True)
                yield part, [a.to(g.device, non_blocking=True) for a, g in pairs]
                begin, size = end, 0

    def state_dict(self, modalities: Modalities) -> dict[str, Any]:
        """The copies themselves, as an optimizer gives its state: save them, or copy them.

        Before the first `take` they are made, so that a checkpoint has somewhere to load into.
        """
        if not self.tensors:
            self.take(modalities.parameters)
        pairs = zip(self.tensors, modalities.parameters, strict=True)
        return {
            "tensors": [
                anchor.new_empty(0) if _is_nothing(anchor, p) else like_shard(anchor, p)
                for anchor, p in pairs
            ]
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], modalities: Modalities) -> None:
        """Takes over the values of the anchors that `state_dict` holds: of the whole parameters.

        Raises:
            ValueError: they do not fit the parameters; nothing has been changed then.
        """
        if not isinstance(state_dict, Mapping) or "tensors" not in state_dict:
            raise ValueError("the state of the anchors lacks ['tensors']")
        loaded = state_dict["tensors"]
        if not isinstance(loaded, (list, tuple)):
            kind = type(loaded).__name__
            raise ValueError(f"'tensors' in the state of the anchors must be a list, got {kind}")
        if len(loaded) != len(modalities.parameters):
            raise ValueError(
                f"the state holds {len(loaded)} anchors, the encoders have "
                f"{len(modalities.parameters)} parameters"
            )
        for name, parameter, anchor in zip(
            modalities.parameter_names, modalities.parameters, loaded, strict=True
        ):
            if not isinstance(anchor, Tensor) or not known(anchor) or anchor.is_complex():
                kind = type(anchor).__name__
                raise ValueError(f"the state's anchor of {name} must be a real tensor, got {kind}")
            if anchor.shape != parameter.shape and not _is_saved_nothing(anchor, parameter):
                raise ValueError(
                    f"the state's anchor of {name} has shape {list(anchor.shape)}, the parameter "
                    f"{list(parameter.shape)}"
                )
        parts = [local_part(p.detach()) for p in modalities.parameters]
        pairs = zip(loaded, modalities.parameters, strict=True)
        kept = [not _is_saved_nothing(source, whole) for source, whole in pairs]
        self._allocate(parts, kept)
        for i, whole in enumerate(modalities.parameters):
            if kept[i]:
                self.tensors[i].copy_(own_part(loaded[i], whole))


def _nothing(part: Tensor) -> Tensor:
    """The anchor of a frozen parameter: of a dimension more, since a rank's part may be empty."""
    return torch.empty([0] * (part.dim() + 1), device=part.device)


def _is_nothing(anchor: Tensor, parameter: Tensor) -> bool:
    return anchor.dim() > parameter.dim() and not anchor.numel()


def _is_saved_nothing(anchor: Tensor, parameter: Tensor) -> bool:
    """The same in a state, which has whole tensors."""
    return anchor.shape == (0,) and parameter.shape != (0,)
