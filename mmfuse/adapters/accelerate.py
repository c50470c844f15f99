"""OGM, InfoReg and RedReg in a training loop of Hugging Face Accelerate.

::

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    encoders = {"audio": "audio_net", "visual": "visual_net"}
    balance = Balance(accelerator, mmfuse.OGM(mmfuse.match_parameters(model, encoders)))
    for batch in loader:
        with accelerator.accumulate(model):
            loss, logits = ...
            balance.backward(loss, logits, batch["labels"])  # or accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..amp import grad_scale
from ..loop.shards import whole_state

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError(
        'mmfuse.adapters.accelerate needs accelerate: pip install "mmfuse[accelerate]"'
    ) from error


class Method(Protocol):
    """What acts on gradients: `mmfuse.OGM`, `InfoReg`, `RedReg`."""

    def observe(
        self, logits: Mapping[str, Tensor], labels: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Takes in one micro-batch."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Modulates the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""


class Balance:
    """Takes the place of ``accelerator.backward`` and steps a method where the optimizer steps.

    Calls nothing but `observe` in a micro-batch that only accumulates, and `step` once before the
    optimizer's step, under DDP and FSDP2 after the gradients have been reduced. Epochs are yours:
    call the method's ``set_epoch``, ``start_epoch`` and ``end_epoch``.

    With ``mixed_precision="fp16"`` the gradients are still scaled in `backward`: methods that mix
    parameters into gradients are given the scale. The scaler has not looked for an Inf yet, so that
    a step which it skips for one that is in no encoder counts for the method.

    Args:
        accelerator: The Accelerator. The method's state becomes part of its ``save_state`` and
            ``load_state``.
        method: `mmfuse.OGM`, `InfoReg` or `RedReg`. It can be made before or after
            ``accelerator.prepare``; after it under FSDP2, which replaces the parameters.

    Raises:
        TypeError: the method has no `observe` and `step`, as those that act in the forward pass.
        ValueError: the Accelerator runs DeepSpeed, Megatron-LM or the first FSDP, whose gradients
            are not in the encoders' parameters.
    """

    def __init__(self, accelerator: Accelerator, method: Method) -> None:
        check_supported(accelerator)
        check_method(method)
        self.accelerator = accelerator
        self.method = method
        accelerator.register_for_checkpointing(self)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scales this optimizer's updates, for ``OGM(apply_to="update")``; see `OGM.attach`.

        Args:
            optimizer: The optimizer, before or after ``accelerator.prepare``.

        Raises:
            TypeError: it is no optimizer, or the method scales no updates.
            ValueError: as `OGM.attach`.
        """
        attach(self.method, optimizer)

    def backward(
        self,
        loss: Tensor,
        logits: Mapping[str, Tensor],
        labels: Tensor,
        features: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        *,
        sync: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Takes the place of ``accelerator.backward(loss)``; clip gradients afterwards.

        Args:
            loss: The scalar loss of this micro-batch.
            logits: Name → [B, C] logits of each modality alone.
            labels: [B] integer class indices; rows labelled −100 do not count.
            features: Name → [B, …] features, for `RedReg`.
            inputs: Name → input of each encoder, for `RedReg`.
            sync: Whether the optimizer steps after this micro-batch; None for what
                ``accelerator.accumulate`` says. Inside ``accelerator.no_sync``, which says nothing
                and would have gradients modulated that are this rank's alone, pass False.
            **kwargs: As for ``accelerator.backward``.

        Returns:
            The method's result, or None in a micro-batch that only accumulates.

        Raises:
            RuntimeError: as the method's `step`.
            TypeError: as the method's `observe`. Nothing has been changed then.
            ValueError: as the method's `observe`. Nothing has been changed then.
        """
        steps = self.accelerator.sync_gradients if sync is None else sync
        more = {"features": features, "inputs": inputs}
        given = {name: value for name, value in more.items() if value is not None}
        self.method.observe(logits, labels, **given)
        self.accelerator.backward(loss, **kwargs)
        return step(self.accelerator, self.method) if steps else None

    def state_dict(self) -> dict[str, Any]:
        """The method's, with sharded tensors made whole: every rank must call it."""
        found: dict[str, Any] = whole_state(self.method.state_dict())
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: as the method's.
        """
        self.method.load_state_dict(state_dict)


def check_supported(accelerator: Accelerator) -> None:
    """Checks that gradients are in the encoders' parameters when the backward pass is over.

    Raises:
        ValueError: they are not.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"gradients cannot be modulated under {kind.value}, which keeps them in buffers of its "
            "own; use DDP or FSDP2"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1:
        raise ValueError(
            "gradients cannot be modulated under the first FSDP, whose flat parameters cannot be "
            "told apart; use FSDP2 (fsdp_version=2)"
        )


def check_method(method: object) -> None:
    """Checks that it acts on gradients.

    Raises:
        TypeError: it does not.
    """
    if not all(callable(getattr(method, name, None)) for name in ("observe", "step")):
        raise TypeError(
            "expected a method that acts on gradients (OGM, InfoReg, RedReg), got "
            f"{type(method).__name__}"
        )


def attach(method: Method, optimizer: torch.optim.Optimizer) -> None:
    """Attaches the optimizer that Accelerate has wrapped.

    Raises:
        TypeError: it is no optimizer, or the method scales no updates.
        ValueError: as `OGM.attach`.
    """
    if not hasattr(method, "attach"):
        raise TypeError(f"{type(method).__name__} scales no updates; nothing is to be attached")
    method.attach(unwrapped(optimizer))


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that Accelerate has wrapped; hooks on the wrapper are never called."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def step(accelerator: Accelerator, method: Method) -> Any:
    """Modulates the gradients that the backward pass has left: reduced, maybe scaled still."""
    scaler = accelerator.scaler
    if scaler is None or "grad_scale" not in inspect.signature(method.step).parameters:
        return method.step()
    return method.step(grad_scale=grad_scale(scaler, accelerator.device))
