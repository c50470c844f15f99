"""Errors and warnings of steps on gradients that are not those of one new backward pass.

A step keeps the first and the last gradient of each modality, and their versions: PyTorch counts
the changes in place of every tensor. In the next step, a gradient is

    another tensor          after ``zero_grad()``
    the same, version + 0   if nothing has happened to it: a second step would change it again
    the same, version + 1   if a backward pass has added to it, and nobody has zeroed it before
    the same, version + 2   and more after ``zero_grad(set_to_none=False)`` or ``p.grad.zero_()``

Clipping, optimizers, GradScalers and DistributedDataParallel add to these numbers and take nothing
from them. Beside a backward pass, + 1 may be a new gradient that was copied into the old one, or
one that was zeroed as ``p.grad.data.zero_()``, which PyTorch does not count.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from .._devices import readable
from .shards import local_part

if TYPE_CHECKING:
    from .modalities import Active, Modalities

# A modality; the place of its first parameter, its gradient, and the version of that; of its last.
Mark = tuple[int, int, "ref[Tensor]", int, int, "ref[Tensor]", int]
_ACCUMULATE = "observe(...) in each micro-batch, step() after the last"


def ends_of(owner: Sequence[int], count: int) -> tuple[tuple[int, int, int], ...]:
    """Each modality that is there with the places of its first and of its last tensor.

    Args:
        owner: The modality of each tensor, in ascending order.
        count: How many modalities there are.
    """
    ends, start = [], 0
    for m in range(count):
        held = owner.count(m)
        if held:
            ends.append((m, start, start + held - 1))
            start += held
    return tuple(ends)


def _version(grad: Tensor, sharded: bool) -> int:
    # FSDP2 adds to the local part, and zeroing counts in the whole tensor.
    return grad._version + local_part(grad)._version if sharded else grad._version


def _holds_something(grad: Tensor) -> bool:
    return readable(grad) and bool(grad.any())


class Guard:
    """The gradients as a method's last step has left them; one that is alive is not kept alive."""

    def __init__(self) -> None:
        #: None before the first step, and in a copy, whose gradients are others.
        self.marks: list[Mark] | None = None
        # How many gradients there were; 0 if they were not counted.
        self._count = 0
        self._told = False
        # True once gradients were found that are zeroed where PyTorch does not count it.
        self._unseen = False
        # True after a look before this step's backward pass, which sees more.
        self._looked = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "marks": None}

    def follow(self, other: Guard, modalities: Modalities) -> None:
        """Goes on with what another object for these encoders knows; others differ in gradients."""
        most = len(modalities.parameters)
        if other.marks is not None and all(j < most for *_, j, _, _ in other.marks):
            self.__dict__.update(other.__dict__)

    def keep(self, modalities: Modalities, active: Active | None) -> None:
        """Keeps what a step has left.

        Args:
            modalities: The encoders.
            active: The gradients that it has changed; None if it has changed none.
        """
        self._looked = False
        parameters, marks = modalities.parameters, []
        if active is not None and not modalities._sharded:
            # This is done in every step: no gradient is asked of its parameter once more.
            ids, grads = active.ids, active.grads
            every = len(ids) == len(parameters)
            ends = modalities.ends if every else ends_of(active.modality, len(modalities.names))
            for m, a, b in ends:
                one, other = grads[a], grads[b]
                mark = m, ids[a], ref(one), one._version, ids[b], ref(other), other._version
                marks.append(mark)
            self.marks, self._count = marks, len(ids)
            return
        places = modalities._everything if active is None else active.ids
        owner = modalities._owner if active is None else active.modality
        for m, a, b in ends_of(owner, len(modalities.names)):
            i, j = places[a], places[b]
            first, last = parameters[i].grad, parameters[j].grad
            if first is not None and last is not None:
                v, w = _version(first, modalities._sharded), _version(last, modalities._sharded)
                marks.append((m, i, ref(first), v, j, ref(last), w))
        self.marks, self._count = marks, 0 if active is None else len(active.ids)

    def check(self, modalities: Modalities, missing: Collection[str]) -> None:
        """Looks at the gradients of a new step.

        Args:
            modalities: The encoders.
            missing: Those that may have had no sample, and so no gradient.

        Raises:
            RuntimeError: nothing has happened to those of a modality since the last step.
        """
        parameters, sharded = modalities.parameters, modalities._sharded
        kept: list[int] = []
        added: list[int] = []
        for m, i, first, v, j, last, w in self.marks or ():
            grad, end = parameters[i].grad, parameters[j].grad
            if grad is None or end is None or first() is not grad or last() is not end:
                continue
            more = _version(grad, sharded) - v
            if more < 2 and _version(end, sharded) - w == more:
                (added if more else kept).append(m)
        if self._told or self._unseen or self._looked:
            added = []  # there is nothing more to warn of
        if kept or added:
            self._tell(modalities, missing, kept, added)

    def _live(self, modalities: Modalities) -> list[tuple[int, Tensor | None, Tensor | None, bool]]:
        """Modalities that are trained, two gradients, and True if they are as they were left."""
        found, sharded = [], modalities._sharded
        for m, i, first, v, j, last, w in self.marks or ():
            one, other = modalities.parameters[i], modalities.parameters[j]
            if not (one.requires_grad or other.requires_grad):
                continue
            pairs = (one.grad, first(), v), (other.grad, last(), w)
            same = all(g is not None and g is h and _version(g, sharded) == n for g, h, n in pairs)
            found.append((m, one.grad, other.grad, same))
        return found

    def _tell(
        self, modalities: Modalities, missing: Collection[str], kept: list[int], added: list[int]
    ) -> None:
        live = self._live(modalities)
        if live and all(same for *_, same in live):
            raise RuntimeError(
                "these gradients have been changed by this method already: call step() once for "
                f"each backward pass (of several micro-batches, {_ACCUMULATE}). If a replayed CUDA "
                "graph has written new ones, which PyTorch does not notice, call forget() before"
            )
        for m, one, other, same in live:
            name = modalities.names[m]
            if not same or m not in kept or name in missing:
                continue
            # One of zero was zeroed where PyTorch does not count it.
            if any(_holds_something(local_part(g)) for g in (one, other) if g is not None):
                raise RuntimeError(
                    f"the gradient of the encoder of {name!r} is the one that the last step has "
                    "changed: no backward pass has added to it since, and it would be changed "
                    "again. If the encoder has been replaced, as by a copy of it, make a new "
                    "method for the new one; if this step's loss does not reach it, call "
                    "zero_grad() before the backward pass, or freeze it"
                )
        if not added or modalities._sharded or len(added) != len(live):
            return
        # DistributedDataParallel's views of a bucket count what happens to all of it.
        if any(g is not None and g._is_view() for _, one, other, _ in live for g in (one, other)):
            return
        # No error: + 1 is also what a new gradient counts that was copied into the old one, or that
        # was zeroed as p.grad.data, and one that grows since no optimizer has its parameter.
        self._told = True
        warnings.warn(
            "a backward pass seems to have added to gradients that this method has changed in the "
            "step before, so that a part of them is changed again: call zero_grad() after the "
            f"optimizer's step; with gradient accumulation, {_ACCUMULATE}",
            RuntimeWarning,
            stacklevel=7,
        )

    def newer(self, modalities: Modalities, held: Collection[int]) -> list[str]:
        """Modalities with a gradient that the last step has not left.

        Args:
            modalities: The encoders.
            held: Ids of the parameters that are looked at.
        """
        marks, found = {mark[0]: mark for mark in self.marks or ()}, []
        for m, a, b in modalities.ends:
            mark, own = marks.get(m), modalities.parameters[a : b + 1]
            if not any(id(p) in held and p.grad is not None for p in own):
                continue
            if mark is None or modalities.parameters[mark[1]].grad is not mark[2]():
                found.append(modalities.names[m])
        return found

    def check_before(self, modalities: Modalities, name: str, accumulates: bool) -> None:
        """Looks at the gradients that a backward pass would be added to.

        Args:
            modalities: The encoders.
            name: The method's, for error texts.
            accumulates: True if it has `observe` and `step`.

        Raises:
            RuntimeError: they are those that the last step has left.
        """
        if torch.compiler.is_dynamo_compiling():  # asked first: the rest would compile it anew
            return
        if self.marks is None or self._unseen:
            return
        self._looked = True
        for mark in self.marks:  # in most loops this is all
            first = modalities.parameters[mark[1]]
            if first.requires_grad and (first.grad is None or first.grad is not mark[2]()):
                return
        live = self._live(modalities)
        if not live or not all(same for *_, same in live):
            return
        # An optimizer that has a part of the parameters zeroes that part alone.
        grads = [p.grad for p in modalities.parameters if p.grad is not None and p.requires_grad]
        if len(grads) < self._count:
            return
        if not modalities._sharded:  # or a rank might find its part to be zero, and go on alone
            something = [_holds_something(g) for g in grads]
            # PyTorch does not count p.grad.data.zero_(): looking in every step would wait for it.
            self._unseen = not any(something) and all(map(readable, grads))
            if not all(something):
                return
        way = (
            f"with gradient accumulation, call loss.backward() and {name}'s {_ACCUMULATE}"
            if accumulates
            else f"{name} takes one micro-batch in a step"
        )
        raise RuntimeError(
            f"the gradients are those that {name}'s last step has left: a backward pass would add "
            "to them, and the sum be changed again. Call zero_grad() after the optimizer's step; "
            f"{way}"
        )
