"""The parameters that a user passes in, by name, and those of them that are selected."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

Encoder = nn.Module | Iterable[Tensor]
Select = Literal["all", "matrix", "conv"] | Callable[[Tensor], bool]


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
    if select not in _SELECTIONS:
        raise ValueError(
            f"select must be one of {', '.join(map(repr, _SELECTIONS))} or a callable, "
            f"got {select!r}"
        )
    return _SELECTIONS[select]


def named_parameters(name: str, encoder: Encoder) -> list[tuple[str, Tensor]]:
    prefix = f"encoders[{name!r}]"
    if isinstance(encoder, nn.Module):
        _refuse_flat_parameters(prefix, encoder)
        of_module: list[tuple[str, Tensor]] = [
            (f"{prefix}.{key}", p) for key, p in encoder.named_parameters()
        ]
        if not of_module:
            raise ValueError(
                f"{prefix} ({type(encoder).__name__}) has no parameter: a modality that nothing is "
                "learned for has no gradient to balance; leave it out"
            )
        for label, parameter in of_module:
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{label} is lazy and has no shape yet: call the model once first")
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
    return found


def _refuse_flat_parameters(label: str, encoder: nn.Module) -> None:
    """Raises a TypeError for FSDP1, whose parameters do not know where they lie in the whole."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(
        isinstance(module, fsdp.FullyShardedDataParallel) for module in encoder.modules()
    ):
        raise TypeError(
            f"{label} is wrapped in FullyShardedDataParallel, whose flat parameters cannot be told "
            "apart; use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
