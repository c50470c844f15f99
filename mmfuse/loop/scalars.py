"""Scalars of every step, from the device to TensorBoard or elsewhere, without waiting for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .._numbers import MOST_STEPS, whole

#: Gets the scalars of one step, by their tags, and the step.
Write = Callable[[dict[str, float], int], object]


class ScalarLog:
    """Collects scalars on the device and hands them over once in a while.

    ::

        writer = torch.utils.tensorboard.SummaryWriter()
        with ScalarLog(writer) as log:
            for step, (batch, labels) in enumerate(loader):
                ...
                log.add(step, ogm.step(logits, labels).as_dict())

    Reading a value of the device makes the host wait for all work before it. Here a step's values
    are put into a row of a buffer on the device; after `every` steps the buffer is copied to the
    host while the training goes on, and it is read when the next buffer is full, or in `flush`.

    Args:
        write: A `SummaryWriter`, or a callable that gets the scalars of one step by their tags and
            the step, in the order of the calls of `add`.
        every: Steps between two copies to the host.

    Raises:
        TypeError: `write` is neither.
        ValueError: `every` is less than 1, or more than a million.
    """

    def __init__(self, write: Write | Any, every: int = 50) -> None:
        add_scalar = getattr(write, "add_scalar", None)
        if add_scalar is None and not callable(write):
            raise TypeError(
                f"write must be a SummaryWriter or a callable, got {type(write).__name__}"
            )
        self.every: int = whole("every", every, 1, MOST_STEPS)
        self._write: Write = write if add_scalar is None else _tensorboard(add_scalar)
        self._tags: tuple[str, ...] = ()
        self._rows: Tensor | None = None
        self._steps: list[int] = []
        # The copy on its way to the host, the steps in it, and what is there once it has arrived.
        self._host: Tensor | None = None
        self._sent: list[int] = []
        self._arrived: torch.cuda.Event | None = None
        self._closed = False

    def __repr__(self) -> str:
        waiting = len(self._steps) + len(self._sent)
        parts = [f"every={self.every}", f"{len(self._tags)} tags", f"{waiting} steps to be written"]
        return f"{type(self).__name__}({', '.join(parts + ['closed'] * self._closed)})"

    @torch.no_grad()
    def add(
        self,
        step: int,
        values: Mapping[str, Tensor | float] | Tensor,
        names: Sequence[str] | None = None,
    ) -> None:
        """Adds the scalars of one step, as float32.

        The first call fixes the tags.

        Args:
            step: The step that they belong to.
            values: Tag → 0-d tensor or number; or a [K] tensor.
            names: The K tags, with a [K] tensor only.

        Raises:
            RuntimeError: the log is closed.
            TypeError: a value is neither a tensor nor a number, or is complex.
            ValueError: the tags differ from those of the first call, or a value is no scalar.
        """
        if self._closed:
            raise RuntimeError("ScalarLog.add: the log is closed")
        if isinstance(values, Tensor):
            tags = _tags_of_row(values, names)
        elif names is None:
            tags = tuple(values)
        else:
            raise TypeError("names go with a [K] tensor; leave them out, a mapping has its own")
        self._check_tags(tags)
        order = self._tags or tags
        if isinstance(values, Mapping):
            row = _stack(values, order, self._rows)
        elif tags == order:
            row = values
        else:
            row = torch.stack([values[tags.index(tag)] for tag in order])
        if self._rows is None:
            self._tags = tags
            # Not of the default dtype, which may be one of few digits.
            dtype = torch.promote_types(row.dtype, torch.float32)
            self._rows = torch.empty(self.every, len(tags), dtype=dtype, device=row.device)
        self._rows[len(self._steps)].copy_(row, non_blocking=True)
        self._steps.append(step)
        if len(self._steps) == self.every:
            self._send()

    def _check_tags(self, tags: tuple[str, ...]) -> None:
        if not tags:
            raise ValueError("there are no scalars to add")
        if not self._tags or tags == self._tags:
            return
        missing = [tag for tag in self._tags if tag not in tags]
        new = [tag for tag in tags if tag not in self._tags]
        if missing or new:
            kinds = (("missing", missing), ("new", new))
            raise ValueError(
                "every call must have the tags of the first call; "
                + "; ".join(f"{kind} {which}" for kind, which in kinds if which)
            )

    def _send(self) -> None:
        """Starts the copy of the buffer to the host, which has had a period for the last one."""
        self._receive()
        assert self._rows is not None
        rows = self._rows[: len(self._steps)]
        on_gpu = rows.is_cuda
        if self._host is None:
            self._host = torch.empty(self._rows.shape, dtype=self._rows.dtype, pin_memory=on_gpu)
        self._host[: len(rows)].copy_(rows, non_blocking=on_gpu)
        self._sent, self._steps = self._steps, []
        if on_gpu:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(rows.device))
        else:
            self._receive()

    def _receive(self) -> None:
        """Writes what has been sent."""
        if not self._sent:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        assert self._host is not None
        steps, self._sent = self._sent, []
        for step, row in zip(steps, self._host[: len(steps)].tolist(), strict=True):
            self._write(dict(zip(self._tags, row, strict=True)), step)

    def flush(self) -> None:
        """Writes all that was added; waits for the device."""
        if self._steps:
            self._send()
        self._receive()

    def close(self) -> None:
        """Flushes; nothing can be added afterwards. The writer stays open."""
        if not self._closed:
            self.flush()
        self._closed = True

    def __enter__(self) -> ScalarLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def scalars_of(result: Any, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The scalars in what a method's step returns, by tags such as ``"coefficients/audio"``.

    Features, masks and indices are left out, as is what is None.

    Args:
        result: A method's, such as `OGMResult`, or another dataclass of [M] and 0-d tensors.
        names: The M modalities, in the order of the method's encoders, which may be given as they
            are; None for those that the result has, or 0, 1, … if it has none.

    Returns:
        Tag → 0-d tensor that shares the result's memory; of 0-d tensors the tag is the field.

    Raises:
        TypeError: `result` is no dataclass.
        ValueError: there are more or fewer names than the result has modalities.
    """
    if not dataclasses.is_dataclass(result) or isinstance(result, type):
        raise TypeError(f"result must be a dataclass, got {type(result).__name__}")
    if names is None:
        names = getattr(result, "modalities", ()) or None
    else:
        _check_listed(names)
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if not isinstance(value, Tensor) or value.is_complex():
            continue
        if value.dim() == 0:
            found[field.name] = value
        elif value.dim() == 1 and value.is_floating_point():
            numbered = map(str, range(len(value)))
            called = list(getattr(result, "entries", {}).get(field.name, names or numbered))
            if len(value) != len(called):
                raise ValueError(
                    f"names has {called}, but {type(result).__name__}.{field.name} is of "
                    f"{len(value)} modalities"
                )
            for name, entry in zip(called, value.unbind(), strict=True):
                found[f"{field.name}/{name}"] = entry
    return found


