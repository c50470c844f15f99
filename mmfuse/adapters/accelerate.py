"""Methods on gradients in a training loop of Hugging Face Accelerate.

::

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    encoders = {"audio": "audio_net", "visual": "visual_net"}
    balance = Balance(accelerator, mmfuse.OGM(mmfuse.match_parameters(model, encoders)))
    for epoch in range(epochs):
        balance.set_epoch(epoch)
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

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..amp import grad_scale
from ..loop.given import More
from ..loop.gradients import GradientMethod
from ..loop.shards import whole_state
from ._methods import checked, tell_epoch, warn_of_adaptive

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
except ImportError as _error:
    raise ImportError(
        "mmfuse.adapters.accelerate needs accelerate: pip install accelerate"
    ) from _error


class Balance:
    """Takes the place of ``accelerator.backward`` and steps a method where the optimizer steps.

    Calls nothing but `observe` in a micro-batch that only accumulates, and `step` once before the
    optimizer's step, under DDP and FSDP2 after the gradients have been reduced. Epochs are yours:
    call `set_epoch` in each. A run that is resumed within one calls it with the same number after
    ``load_state``; another run with the same method calls the method's ``begin`` before.

    With ``mixed_precision="fp16"`` the gradients are still scaled in `backward`: methods that mix
    parameters into gradients are given the scale. The scaler has not looked for an Inf yet: a step
    that it skips because of one outside of the encoders counts for the method.

    Args:
        accelerator: The Accelerator. The method's state becomes part of its ``save_state`` and
            ``load_state``.
        method: Such as `mmfuse.OGM`. It can be made before or after ``accelerator.prepare``; after
            it under FSDP2, which replaces the parameters.

    Raises:
        TypeError: the method acts in the forward pass, or makes the backward passes itself.
        ValueError: the Accelerator runs DeepSpeed, Megatron-LM or the first FSDP, whose gradients
            are not in the encoders' parameters.
    """

    def __init__(self, accelerator: Accelerator, method: GradientMethod) -> None:
        check_supported(accelerator)
        self.accelerator = accelerator
        self.method: GradientMethod = checked(method)
        self._warned = False
        accelerator.register_for_checkpointing(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method})"

    def set_epoch(self, epoch: int) -> None:
        """Tells the method which epoch begins, and OPM and ARM in the models that are prepared.

        Args:
            epoch: Counted from 0; the same number again changes nothing.

        Raises:
            TypeError: it is no integer.
            ValueError: it is negative.
        """
        self.method.set_epoch(epoch)
        for model in self.accelerator._models:
            tell_epoch(model, epoch)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scales this optimizer's updates, for ``apply_to="update"``; see `GradientMethod.attach`.

        Args:
            optimizer: The optimizer, before or after ``accelerator.prepare``.

        Raises:
            TypeError: it is no optimizer.
            ValueError: as `GradientMethod.attach`.
        """
        self.method.attach(unwrapped(optimizer))

    def backward(
        self,
        loss: Tensor,
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
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
            features: Name → [B, …] features, for methods that need them.
            inputs: Name → input of each encoder, likewise.
            sync: True if the optimizer steps after this micro-batch; None for what
                ``accelerator.accumulate`` says. Pass False inside ``accelerator.no_sync``,
                where the gradients are this rank's alone.
            **kwargs: ``present``, ``scores`` and the others of `mmfuse.GradientMethod`, or as for
                ``accelerator.backward``.

        Returns:
            The method's result, or None in a micro-batch that only accumulates.

        Raises:
            RuntimeError: as the method's `step`.
            TypeError: as the method's `observe`. Nothing has been changed then.
            ValueError: as the method's `observe`. Nothing has been changed then.
        """
        if not self._warned:
            self._warned = True
            prepared = getattr(self.accelerator, "_optimizers", [])
            warn_of_adaptive(self.method, map(unwrapped, prepared))
        steps = self.accelerator.sync_gradients if sync is None else sync
        more: Any = {name: kwargs.pop(name) for name in More.__annotations__ if name in kwargs}
        with torch.enable_grad():  # a backward pass follows, so that this is no evaluation
            self.method.observe(logits, labels, features, inputs, **more)
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


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that Accelerate has wrapped; hooks on the wrapper are never called."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def step(accelerator: Accelerator, method: GradientMethod) -> Any:
    """Modulates the gradients that the backward pass has left: reduced, maybe scaled still."""
    scaler = accelerator.scaler
    scale = None if scaler is None else grad_scale(scaler, accelerator.device)
    return method.step(grad_scale=scale)
