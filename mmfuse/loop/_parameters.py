"""The parameters that a user passes in, by name, and those of them that are selected."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from typing import Literal

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

Encoder = nn.Module | Iterable[Tensor]
#: Name → encoder, for M ≥ 2 modalities.
Encoders = Mapping[str, Encoder] | nn.ModuleDict
#: Shared by several modalities: a module, a parameter, or several of them.
Shared = nn.Module | Tensor | Iterable[nn.Module | Tensor]
Select = Literal["all", "matrix", "conv"] | Callable[[Tensor], bool]


# Its parameters do not know where they lie in the whole.
_FLAT = (
    "{} is wrapped in FullyShardedDataParallel, whose flat parameters cannot be told apart; use "
    "torch.distributed.fsdp.fully_shard (FSDP2)"
)


def _all(parameter: Tensor) -> bool:
    return True


def _matrix(parameter: Tensor) -> bool:
    return parameter.dim() >= 2


def _conv(parameter: Tensor) -> bool:
    return parameter.dim() == 4


# Functions with names, which can be pickled.
_SELECTIONS = {"all": _all, "matrix": _matrix, "conv": _conv}


def selection(select: Select) -> Callable[[Tensor], bool]:
    if callable(select):
        return select
    if not isinstance(select, str) or select not in _SELECTIONS:
        raise ValueError(
            f"select must be one of {', '.join(map(repr, _SELECTIONS))} or a callable, "
            f"got {select!r}"
        )
    return _SELECTIONS[select]


def refuse_encoders(module: nn.Module, first: object) -> None:
    """Raises a TypeError if a method that is a module of the model is given encoders.

    Args:
        module: The method, before its beginning.
        first: The first of its arguments, which is a number, a text, or numbers by name.
    """
    values = first.values() if isinstance(first, Mapping) else ()
    kinds = (nn.Module, Iterable)
    several = any(isinstance(v, kinds) and not isinstance(v, Tensor) for v in values)
    if isinstance(first, (list, tuple)):
        several = any(isinstance(v, (nn.Module, Tensor)) for v in first)
    if not (several or isinstance(first, (nn.Module, Iterator))):
        return
    name = type(module).__name__
    argument = next(iter(signature(type(module)).parameters))
    raise TypeError(
        f"{argument} got {type(first).__name__}, but {name} is a module of the model and takes no "
        f"encoders: self.{name.lower()} = mmfuse.{name}(); see docs/methods/{name.lower()}.md"
    )


def named_parameters(name: str, encoder: Encoder) -> list[tuple[str, Tensor]]:
    prefix = f"encoders[{name!r}]"
    if isinstance(encoder, nn.Module):
        _refuse_flat_parameters(prefix, encoder)
        of_module: list[tuple[str, Tensor]] = [
            (f"{prefix}.{key}", p) for key, p in encoder.named_parameters()
        ]
        if not of_module:
            raise ValueError(
                f"{prefix} ({type(encoder).__name__}) has no parameter: a modality that nothing "
                "is learned for has no gradient to balance; leave it out"
            )
        for label, parameter in of_module:
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{label} is lazy and has no shape yet: call the model once first")
        _refuse_flat(of_module)
        return of_module
    if isinstance(encoder, str):
        raise TypeError(
            f"{prefix} is the text {encoder!r}: encoders are modules or parameters; "
            f"mmfuse.match_parameters(model, {{{name!r}: {encoder!r}}}) finds them by their names"
        )
    if isinstance(encoder, Tensor) or not isinstance(encoder, Iterable):
        raise TypeError(
            f"{prefix} must be a module or an iterable of parameters, got {type(encoder).__name__}"
        )
    found = [(f"{prefix}[{i}]", p) for i, p in enumerate(encoder)]
    for label, parameter in found:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{label} is not a parameter but {type(parameter).__name__}")
        _check_parameter(label, parameter)
    _refuse_flat(found)
    return found


def _check_parameter(label: str, parameter: Tensor) -> None:
    if not parameter.is_leaf:
        raise TypeError(
            f"{label} is the result of an operation, which gets no gradient in .grad; pass the "
            "parameters themselves"
        )
    if not (parameter.requires_grad or isinstance(parameter, nn.Parameter)):
        raise TypeError(
            f"{label} is a tensor that requires no gradient, as those of state_dict(); pass "
            "the parameters themselves"
        )


def _iterator(shared: Iterable[nn.Module | Tensor]) -> Iterator[nn.Module | Tensor] | None:
    """None for what is no iterable; NumPy's scalars only say that they are."""
    if isinstance(shared, (str, bytes, Mapping)):
        return None
    try:
        return iter(shared)
    except TypeError:
        return None


class SharedParameters:
    """The parameters that belong to no modality, although encoders may hold them.

    Args:
        shared: A module, a parameter, or an iterable of both; None for none.

    Raises:
        TypeError: it is something else.
    """

    def __init__(self, shared: Shared | None) -> None:
        # Only modules can be asked again, after surgery.
        self._modules: list[nn.Module] = []
        self._tensors: list[Tensor] = []
        if shared is None:
            return
        if isinstance(shared, (nn.Module, Tensor)):
            labelled = [("shared", shared)]
        else:
            several = _iterator(shared)
            if several is None:
                raise TypeError(
                    "shared must be a module, a parameter or an iterable of both, got "
                    f"{type(shared).__name__}"
                )
            labelled = [(f"shared[{i}]", each) for i, each in enumerate(several)]
        for label, each in labelled:
            if isinstance(each, nn.Module):
                self._modules.append(each)
            elif isinstance(each, Tensor):
                _check_parameter(label, each)
                self._tensors.append(each)
            else:
                raise TypeError(
                    f"{label} is neither a module nor a parameter but {type(each).__name__}"
                )

    def ids(self) -> set[int]:
        """The `id` of every such parameter, as the modules are now."""
        found = {id(p) for p in self._tensors}
        for module in self._modules:
            found.update(map(id, module.parameters()))
        return found


def _refuse_flat_parameters(label: str, encoder: nn.Module) -> None:
    """Raises a TypeError for an encoder that FSDP1 wraps, or a part of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(
        isinstance(module, fsdp.FullyShardedDataParallel) for module in encoder.modules()
    ):
        raise TypeError(_FLAT.format(label))


def _refuse_flat(found: list[tuple[str, Tensor]]) -> None:
    """Raises a TypeError for a parameter of FSDP1, which may wrap the model alone."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for label, parameter in found:
        if getattr(parameter, "_fsdp_flattened", False):
            raise TypeError(_FLAT.format(label))
