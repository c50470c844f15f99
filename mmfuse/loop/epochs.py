"""EpochWindow: which epoch it is, and in which of them a method acts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import ParamSpec

from .._devices import narrowed, readable
from .._numbers import MOST_MODALITIES, whole
from ._name_sums import BITS, order_by, read_sums, write_sums
from ._parameters import refuse_encoders
from ._together import check_one_order
from .modalities import check_names, named_features
from .ranks import Group, check_group, no_replicas, several
from .state import MODULE_FORMAT, check_format, refuse_format

# One more than the largest int64, which a buffer can hold.
_MOST = 2**62

P = ParamSpec("P")
R = TypeVar("R")


def typed_as(forward: Callable[P, R]) -> Callable[[Callable[..., Any]], Callable[P, R]]:
    """Tells type checkers that a module's call takes and returns what its forward pass does."""
    raise NotImplementedError


class EpochWindow:
    """A mixin for methods that act from one epoch to another, both included."""

    starts: int
    ends: int | None
    #: The epoch that runs, counted from 0; 0 before `set_epoch`.
    epoch: int
    # True once `set_epoch` has been called in this run.
    _told: bool
    _warned: bool
    # `modulating` in this epoch: a compiled step that read the epoch would be compiled in each.
    _acting: bool
    process_group: Group

    def _set_window(self, starts: int, ends: int | None) -> None:
        """Begins in epoch 0.

        Raises:
            TypeError: `starts` or `ends` is no integer.
            ValueError: `ends` is before `starts`.
        """
        self.starts = whole("starts", starts)
        self.ends = None if ends is None else whole("ends", ends)
        if self.ends is not None and self.ends < self.starts:
            raise ValueError(f"ends={ends} is before starts={starts}")
        self._warned = False
        self._go_to(None)

    def _go_to(self, epoch: int | None) -> None:
        """Goes to an epoch; None for none that has been told."""
        self.epoch, self._told = epoch or 0, epoch is not None
        self._acting = self.modulating

    @property
    def modulating(self) -> bool:
        """True if the current epoch lies between `starts` and `ends`, both included."""
        return self.starts <= self.epoch and (self.ends is None or self.epoch <= self.ends)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, counted from 0; the same number again changes nothing.

        Raises:
            TypeError: it is no integer.
            ValueError: it is negative.
        """
        epoch = whole("epoch", epoch, least=0)
        if epoch >= _MOST:
            raise ValueError(f"epoch must be below 2**62, got {epoch}")
        self._go_to(epoch)

    def begin(self) -> None:
        """Says that a new run begins: the next `set_epoch` begins its epoch whatever its number."""
        self._go_to(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of it all but the process group, which is shared.

        Copied together with the model, as in ``copy.deepcopy((model, method))``, it is a method on
        the copied parameters.
        """
        memo[id(self.process_group)] = self.process_group
        made: Any = type(self).__new__(type(self))
        memo[id(self)] = made
        state: Any = super().__reduce_ex__(4)[2]
        made.__dict__.update(copy.deepcopy(state, memo))
        return made

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickles it, together with the model.

        Raises:
            TypeError: there is a process group.
        """
        if self.process_group not in (None, False):
            raise TypeError(
                f"a process_group belongs to its process, so that this {type(self).__name__} "
                "cannot be pickled: save its state_dict(), or make it with process_group=None "
                "(all ranks)"
            )
        return super().__reduce_ex__(protocol)

    def _check_told(self, method: str, needed: bool = False) -> None:
        """Warns once where a window was given, but no epoch.

        Raises:
            RuntimeError: `needed`, since anchors are taken with it, but no epoch was given.
        """
        if needed and not self._told:
            raise RuntimeError(
                f"{method}: call set_epoch(epoch) first, in every epoch; it copies the parameters "
                "that gradients are compared with"
            )
        if self._told or self._warned or (self.ends is None and self.starts == 0):
            return
        self._warned = True
        warnings.warn(
            f"{method} was made with starts={self.starts}, ends={self.ends}, but set_epoch was "
            "never called: every epoch counts as the first; call set_epoch(epoch) in each",
            RuntimeWarning,
            stacklevel=4,
        )


class EpochWindowModule(EpochWindow, nn.Module):
    """The same for a module. All that outlives a step is in buffers, and so is the epoch.

    The number that the host goes by is an attribute: a step that read the buffer would wait for the
    device. `load_state_dict` sets both.

    Attributes:
        epoch_state: int64 [2]: the format's number, and the epoch.
        names: The modalities, in the order of the state; None until a training step shows them.
    """

    _warned_of_mode = False
    epoch_state: Tensor
    names: tuple[str, ...] | None = None
    # Of a method with numbers of each modality: their names' check sums, [M, BITS].
    names_state: Tensor
    # The check sums of a state whose names no step has shown yet.
    _sums: tuple[int, ...] | None = None
    # `_version_of_names` when the buffer was read or written here.
    _read: tuple[int, int] | None = None
    # The name of the names' origin in errors.
    _origin = "earlier batches (reset_parameters() forgets them)"
    # First values of the buffers that do not begin at 0.
    _first: dict[str, Tensor]
    # Buffers that stay float64, where the device has it, whatever the module is cast to.
    _wide: tuple[str, ...] = ()
    # True if all ranks are known to have one stream.
    _agreed: bool
    # The hyper-parameters that `repr` shows, where there is no rule that has them.
    _shown: tuple[str, ...] = ("rule",)

    def __init__(self, first: object = None) -> None:
        refuse_encoders(self, first)
        super().__init__()

    def _set_window(self, starts: int, ends: int | None) -> None:
        self.register_buffer("epoch_state", torch.zeros(2, dtype=torch.int64))
        self._first = {}
        self._agreed = False
        super()._set_window(starts, ends)

    def _begin(
        self,
        num_modalities: int,
        starts: int,
        ends: int | None,
        process_group: Group,
        backend: str | None,
    ) -> None:
        """Takes the arguments that modules have in common.

        Raises:
            TypeError: a number is no integer.
            ValueError: a number is out of range.
        """
        self.num_modalities: int = whole("num_modalities", num_modalities, 2, MOST_MODALITIES)
        self.process_group: Group = check_group(process_group)
        self.backend: str | None = backend
        self._set_window(starts, ends)

    def _begin_names(self) -> None:
        """Registers the names' buffer, for a method that keeps a number of each modality."""
        first = torch.zeros(self.num_modalities, BITS, dtype=torch.int64)
        self.register_buffer("names_state", first)
        self._read = self._version_of_names()

    def _version_of_names(self) -> tuple[int, int]:
        """Another one whenever somebody has written into the names' buffer, or replaced it."""
        buffer = self.names_state
        return id(buffer), -1 if buffer.is_inference() else buffer._version

    def _in_order(self, what: str, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """An argument that maps M names, in the order of the state; as it is where none is known.

        Raises:
            ValueError: the state is of others.
        """
        order = self.names
        if order is None:
            sums = self._look_for_names()
            if sums is None:
                return given
            order = order_by(sums, given)
            if order is None:
                raise ValueError(
                    f"{what} names {list(given)}, but the state of this {type(self).__name__} is "
                    "of others: give the names of the run that has saved it, or begin anew with "
                    "reset_parameters()"
                )
        if tuple(given) == order:
            return given
        check_names(what, given, order, self._origin)
        return {name: given[name] for name in order}

    def _look_for_names(self) -> tuple[int, ...] | None:
        """Reads names that others have written: an average over steps, another rank's broadcast."""
        now = self._version_of_names()
        if now != self._read and readable(self.names_state):
            self._sums, self._read = read_sums(self.names_state), now
        return self._sums

    # A graph holds what was found: as torch.compiler.assume_constant_result says it, without the
    # compiler's import. A step that reads other names compiles anew.
    _look_for_names._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _features(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features of a batch, checked, in the order of the state."""
        named_features(type(self).__name__, features, self.num_modalities)
        return dict(self._in_order("features", features))

    def _remember(self, names: Iterable[str]) -> None:
        """Keeps the names of the first training step, in the order that the state has since.

        Raises:
            ValueError: other ranks have others, or in another order; on all ranks.
        """
        if self.names is not None:
            return
        names = tuple(names)
        if self._sums is None:
            alone = torch.compiler.is_dynamo_compiling()
            if not alone and (group := several(self.process_group)) is not None:
                check_one_order(names, self.epoch_state.device, group)
            write_sums(self.names_state, names)
        self.names = names

    def _forget_names(self, sums: tuple[int, ...] | None) -> None:
        """Takes the check sums of a state in the place of names; None if it has none."""
        self.names, self._sums, self._read = None, sums, self._version_of_names()

    def _begin_at(self, name: str, first: Tensor) -> None:
        """Registers a buffer that does not begin at 0, and keeps a copy of its first value."""
        if first.is_meta:
            raise ValueError(
                f"{name} is on the meta device, where it holds nothing: make the NoiseStream with "
                'device="cpu"'
            )
        self._first[name] = first.clone()
        self.register_buffer(name, first)

    def _begin_with(self, name: str, numbers: float | Sequence[float]) -> None:
        """The same with numbers in float64, where the module is."""
        # On the CPU also within `torch.device("meta")`, where they would not be known later.
        self._begin_at(name, torch.tensor(numbers, dtype=torch.float64, device="cpu"))
        self._buffers[name] = self._first[name].to(self.epoch_state.device, copy=True)

    def _go_to(self, epoch: int | None) -> None:
        super()._go_to(epoch)
        for place, number in enumerate(self._state_of(epoch)):
            self.epoch_state[place].fill_(number)

    @staticmethod
    def _state_of(epoch: int | None) -> tuple[int, int]:
        # Twice the format and 1: an average over states, cut to integers, may be 1 too small.
        return 2 * MODULE_FORMAT + 1, 0 if epoch is None else epoch + 1

    def _check_told(self, method: str, needed: bool = False) -> None:
        """Warns, once, of training that goes on without gradients, too, as in an evaluation."""
        super()._check_told(method, needed)
        if torch.is_grad_enabled() or self._warned_of_mode or torch.compiler.is_compiling():
            return
        self._warned_of_mode = True
        warnings.warn(
            f"{method} is in training mode, but no gradients are recorded: if this is an "
            f"evaluation, model.eval() has not reached it; make {method} a submodule of the model "
            "(self.balance = ...), or call its own eval()",
            RuntimeWarning,
            stacklevel=4,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets all buffers to what they are in a new object, but for the epoch, which stays.

        Needed after ``to_empty``; for a module that was made on the meta device that calls it.
        """
        for name, buffer in self.named_buffers(recurse=False):
            if name in self._first:
                buffer.copy_(self._first[name])
            else:
                buffer.zero_()
        self._go_to(self.epoch if self._told else None)
        self._agreed = False
        if "names_state" in self._buffers:
            self._forget_names(None)

    def _replicate_for_data_parallel(self) -> Any:
        if self.training:
            raise no_replicas(type(self).__name__)
        return super()._replicate_for_data_parallel()

    def _check_named(self, what: str, given: object) -> None:
        """Checks that an argument maps one name for each modality."""
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} must map names to tensors, got {type(given).__name__}")
        if len(given) != self.num_modalities:
            raise ValueError(
                f"this {type(self).__name__} was made for num_modalities={self.num_modalities}, "
                f"but {what} has {list(given)}"
            )

    def extra_repr(self) -> str:
        """The hyper-parameters, in which epochs the module acts, and on what."""
        names = (*self._shown, "num_modalities", "starts", "ends", "epoch")
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        card = getattr(self, "card", None)
        return shown if card is None else f"{shown}, acts={card.acts!r}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Fills in the buffers that a module from the meta device gets."""
        named = "names_state" in self._buffers
        known = named and self._version_of_names() == self._read
        empty, wide = self.epoch_state.is_meta, {name: self._buffers[name] for name in self._wide}
        device = fn(torch.empty(0, device=self.epoch_state.device)).device if wide else None
        for name, buffer in wide.items():
            assert buffer is not None and device is not None
            self._buffers[name] = buffer.to(narrowed(torch.float64, device))
        super()._apply(fn, recurse)
        for name, buffer in wide.items():
            moved = self._buffers[name]
            assert buffer is not None and moved is not None
            if moved.dtype != narrowed(torch.float64, moved.device):
                # The new one is made from the old: a cast to fewer digits would lose some.
                self._buffers[name] = buffer.to(moved.device).to(
                    narrowed(torch.float64, moved.device)
                )
        if empty and not self.epoch_state.is_meta:
            self.reset_parameters()
        if known:
            self._read = self._version_of_names()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **keywords: Any
    ) -> None:
        """Goes on in the epoch in which the state was taken, with the modalities in its order.

        Raises:
            ValueError: the state is of another format.
        """
        name, key = type(self).__name__, f"{prefix}epoch_state"
        old = state_dict.pop(f"{prefix}_extra_state", None)
        if old is not None:  # of format 1, in which it was no tensor
            check_format(name, old, ["epoch"])
            state_dict[key] = torch.tensor(self._state_of(old["epoch"]))
        saved = state_dict.get(key)
        stamp, number = self._state_of(None)
        fits = isinstance(saved, Tensor) and saved.shape == (2,) and not saved.is_meta
        if isinstance(saved, Tensor) and fits:
            stamp, number = saved.tolist()
        if stamp // 2 != MODULE_FORMAT:
            refuse_format(name, stamp // 2, MODULE_FORMAT)
        named = "names_state" in self._buffers
        if named and isinstance(saved, Tensor):  # an older state has no names
            unknown = saved.new_zeros(self.num_modalities, BITS)
            state_dict.setdefault(f"{prefix}names_state", unknown)
        super()._load_from_state_dict(state_dict, prefix, *args, **keywords)
        if fits:
            self._go_to(number - 1 if number else None)
        if fits and named:
            some = readable(self.names_state)
            self._forget_names(read_sums(self.names_state) if some else None)
        self._agreed = False
