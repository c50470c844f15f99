"""How the Lightning callback finds its way about a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..loop._parameters import Encoders

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.optim import Optimizer


def parameters_of(encoders: Encoders) -> list[Tensor]:
    """Those of all encoders."""
    found: list[Tensor] = []
    for encoder in encoders.values():
        found += encoder.parameters() if isinstance(encoder, nn.Module) else encoder
    return found


def same(known: list[Tensor], encoders: Encoders) -> bool:
    """True if these encoders have the known parameters, and no others."""
    now = parameters_of(encoders)
    return len(now) == len(known) and all(p is q for p, q in zip(now, known, strict=True))


def kept(value: Any) -> Any:
    """The value, or a list of what it yields: a generator can be read once."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, Tensor) else value


def scaler_of(trainer: Trainer) -> Any:
    """The GradScaler of the precision plugin; None if there is none."""
    return getattr(trainer.precision_plugin, "scaler", None)


def loggers_of(trainer: Trainer) -> Callable[[dict[str, float], int], None]:
    """Writes scalars of a step to all of the Trainer's loggers."""

    def write(scalars: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step)

    return write


def warn_of_no_state(checkpoint: Mapping[str, Any], key: str, names: list[str]) -> None:
    """Warns of a checkpoint that has no state of the callback with this key."""
    if key in checkpoint.get("callbacks", {}):
        return
    warnings.warn(
        f"the checkpoint has no state of Balance for {names}: the method begins anew. Modalities "
        "must have the same names in the same order to go on",
        RuntimeWarning,
        stacklevel=3,
    )


def check_strategy(trainer: Trainer) -> None:
    """Raises a ValueError for DeepSpeed, whose gradients are not in ``.grad``."""
    strategy = type(trainer.strategy).__name__
    if "DeepSpeed" in strategy:
        raise ValueError(
            f"gradients cannot be modulated under {strategy}, which keeps them in buffers of its "
            'own; use strategy="ddp", or ModelParallelStrategy with fully_shard (FSDP2)'
        )


def optimizers_of(trainer: Trainer, method: Any) -> list[Optimizer]:
    """The optimizers that hold a parameter of the encoders.

    Raises:
        ValueError: there is none although a parameter is trained; or there are several, beside a
            GradScaler, for a method that needs all gradients unscaled.
    """
    mine = {id(p) for p in method.modalities.parameters}
    holders = [
        optimizer
        for optimizer in trainer.optimizers
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
    ]
    if not holders and any(p.requires_grad for p in method.modalities.parameters):
        raise ValueError(
            "no optimizer holds a parameter of the encoders: make them in "
            "configure_optimizers() from the LightningModule's own parameters"
        )
    if len(holders) > 1 and method.anchors is not None and scaler_of(trainer) is not None:
        raise ValueError(
            f"{type(method).__name__} with a GradScaler needs all encoders in one "
            f"optimizer, found {len(holders)}: when the first of them steps, the gradients of "
            "the others are scaled still"
        )
    return holders


def check_modulated(method: Any, optimizer: Optimizer) -> None:
    """Raises a RuntimeError for gradients that are newer than the step that was for them, too."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    newer = method.modalities.guard.newer(method.modalities, held)
    if newer:
        raise RuntimeError(
            f"the gradients of the encoder of {newer[0]!r} are newer than the step that has "
            "modulated all encoders before another optimizer's: call Balance.observe before the "
            "backward pass of each optimizer, or run one backward pass for all of them before the "
            "first steps"
        )
