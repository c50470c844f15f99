"""Batches of any loader, as inputs by name and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._devices import known

#: Makes (inputs by name, labels) of what a loader yields.
Read = Callable[[Any], tuple[Mapping[str, Tensor], Tensor]]

_LABELS = ("labels", "label")
_WAY_OUT = (
    'give batch=, such as lambda b: ({"audio": b[0], "visual": b[1]}, b[2]), which returns inputs '
    "by name and labels"
)


class Batch(NamedTuple):
    """One batch, where the model is.

    Attributes:
        modalities: Name → input of each modality.
        others: Inputs that are no modality's, which the model gets as they are.
        labels: [B, ...].
    """

    modalities: dict[str, Tensor]
    others: dict[str, Tensor]
    labels: Tensor


def batches(
    called: str,
    loader: Iterable[Any],
    read: Read | None,
    names: Sequence[str] | None,
    device: torch.device | None,
) -> Iterator[Batch]:
    """The loader's batches; errors call it `called`.

    Args:
        called: Name of the argument.
        loader: Any iterable.
        read: The user's `batch=`.
        names: The modalities; None for all inputs of the first batch.
        device: The model's device; None leaves tensors where they are.

    Raises:
        TypeError: a batch is something else than inputs by name and labels.
        ValueError: there is no batch, or batches differ in their names.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, Mapping, str)):
        raise TypeError(f"{called} must yield batches, got {type(loader).__name__}")
    empty = True
    for found in loader:
        inputs, labels = _read(called, found, read, names)
        if names is None:
            names = list(inputs)
        missing = [name for name in names if name not in inputs]
        if missing:
            raise ValueError(
                f"a batch of {called} has the inputs {list(inputs)}, without {missing}; "
                "name those that are there with modalities="
            )
        if device is not None:
            inputs = {name: x.to(device) for name, x in inputs.items()}
        places = {f"{name!r} on {x.device}": x.device for name, x in inputs.items()}
        if len(set(places.values())) > 1 or torch.device("meta") in places.values():
            raise ValueError(
                f"a batch of {called} has {', '.join(places)}: all of its inputs must be where the "
                "model is"
            )
        rows = {name: len(x) if x.dim() else 0 for name, x in inputs.items() if name in names}
        wrong = {name: n for name, n in rows.items() if n != len(labels)}
        if wrong:
            raise ValueError(f"a batch of {called} has {len(labels)} labels, but rows {wrong}")
        yield Batch(
            {name: inputs[name] for name in names},
            {name: x for name, x in inputs.items() if name not in names},
            labels,
        )
        empty = False
    if empty:
        raise ValueError(
            f"{called} yields no batch; a generator that has been read once is empty: give a "
            "DataLoader or a list of batches"
        )


def _read(
    called: str, found: Any, read: Read | None, names: Sequence[str] | None
) -> tuple[dict[str, Tensor], Tensor]:
    if read is not None:
        parts: Any = read(found)
        source = "batch= returns"
    else:
        parts = _parted(found, names)
        source = f"{called} yields"
    if not isinstance(parts, (tuple, list)) or len(parts) != 2 or not _are(*parts):
        raise TypeError(
            f"{source} {described(found if read is None else parts)}, where (inputs by name, "
            f"labels) is expected; {_WAY_OUT}"
        )
    inputs, labels = parts
    if not labels.dim():
        raise TypeError(f"{source} a single label of shape [], where one for each sample is needed")
    # PyTorch compares neither sparse tensors nor those of 8 bits, and meta tensors hold nothing.
    narrow = labels.is_floating_point() and labels.dtype.itemsize < 2
    if not known(labels) or labels.is_complex() or narrow:
        raise TypeError(
            f"{source} labels of {labels.dtype}, {labels.layout}, on {labels.device}, where a "
            "dense tensor of integers or real numbers is needed"
        )
    return dict(inputs), labels.detach()


def _parted(found: Any, names: Sequence[str] | None) -> Any:
    """(inputs, labels) of the usual kinds of batches; of others the batch as it is."""
    if isinstance(found, Mapping):
        key = next((key for key in _LABELS if isinstance(found.get(key), Tensor)), None)
        if key is not None:
            inputs = {n: x for n, x in found.items() if n != key and isinstance(x, Tensor)}
            return inputs, found[key]
    elif (
        isinstance(found, (tuple, list))
        and names is not None
        and len(found) == len(names) + 1
        and all(isinstance(x, Tensor) for x in found)
    ):
        return dict(zip(names, found[:-1], strict=True)), found[-1]
    return found


def _are(inputs: Any, labels: Any) -> bool:
    named = isinstance(inputs, Mapping) and inputs and all(isinstance(n, str) for n in inputs)
    return bool(named) and all(isinstance(x, Tensor) for x in (*inputs.values(), labels))


def described(found: Any) -> str:
    """The kind of a batch, in a few words."""
    if isinstance(found, Mapping):
        return f"{type(found).__name__} with {list(found)}"
    if isinstance(found, (tuple, list)):
        return f"{type(found).__name__} of ({', '.join(type(x).__name__ for x in found)})"
    return type(found).__name__
