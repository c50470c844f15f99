"""Makes lists of parameters from a user's encoders, and checks all that a user passes in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _native
from ..ops._tensors import check_writable, index_tensor, why_unsupported
from ..ops.drop_modalities import check_batches
from . import _surgery
from ._active import Active as Active
from ._gathered import shard_again, shard_if_gathered
from ._guards import Guard, ends_of
from ._parameters import (
    Encoders,
    Select,
    Shared,
    SharedParameters,
    named_parameters,
    selection,
)
from ._reading import read_each
from ._together import check_one_order
from .shards import Shard, is_dtensor, local_part, placed_gradient, shard_of


class Modalities:
    """The encoders of M modalities as one flat list of parameters.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
        select: Which parameters take part: "all", "matrix" (ndim ≥ 2), "conv" (ndim = 4), or a
            callable on a parameter.
        shared: Parameters of no modality, as in `GradientMethod`.

    Attributes:
        names: The modalities, in the order of `encoders`.
        parameters: The selected parameters of all modalities, modality by modality.
        parameter_names: A readable name for each of them.
        modality: The index of each one's modality.
        logits_names: Errors call each modality's logits so.

    Raises:
        TypeError: an encoder is neither a module nor an iterable of tensors, `shared` holds
            something else than modules and parameters, or a selected parameter is integer,
            complex or sparse, and not frozen.
        ValueError: fewer than two modalities, a modality without parameters of its own, or a
            parameter that belongs to two and is not in `shared`.
    """

    def __init__(
        self,
        encoders: Encoders,
        select: Select = "all",
        shared: Shared | None = None,
    ) -> None:
        if not isinstance(encoders, (Mapping, nn.ModuleDict)):
            raise TypeError(f"encoders must map names to modules, got {type(encoders).__name__}")
        if len(encoders) < 2:
            raise ValueError(f"balancing needs at least two modalities, got {list(encoders)}")
        keep = selection(select)
        self.names: tuple[str, ...] = tuple(encoders)
        # Only modules can be asked again: an iterable may have been a generator.
        self._modules = {n: e for n, e in encoders.items() if isinstance(e, nn.Module)}
        for each in self._modules.values():
            if "_is_fsdp_managed_module" in vars(each):
                shard_if_gathered(each)
        self._keep = keep
        self._shared = SharedParameters(shared)
        of_none = self._shared.ids()
        self.logits_names: list[str] = [f"logits[{name!r}]" for name in encoders]
        self.parameters: list[Tensor] = []
        self.parameter_names: list[str] = []
        self.modality: list[int] = []
        owner: dict[int, str] = {}
        for m, (name, encoder) in enumerate(encoders.items()):
            every = named_parameters(name, encoder)
            found = [(label, p) for label, p in every if id(p) not in of_none]
            before = len(self.parameters)
            for label, parameter in found:
                if id(parameter) in owner:
                    if owner[id(parameter)].startswith(f"encoders[{name!r}]"):
                        continue  # tied weights within one encoder are one parameter
                    raise ValueError(
                        f"{label} is the same parameter as {owner[id(parameter)]}; "
                        "a parameter can belong to one modality only. Give what several modalities "
                        "use as shared=[...]: it stays unmodulated"
                    )
                owner[id(parameter)] = label
                # `_takes`, but for the call: `ogm_backward` does this in every step.
                reason = why_unsupported(parameter)
                if (reason is None or parameter.requires_grad) and keep(parameter):
                    if reason is not None:
                        raise TypeError(f"{label} {reason}")
                    self.parameters.append(parameter)
                    self.parameter_names.append(label)
                    self.modality.append(m)
            if not found and every:
                raise ValueError(
                    f"encoders[{name!r}] has no parameter of its own: shared= holds all "
                    f"{len(every)}. The gradient of an encoder that several modalities use cannot "
                    "be divided among them; act on their features instead, with OPM, ARM or "
                    "mmfuse.ops.scale_grad"
                )
            if len(self.parameters) == before:
                raise ValueError(
                    f"encoders[{name!r}] has no parameter to modulate: {len(found)} found, "
                    f"but select={select!r} selects none that can get a gradient"
                )
        self._owner = tuple(self.modality)
        self._everything = list(range(len(self.parameters)))
        #: Each modality with the places of its first and of its last parameter.
        self.ends: tuple[tuple[int, int, int], ...] = ends_of(self._owner, len(self.names))
        #: Knows the last step's gradients.
        self.guard: Guard = Guard()
        self._keys = frozenset(self.names)
        self._sharded = any(map(is_dtensor, self.parameters))
        # Those that had no gradient in the last step though they require one.
        self._waiting: list[int] = []
        #: The registrations of parameters and modules when the encoders were last looked at.
        self.registrations: int = _surgery.watch()
        self._places: dict[int, Shard | None] = {}
        #: The groups whose ranks are known to have these modalities in this order.
        self.compared: WeakSet[dist.ProcessGroup] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state but for facts about these very tensors: a copy has others."""
        return {**self.__dict__, "_places": {}, "compared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.registrations = _surgery.watch()  # another process counts its own

    def _takes(self, parameter: Tensor) -> bool:
        """True if it takes part: not if it is frozen and quantised, since it gets no gradient."""
        able = parameter.requires_grad or why_unsupported(parameter) is None
        return able and self._keep(parameter)

    @property
    def device(self) -> torch.device:
        """The device that the encoders are on now."""
        return self.parameters[0].device

    def check_unchanged(self) -> None:
        """Checks that the encoders that are modules still have the parameters they had.

        Those that FSDP2 has gathered, as in an evaluation, are sharded again.

        Raises:
            ValueError: a parameter was added, removed or replaced by another object; it is named.
        """
        now = _surgery.registrations
        for m, name in enumerate(self.names):
            if name not in self._modules:
                continue
            added, gone = self._changes(m)
            if self._sharded and (added or gone):
                shard_again(self._modules[name])
                added, gone = self._changes(m)
            for what, changed in (("new", added), ("gone", gone)):
                if changed:
                    raise ValueError(
                        f"{changed[0]} is {what} since this object was made ({len(changed)} such "
                        "parameters); make a new one for the changed encoders"
                    )
        self.registrations = now

    def _changes(self, m: int) -> tuple[list[str], list[str]]:
        """The names of an encoder's parameters that are new, and of those that are gone."""
        every = zip(self.parameter_names, self.parameters, self.modality, strict=True)
        labels = [(label, p) for label, p, owner in every if owner == m]
        known = {id(p) for _, p in labels} | self._shared.ids()
        found = named_parameters(self.names[m], self._modules[self.names[m]])
        present = {id(p) for _, p in found}
        added = [label for label, p in found if self._takes(p) and id(p) not in known]
        return added, [label for label, p in labels if id(p) not in present]

    def check_ranks(self, group: dist.ProcessGroup) -> None:
        """Checks, once, that all ranks have these modalities in this order: numbers go by it.

        Raises:
            ValueError: they do not; on all ranks.
        """
        if torch.compiler.is_dynamo_compiling():
            return
        if self.compared is None:
            self.compared = WeakSet()
        if group not in self.compared:
            check_one_order(self.names, self.device, group)
            self.compared.add(group)

    def active(
        self,
        missing: Collection[str] = (),
        eager: bool = False,
        anchors: list[Tensor] | None = None,
    ) -> Active:
        """The parameters that require and have a non-empty gradient now.

        Args:
            missing: Modalities whose encoders need not have any, since no sample has them.
            eager: Nothing is compiled, so that compiled code may look at the parameters.
            anchors: One for each parameter, to be read with it.

        Raises:
            RuntimeError: no parameter of an encoder has a gradient though some require one, or
                nothing has happened to an encoder's gradients since the last step.
            TypeError: a gradient is sparse or of an unsupported dtype; the message names it.
            ValueError: a parameter has no gradient because it has been replaced, as `fully_shard`
                does.
        """
        grads: list[Tensor]
        read, found = _native.read_gradients, None
        if eager and read is not None and not self._sharded:
            found = read(self.parameters, anchors)
        paired = False
        if found is not None:
            grads, ids, waiting, wide, table, paired = found
            ids = self._everything if ids is None else ids
            device = grads[0].device if grads else None
            dtype = torch.float64 if wide else torch.float32
        else:
            each = read_each(self.parameters, self.parameter_names)
            (grads, ids, waiting, device, dtype), table = each, None
        plain = device is not None and not self._sharded
        # One that has been replaced waits for a gradient for ever; looking takes longer than a step
        # should, so that it is done where the list has changed.
        if waiting != self._waiting:
            self.check_unchanged()
            self._check_reached(ids, waiting, missing)
            if not missing:  # else it is looked at again
                self._waiting = waiting
        if eager and grads:  # a version is a constant to the compiler
            for mark in self.guard.marks or ():  # here, since it is a call less in most steps
                grad = self.parameters[mark[1]].grad
                if mark[2]() is grad and grad is not None and grad._version - mark[3] < 2:
                    self.guard.check(self, missing)
                    break
        if self._sharded:
            placed = [placed_gradient(self.parameters[i]) for i in ids]
            grads = [grad for grad in placed if grad is not None]
        if not plain and grads:
            check_writable(grads, lambda t: f"the gradient of {self.parameter_names[ids[t]]}")
        if plain and len(ids) == len(self.parameters):
            owner = self._owner
            return Active(self.parameters, grads, ids, owner, [], device, dtype, table, paired)
        params = [self.parameters[i] for i in ids]
        return self._parts(params, grads, ids, device if plain else None, dtype, table, paired)

    def _check_reached(
        self, ids: Sequence[int], waiting: Sequence[int], missing: Collection[str]
    ) -> None:
        """Raises a RuntimeError for an encoder that could have gradients and has none at all."""
        with_any = {self.modality[i] for i in ids}
        for m in sorted({self.modality[i] for i in waiting} - with_any):
            if self.names[m] in missing:
                continue
            raise RuntimeError(
                f"no parameter of the encoder of {self.names[m]!r} has a gradient: the backward "
                "pass comes before step(), the optimizer's step and zero_grad() after it. Other "
                "causes are a loss that does not reach this encoder, the encoder of a copy of the "
                "model, and gradients that are not in p.grad (DeepSpeed's ZeRO, an optimizer in "
                "the backward pass)"
            )

    def held(self, parameters: Iterable[Tensor]) -> Active:
        """Those of the parameters that are an encoder's, in the place of their gradients."""
        given = {id(p) for p in parameters}
        ids = [i for i, p in enumerate(self.parameters) if id(p) in given and p.numel()]
        mine = [self.parameters[i].detach() for i in ids]
        return self._parts(mine, mine, ids)

    def _parts(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        ids: list[int],
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        table: Tensor | None = None,
        paired: bool = False,
    ) -> Active:
        modality = tuple([self.modality[i] for i in ids])
        if not self._sharded:
            return Active(params, grads, ids, modality, [], device, dtype, table, paired)
        shards = [self._place(i) for i in ids]
        own, mine = ([local_part(t) for t in tensors] for tensors in (params, grads))
        return Active(own, mine, ids, modality, shards, dtype=dtype)

    def _place(self, i: int) -> Shard | None:
        """The place of this rank's part of a parameter; looked up once."""
        if i not in self._places:
            self._places[i] = shard_of(self.parameter_names[i], self.parameters[i])
        return self._places[i]

    def ordered(self, what: str, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The values in the order of the modalities.

        Raises:
            TypeError: `values` is not a mapping.
            ValueError: its names are not those of the encoders.
        """
        if type(values) is not dict or values.keys() != self._keys:
            check_names(what, values, self.names, "encoders")
        return list(map(values.__getitem__, self.names))

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each modality's parameters: [T] to [M]."""
        return per_modality(values, self.modality, len(self.names))


def check_names(what: str, values: Mapping[str, Tensor], names: Sequence[str], others: str) -> None:
    """Checks that `values`, which the user knows as `what`, has exactly these names.

    Raises:
        TypeError: `values` is not a mapping.
        ValueError: its names are not those of `others`.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} must map names to tensors, got {type(values).__name__}")
    missing = [name for name in names if name not in values]
    unknown = [name for name in values if name not in names]
    if missing or unknown:
        both = (("missing", missing), ("unknown", unknown))
        listed = "; ".join(f"{kind} {which}" for kind, which in both if which)
        raise ValueError(f"{what} and {others} name different modalities: {listed}")


def named_features(
    method: str, features: Mapping[str, Tensor], count: int
) -> tuple[list[str], list[Tensor]]:
    """Names and features of the `count` modalities that a method was made for.

    Raises:
        TypeError: `features` is not a mapping, or a feature is sparse, integer or complex.
        ValueError: there are more or fewer, or their batch sizes or devices differ.
    """
    if not isinstance(features, Mapping):
        raise TypeError(f"features must map names to tensors, got {type(features).__name__}")
    names, values = list(features), list(features.values())
    if len(names) != count:
        raise ValueError(
            f"this {method} was made for num_modalities={count}, but features has {names}"
        )
    check_batches([f"features[{name!r}]" for name in names], values)
    return names, values


def per_tensor(values: Tensor, owner: tuple[int, ...]) -> Tensor:
    """Each tensor's value of its modality: [M] to [T], on the values' device."""
    return values.index_select(0, index_tensor(owner, values.device))


def per_modality(values: Tensor, modality: Sequence[int], count: int) -> Tensor:
    """Sums over each modality's tensors, which stand together: [T] to [count].

    Slice by slice: neither a sum with weights of 0, which would spread a NaN to all modalities, nor
    atomic additions, whose order changes from run to run.
    """
    sizes = [modality.count(m) for m in range(count)]
    return torch.stack([part.sum() for part in values.split(sizes)])
