"""NoiseStream: the counter-based random stream of every method that adds noise."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from ._devices import readable
from ._numbers import whole
from .reference.noise import standard_normal, standard_uniform


class NoiseStream:
    """Random numbers that depend on the seed, the step, the parameter and the element only.

    Philox4x32-10 (Salmon et al., SC 2011) with the seed as its key and (element block, stream id,
    step) as its counter, followed by Box-Muller. The same numbers come out of every backend, on
    every device, for any number of threads, any sharding and any number of replicas. Nothing is
    drawn from PyTorch's generators.

    Args:
        seed: The 64-bit seed, an integer. None takes `torch.initial_seed()`, which
            `torch.manual_seed` sets.
        device: The device of the state, which is that of the gradients.
        name: Streams of one seed and different names draw different numbers, as do those that the
            methods make for themselves. None takes the seed as the key itself.

    Attributes:
        state: int64 [2] on `device`: (key, step). Kernels read it there, so that advancing it
            needs no host, and a captured CUDA graph draws fresh noise at every replay.
        ids: The stream id of each tensor of a list; None numbers them from 0.
        offsets: The start of each tensor within its flattened whole tensor; None means at 0.
        agreed: True if all ranks of a distributed run are known to have this state. A method of
            mmfuse takes over the first rank's before its first step, and after `load_state_dict`.

    Raises:
        TypeError: the seed is no integer; 5.0 is none.
    """

    state: Tensor
    ids: tuple[int, ...] | None
    offsets: tuple[int, ...] | None
    agreed: bool = False

    def __init__(
        self,
        seed: SupportsIndex | None = None,
        device: torch.device | str | int | None = None,
        *,
        name: str | None = None,
    ) -> None:
        key = _as_int64(torch.initial_seed() if seed is None else seed)
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a text, got {type(name).__name__}")
        if name is not None:
            key = _named(key, name)
        try:
            where = None if device is None else torch.device(device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"device must name a device, got {device!r}") from error
        self.state = torch.tensor([key, 0], dtype=torch.int64, device=where)
        self.ids = None
        self.offsets = None

    @classmethod
    def from_state(cls, state: Tensor) -> NoiseStream:
        """A stream on an existing state, which it shares: int64 [2], contiguous, (seed, step).

        Raises:
            ValueError: `state` is something else.
        """
        if state.shape != (2,) or state.dtype != torch.int64:
            raise ValueError(
                f"the state of a stream is int64 [2], got {state.dtype} {list(state.shape)}"
            )
        if not state.is_contiguous():
            raise ValueError(
                f"the state of a stream must be contiguous, got strides {tuple(state.stride())}: "
                "kernels read it in place"
            )
        made = cls.__new__(cls)
        made.state, made.ids, made.offsets = state, None, None
        return made

    @property
    def device(self) -> torch.device:
        """The device of the state."""
        return self.state.device

    def advance(self, steps: int | Tensor = 1) -> None:
        """Moves to the next step, on the device. Until then the same numbers come out again.

        Args:
            steps: By how many; a 0-d tensor, also of bool, is not read on the host.
        """
        self.state[1].add_(steps)

    def place(self, ids: Sequence[int], offsets: Sequence[int] | None = None) -> NoiseStream:
        """Returns the same stream for other tensors: it shares the state with this one.

        With it, a shard of a parameter gets the noise that the whole parameter would get there,
        and parts of a list of tensors can be updated in separate calls.

        Args:
            ids: The stream id of each tensor, 0 ≤ id < 2³².
            offsets: Index of each tensor's first element in its flattened whole tensor, below 2⁶².

        Raises:
            TypeError: an id or an offset is no integer.
            ValueError: the lengths differ, or an id or an offset is out of range.
        """
        ids = tuple(map(operator.index, ids))
        offsets = None if offsets is None else tuple(map(operator.index, offsets))
        if offsets is not None and len(offsets) != len(ids):
            raise ValueError(f"{len(ids)} ids but {len(offsets)} offsets")
        if ids and not 0 <= min(ids) <= max(ids) < 2**32:
            raise ValueError("every stream id must be in [0, 2**32)")
        if offsets and min(offsets) < 0:
            raise ValueError("offsets must not be negative")
        if offsets and max(offsets) >= 2**62:  # places behind it fit into 64 bits, too
            raise ValueError("every offset must be below 2**62")
        placed = NoiseStream.__new__(NoiseStream)
        placed.state = self.state
        placed.ids = ids
        placed.offsets = offsets
        return placed

    def counters(self, count: int) -> tuple[list[int], list[int]]:
        """Stream ids and offsets for a list of `count` tensors.

        Raises:
            ValueError: the stream was placed for another number of tensors.
        """
        if self.ids is None:
            return list(range(count)), [0] * count
        if len(self.ids) != count:
            raise ValueError(f"the noise stream is placed for {len(self.ids)} tensors, not {count}")
        return list(self.ids), list(self.offsets or [0] * count)

    def normal(
        self,
        numel: int,
        stream_id: int = 0,
        offset: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The noise of the current step, as a tensor, to look at or to test against.

        Args:
            numel: How many elements.
            stream_id: The parameter's index in its method.
            offset: Index of the first element in the flattened whole parameter.
            dtype: Of the result.

        Returns:
            [numel] standard normal deviates on the stream's device.
        """
        return standard_normal(self.state, numel, stream_id, offset).to(dtype)

    def uniform(self, numel: int, stream_id: int = 0, offset: int = 0) -> Tensor:
        """The uniform numbers that the noise of the current step is made from.

        Args:
            numel: How many elements.
            stream_id: The parameter's index in its method.
            offset: Index of the first element in the flattened whole parameter.

        Returns:
            [numel] float32 in [2⁻³³, 1] on the stream's device.
        """
        return standard_uniform(self.state, numel, stream_id, offset)

    def to(self, device: torch.device | str | int) -> NoiseStream:
        """Returns this stream on `device`; the state is shared only if it is there already."""
        moved = NoiseStream.__new__(NoiseStream)
        moved.state = self.state.to(device)
        moved.ids, moved.offsets = self.ids, self.offsets
        moved.agreed = self.agreed
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Seed and step, enough to go on with the same numbers."""
        return {"state": self.state.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; in place, so that placed streams follow.

        Raises:
            ValueError: `state_dict` does not hold the state of a NoiseStream.
        """
        self.state.copy_(saved_state(state_dict))
        self.agreed = False

    def __repr__(self) -> str:
        numbers = ""
        if readable(self.state):
            key, step = self.state.tolist()
            numbers = f"key={key}, step={step}, "
        return f"NoiseStream({numbers}device={str(self.device)!r})"


