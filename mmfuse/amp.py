"""The scale and the overflow flag of a GradScaler, as tensors on the device.

The `step` and `backward` of every `mmfuse.GradientMethod` take both. After
``scaler.unscale_(optimizer)`` nothing needs `grad_scale`; it is for optimizers with ``fused=True``
that are left to unscale on their own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grad_scale(scaler: torch.amp.GradScaler, device: torch.device | str) -> Tensor:
    """The factor by which a scaler has scaled the loss, and so the gradients: 0-d float32.

    1 if the scaler is disabled.
    """
    _check(scaler)
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device must name a device, got {device!r}") from error
    scaled = scaler.scale(torch.ones((), dtype=torch.float32, device=where))
    assert isinstance(scaled, Tensor)
    return scaled


def found_inf(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """True if the scaler has found a NaN or an Inf and will skip the optimizer's step.

    That may be in a parameter that belongs to no encoder, such as the head, where no method looks.

    Args:
        scaler: After ``scaler.unscale_(optimizer)``.
        optimizer: Whose gradients it has unscaled.

    Returns:
        0-d float32, not zero if the step will be skipped; None if the scaler is disabled.

    Raises:
        RuntimeError: `unscale_` was not called since the last step.
    """
    _check(scaler)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be an optimizer, got {type(optimizer).__name__}")
    if not scaler.is_enabled():
        return None
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    flags = list(found.values())
    if not flags:
        raise RuntimeError("found_inf: call scaler.unscale_(optimizer) first")
    return torch.stack([flag.to(flags[0].device) for flag in flags]).sum()


def _check(scaler: object) -> None:
    if not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
