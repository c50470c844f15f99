"""The methods that the adapters take."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from ..loop.epochs import EpochWindowModule
from ..loop.gradients import GradientMethod
from ..methods.catalogue import METHODS

# A framework's own backward pass suffices for those that need logits.
_NAMES = ", ".join(
    name
    for name, made in METHODS.items()
    if made.card.acts == "gradient" and "logits" in made.card.needs
)


def checked(method: object) -> GradientMethod:
    """The method, if it acts on gradients.

    Raises:
        TypeError: it does not, as those that act in the forward pass; or it makes the backward
            passes itself.
    """
    if not isinstance(method, GradientMethod):
        raise TypeError(
            f"expected a method that acts on gradients ({_NAMES}), got {type(method).__name__}"
        )
    if method.rule.need.second == "unimodal":
        raise TypeError(
            f"{method.name} makes its two backward passes itself, but the framework makes one; "
            f"call {method.name}.backward(loss, unimodal_losses=...) in a training loop of your own"
        )
    return method


def tell_epoch(model: nn.Module, epoch: int) -> None:
    """Tells the methods that are part of a model, such as OPM and ARM, which epoch begins."""
    for module in model.modules():
        if isinstance(module, EpochWindowModule):
            module.set_epoch(epoch)


def warn_of_adaptive(
    method: GradientMethod, optimizers: Iterable[torch.optim.Optimizer], *, stacklevel: int = 2
) -> None:
    """Warns if an optimizer divides the method's factor on gradients out again."""
    if method.apply_to == "update" or not method.rule.need.scales:
        return
    for optimizer in optimizers:
        if _adaptive(optimizer):
            kind = type(optimizer).__name__
            warnings.warn(
                f"{kind} divides a gradient by its own recent size, which cancels most of the "
                f"factor of {method.name}: use {method.name}(..., "
                'apply_to="update"), or SGD, as the papers do',
                RuntimeWarning,
                stacklevel=stacklevel + 1,
            )
            return


def _adaptive(optimizer: torch.optim.Optimizer) -> bool:
    """True if a step does not grow with the gradient: Adam, its relatives and Lion have betas."""
    known = (torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop)
    return isinstance(optimizer, known) or "betas" in optimizer.defaults