def _tensorboard(add_scalar: Callable[..., object]) -> Write:
    def write(scalars: dict[str, float], step: int) -> None:
        for tag, value in scalars.items():
            add_scalar(tag, value, step)

    return write


def _check_listed(names: object) -> None:
    listed = hasattr(names, "__len__") and getattr(names, "ndim", 1) != 0
    if isinstance(names, (str, Tensor)) or not listed:
        raise TypeError(f"names must be a list of texts, got {type(names).__name__}")


def _tags_of_row(values: Tensor, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        raise TypeError("a tensor of values needs names, a tag for each value")
    _check_listed(names)
    if values.dim() != 1 or len(values) != len(names):
        raise ValueError(
            f"values must be of shape [{len(names)}], one for each name, got {list(values.shape)}"
        )
    tags = tuple(names)
    if len(set(tags)) != len(tags):
        raise ValueError(f"a name stands twice in {list(tags)}")
    if values.is_complex():
        raise TypeError("values must be real")
    return tags


def _stack(
    values: Mapping[str, Tensor | float], tags: Sequence[str], rows: Tensor | None
) -> Tensor:
    """[K], where the rows are, or else where the first tensor is."""
    tensors = [v for v in values.values() if isinstance(v, Tensor)]
    device = rows.device if rows is not None else tensors[0].device if tensors else None
    scalars = []
    for tag in tags:
        value = values[tag]
        if not isinstance(value, Tensor):
            if not isinstance(value, (int, float)):
                raise TypeError(f"values[{tag!r}] is no scalar but {type(value).__name__}")
            # Filled on the device: a copy from the host could wait.
            value = torch.full((), float(value), dtype=torch.float32, device=device)
        elif value.dim() != 0:
            raise ValueError(f"values[{tag!r}] must be 0-d, got shape {list(value.shape)}")
        elif value.is_complex():
            raise TypeError(f"values[{tag!r}] must be real")
        scalars.append(value if value.device == device else value.to(device, non_blocking=True))
    return torch.stack(scalars)