def saved_state(state_dict: dict[str, Any]) -> Tensor:
    """The state in what `NoiseStream.state_dict` has returned.

    Raises:
        ValueError: `state_dict` does not hold the state of a NoiseStream.
    """
    state = state_dict.get("state") if isinstance(state_dict, Mapping) else None
    usual = isinstance(state, Tensor) and state.shape == (2,) and state.dtype == torch.int64
    if not isinstance(state, Tensor) or not usual or state.is_meta:
        raise ValueError("expected {'state': int64 tensor [2]} as the state of a NoiseStream")
    return state


def _as_int64(seed: SupportsIndex) -> int:
    """The same 64 bits as a signed number, which is what a tensor can hold."""
    return (whole("seed", seed) + 2**63) % 2**64 - 2**63


def _named(key: int, name: str) -> int:
    """A key of its own for every name: half of a hash is as good as any other seed."""
    salt = key.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=salt).digest()
    return int.from_bytes(digest, "little", signed=True)


_default_streams: dict[tuple[torch.device, bool], tuple[int, NoiseStream]] = {}


def default_stream(device: torch.device, alone: bool = False) -> NoiseStream:
    """The stream of `mmfuse.ogm_backward` where none is given; one per device.

    Its seed is that of `torch.manual_seed`. A new seed starts it again at step 0; the same seed
    set again cannot be told from none, so a run that must repeat within one process takes a
    `NoiseStream` (or an `mmfuse.OGM`, which makes its own). Several ranks go on with the stream of
    their first step, whatever is seeded later: a rank that began anew would wait for the others.

    Args:
        device: Of the gradients.
        alone: True for another stream, of this rank alone.
    """
    seed = torch.initial_seed()
    known = _default_streams.get((device, alone))
    if known is not None and (known[0] == seed or _is_shared(known[1])):
        return known[1]
    stream = NoiseStream(seed, device, name="ogm_backward")
    if known is not None:
        # It changes in place: a captured CUDA graph goes on reading the state that it has seen.
        known[1].load_state_dict(stream.state_dict())
        stream = known[1]
    _default_streams[device, alone] = (seed, stream)
    return stream


def _is_shared(stream: NoiseStream) -> bool:
    """True if other ranks have it as well."""
    ranks = torch.distributed
    return stream.agreed and ranks.is_available() and ranks.is_initialized()
