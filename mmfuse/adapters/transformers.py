"""Methods on gradients in the Trainer of Hugging Face Transformers.

The model returns a mapping (such as a ``ModelOutput``) with ``loss`` and ``modality_logits``, the
name of each modality → [B, C] logits of it alone::

    trainer = BalancedTrainer(
        model,
        TrainingArguments(...),
        train_dataset=...,
        balance=lambda model: mmfuse.OGM(
            mmfuse.match_parameters(model, {"audio": "audio_net", "visual": "visual_net"}),
            apply_to="update",
        ),
    )
    trainer.train()

The Trainer's default optimizer is AdamW, which divides a factor on gradients out again: give OGM,
MLB and the others that take it ``apply_to="update"``. The Trainer's optimizer is attached.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from .._devices import WIDE
from ..loop.given import Kind, More
from ..loop.gradients import GradientMethod
from ..loop.scalars import scalars_of
from ..loop.shards import whole_state
from ._methods import checked, tell_epoch, warn_of_adaptive

try:
    import accelerate as _accelerate  # noqa: F401
    from transformers import Trainer, TrainerCallback
except ImportError as _error:
    raise ImportError(
        "mmfuse.adapters.transformers needs transformers and accelerate: "
        "pip install accelerate transformers"
    ) from _error

from .accelerate import check_supported, step, unwrapped

#: The file of the method's state in a checkpoint folder.
STATE_NAME = "mmfuse.pt"

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class BalanceMixin(_Base):  # type: ignore[misc]
    """Steps a method in a Trainer, after the backward passes of a step and before clipping.

    For ``class MyTrainer(BalanceMixin, Trainer)``; `BalancedTrainer` is that. `balance_inputs`,
    which can be overridden, takes the method's arguments from the model's outputs. Epochs, gradient
    accumulation, mixed precision, DDP, FSDP2 and checkpoints are the Trainer's; the method's state
    lies beside the optimizer's, in the file "mmfuse.pt". The result of the last step is read
    when the Trainer reads the loss, at its logging steps, and becomes part of the same log.
    Methods in the model, such as `mmfuse.OPM`, are told the epochs, too.

    Args:
        *args: As for the Trainer.
        balance: Makes the method from the model, such as `mmfuse.OGM`. It is called at the
            beginning of `train`, when the model is on its device and sharded. None leaves
            the gradients alone.
        **kwargs: As for the Trainer.

    Attributes:
        balance_method: The method, from the beginning of `train` on.

    Raises:
        TypeError: `balance` is not callable; in `train`, if it makes no method that acts on
            gradients.
        ValueError: in `train`, under DeepSpeed or the first FSDP, as `mmfuse.adapters.accelerate`.
    """

    balance_method: GradientMethod | None = None

    def __init__(
        self,
        *args: Any,
        balance: Callable[[nn.Module], GradientMethod] | None = None,
        **kwargs: Any,
    ) -> None:
        if balance is not None and not callable(balance):
            raise TypeError(
                "balance must be a function that makes a method from a model, such as "
                "lambda model: mmfuse.OGM(...), since the Trainer may replace the model's "
                f"parameters; got {type(balance).__name__}"
            )
        self._balance = balance
        self._balance_result: Any = None
        self._balance_seen = False
        self._balance_epoch: int | None = None
        self._balance_checkpoint: str | None = None
        self._balance_attached: torch.optim.Optimizer | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_Epochs(self))

    def balance_inputs(
        self, outputs: Any, inputs: Mapping[str, Any]
    ) -> tuple[Any, ...] | dict[str, Any]:
        """The arguments of the method's `observe`; override it for other models.

        Args:
            outputs: Of the model.
            inputs: The batch that the model was called with, labels included.

        Returns:
            ``(outputs["modality_logits"], inputs["labels"])``, then for methods that need them,
            ``outputs["modality_features"]`` and ``outputs["modality_inputs"]``. Or a mapping by the
            names of arguments, where the outputs have ``modality_present`` or the like, one for
            each further argument of `mmfuse.GradientMethod`; with ``modality_scores``,
            ``modality_ratios`` or ``modality_coefficients`` they need neither logits nor labels.

        Raises:
            ValueError: one of them is missing; it is named, with what there is.
        """
        method = self.balance_method
        assert method is not None
        if not isinstance(outputs, Mapping):
            raise ValueError(
                f"{type(method).__name__} needs a model that returns a mapping with "
                f"'modality_logits', got {type(outputs).__name__}; return one, or override "
                "balance_inputs"
            )
        given = {name: outputs.get(f"modality_{name}") for name in More.__annotations__}
        given = {name: value for name, value in given.items() if value is not None}
        own = any(name in given for name in get_args(Kind))
        more = method.rule.need.inputs
        # A method with the user's own numbers may still need features and inputs: `observe` says.
        needed = [] if own else [f"modality_{name}" for name in ("logits", *more)]
        labels = [] if own else ["labels"]
        for what, names, found in (("outputs", needed, outputs), ("inputs", labels, inputs)):
            missing = [name for name in names if found.get(name) is None]
            if missing:
                raise ValueError(
                    f"{type(method).__name__} needs {missing} in the model's {what}, which have "
                    f"{list(found)}; add them, or override balance_inputs"
                )
        others = {name: outputs.get(f"modality_{name}") for name in ("features", "inputs") if more}
        if own:
            return {**others, **given}
        seen = {"logits": outputs["modality_logits"], "labels": inputs["labels"], **others}
        return {**seen, **given} if given else tuple(seen.values())

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's loss; in training the method looks at the outputs."""
        # The Trainer takes the labels out of the batch where it smooths them.
        given = dict(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        if model.training and self.balance_method is not None:
            seen = self.balance_inputs(outputs, given)
            with torch.enable_grad():  # the Trainer trains, so that this is no evaluation
                if isinstance(seen, Mapping):
                    self.balance_method.observe(**seen)
                else:
                    self.balance_method.observe(*seen)
            self._balance_seen = True
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; then the method's step, if the optimizer's follows."""
        loss: Tensor = super().training_step(*args, **kwargs)
        method = self.balance_method
        if method is None:
            return loss
        if not self._balance_seen:
            raise RuntimeError(
                f"{type(method).__name__} has seen nothing of this batch: compute_loss must call "
                "super().compute_loss(...)"
            )
        self._balance_seen = False
        if self.accelerator.sync_gradients:
            self._balance_result = step(self.accelerator, method)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log, with the last step's result where the training loss is logged."""
        if "loss" in logs and self._balance_result is not None:
            names = self.balance_method.modalities.names  # type: ignore[union-attr]
            scalars = scalars_of(self._balance_result, names)
            device = next(iter(scalars.values())).device
            # One copy to the host for all of them.
            wide = WIDE[device.type]
            values = torch.stack([v.detach().to(device, wide) for v in scalars.values()])
            logs.update(zip(scalars, values.tolist(), strict=True))
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        method = self.balance_method
        if method is None:
            return
        state = whole_state(method.state_dict())  # on all ranks, since sharded tensors are gathered
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._balance_checkpoint = checkpoint

    def _balance_begin_training(self) -> None:
        checkpoint, self._balance_checkpoint = self._balance_checkpoint, None
        self._balance_epoch = self._balance_result = None
        if self._balance is None:
            return
        check_supported(self.accelerator)
        optimizer = unwrapped(self.optimizer)
        # An optimizer that is trained on with a second time keeps the method that scales it.
        if self._balance_attached is None or self._balance_attached is not optimizer:
            method = checked(self._balance(self.accelerator.unwrap_model(self.model_wrapped)))
            self._balance_attached = None
            if method.apply_to == "update":
                method.attach(optimizer)
                self._balance_attached = optimizer
            warn_of_adaptive(method, [optimizer])
            self.balance_method = method
        assert self.balance_method is not None
        self.balance_method.begin()
        if checkpoint is not None:
            self._balance_resume(self.balance_method, checkpoint)

    def _balance_resume(self, method: GradientMethod, checkpoint: str) -> None:
        path = os.path.join(checkpoint, STATE_NAME)
        kind = type(method).__name__
        if not os.path.isfile(path):
            warnings.warn(
                f"{checkpoint} has no {STATE_NAME}: {kind} begins anew",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["method"] != kind:
            raise ValueError(f"{path} holds the state of {saved['method']}, not of {kind}")
        method.load_state_dict(saved)

    def _balance_begin_epoch(self) -> None:
        last = self._balance_epoch
        # The epoch is a fraction where the Trainer resumes; counted on, since one may be cut short.
        epoch = int(self.state.epoch or 0) if last is None else last + 1
        self._balance_epoch = epoch
        tell_epoch(self.model, epoch)
        if self.balance_method is not None:
            self.balance_method.set_epoch(epoch)


class BalancedTrainer(BalanceMixin, Trainer):  # type: ignore[misc]
    """The Trainer with a method that balances the modalities; see `BalanceMixin`."""


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Passes the Trainer's events on."""

    def __init__(self, trainer: BalanceMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._balance_begin_training()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._balance_begin_epoch()
