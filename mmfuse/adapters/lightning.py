"""Lightning: a callback that balances the modalities in `Trainer.fit`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .. import amp
from ..loop.given import More
from ..loop.matching import Named, match_parameters
from ..loop.scalars import ScalarLog, scalars_of
from ..loop.shards import whole_state
from . import _lightning
from ._methods import checked, tell_epoch, warn_of_adaptive

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # Lightning has two packages; this is the one that the program has imported.
    _unified = "lightning.pytorch" in sys.modules or "pytorch_lightning" not in sys.modules
    try:
        if _unified and importlib.util.find_spec("lightning") is not None:
            from lightning.pytorch import Callback
        else:
            from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            "mmfuse.adapters.lightning needs Lightning: pip install lightning"
        ) from error

# Steps whose scalars one copy to the host carries.
_STEPS_PER_COPY = 50


class Epochs(Callback):
    """Tells the methods that are part of a LightningModule, OPM and ARM, which epoch begins.

    For a module that has no `Balance`, which does the same::

        Trainer(callbacks=[Epochs()]).fit(module)    # self.opm = mmfuse.OPM(starts=5) in it
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells them."""
        tell_epoch(pl_module, trainer.current_epoch)


class Balance(Epochs):
    """Balances the modalities of a LightningModule while it is trained.

    ::

        class AudioVisual(LightningModule):
            def training_step(self, batch, batch_idx):
                loss, logits = ...          # logits = {"audio": ..., "visual": ...}
                self.balance.observe(logits, batch["label"])
                return loss

        module = AudioVisual()
        module.balance = Balance(
            mmfuse.OGM, {"audio": "audio_net", "visual": "visual_net"}, alpha=0.8
        )
        Trainer(callbacks=[module.balance]).fit(module)

    The gradients are modulated before they are clipped; where you clip by hand (manual
    optimization), call `modulate` before. With ``accumulate_grad_batches`` the accumulated gradient
    is modulated once, by the scores of all its micro-batches but those whose ``training_step``
    returns None; under data parallelism by those of all ranks. With a GradScaler the method gets to
    know whether the step will be skipped and, for fused optimizers, how the gradients are scaled
    still. It tells the epochs to the method, and to OPM and ARM in the module. The method's state
    is in the Trainer's checkpoints; a resumed run goes on with the same numbers, also within an
    epoch if the data loader does. A second fit of the same module keeps the method and what it has
    learned, and takes new anchors.

    With several optimizers (manual optimization) those that hold no parameter of an encoder are
    left alone. If the encoders are spread over several, all of their gradients are modulated
    before the first of these steps. With ``apply_to="update"`` the optimizers are attached.

    Args:
        method: A class such as `mmfuse.OGM`, or its ``official``, or another callable that makes a
            `mmfuse.GradientMethod` from encoders.
        encoders: As in `match_parameters`; names are looked up in the LightningModule when the
            fit starts, after ``configure_model``.
        log_every: Steps between two whose coefficients, scores and the like are sent to the
            Trainer's loggers, without waiting for the device; None or 0 for none.
        hyperparameters: Passed on to `method`.

    Attributes:
        method: The method that `method` has made, from the start of the fit; None before.
        result: The result of its last step; None before.

    Raises:
        TypeError: `method` is not callable or `encoders` no mapping; when the fit starts, `method`
            makes nothing that acts on gradients, or what makes the backward passes itself.
        ValueError: `log_every` is negative.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        encoders: Mapping[str, Named],
        *,
        log_every: int | None = 50,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        if not callable(method):
            raise TypeError(f"method must be callable on encoders, got {type(method).__name__}")
        if not isinstance(encoders, Mapping):
            raise TypeError(f"encoders must map names to patterns, got {type(encoders).__name__}")
        if log_every is not None and log_every < 0:
            raise ValueError(f"log_every must be at least 0 or None, got {log_every}")
        self.method: Any = None
        self.result: Any = None
        self._make = method
        # A generator of parameters can be read once, but a second fit asks again.
        self._encoders = {
            name: value if isinstance(value, (str, nn.Module)) else _lightning.kept(value)
            for name, value in encoders.items()
        }
        self._hyperparameters = hyperparameters
        self._log_every = log_every or 0
        self._log: ScalarLog | None = None
        self._module: LightningModule | None = None
        # The parameters that the encoders' names led to; a second fit may find others.
        self._known: list[Tensor] = []
        self._warned = False
        # The Trainer from `setup` to `teardown`; True if a finder has run and not yet restored the
        # state.
        self._trainer: Any = None
        self._finder = False
        # The state of a checkpoint that is read before there is a method.
        self._saved: Mapping[str, Any] | None = None
        self._fitting = self._training = False
        # Ids of the optimizers that hold encoders' parameters, and of those to come in this step.
        self._holders: frozenset[int] | None = None
        self._to_come: set[int] = set()
        self._observed = self._backward = self._drops = False
        # All that the method had observed before this batch, until there is a backward pass.
        self._before: Any = None
        self._count = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method or getattr(self._make, '__qualname__', '')})"

    def __getstate__(self) -> dict[str, Any]:
        """The state but for this fit's: a copy has other optimizers, and no Trainer's loggers."""
        fit = dict.fromkeys(("_log", "_holders", "_trainer", "_before"))
        return {**self.__dict__, **fit, "_to_come": set(), "_fitting": False, "_training": False}

    @property
    def state_key(self) -> str:
        """Under which the state is saved: callbacks for other modalities have their own."""
        return self._generate_state_key(modalities=list(self._encoders))

    def observe(
        self,
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        **more: Unpack[More],
    ) -> None:
        """Collects one micro-batch; call it in ``training_step``.

        Outside of training, as where validation shares the code, and while Lightning's Tuner runs,
        nothing is done.

        Args:
            logits: Name → [B, C] logits of each modality alone.
            labels: [B] integer class indices; rows labelled −100 do not count.
            features: Name → [B, …] features, for methods that need them.
            inputs: Name → input of each encoder, likewise.
            **more: ``present``, ``scores`` and the others of `mmfuse.GradientMethod`.

        Raises:
            RuntimeError: this callback is not among the Trainer's.
            TypeError: as the method's ``observe``.
            ValueError: as the method's ``observe``.
        """
        if self._training:
            if not self._holders:  # all encoders are frozen
                return
            if self._before is None and self._drops:
                self._before = self.method._senses.kept()
            with torch.enable_grad():  # this is known to be no evaluation
                self.method.observe(logits, labels, features, inputs, **more)
            self._observed = True
        elif torch.is_grad_enabled() and not self._tuned() and self._trainer is None:
            raise RuntimeError(
                "Balance.observe: no fit has been started with this callback; pass it on in "
                "Trainer(callbacks=[...])"
            )

    def modulate(self) -> None:
        """Modulates the gradients now, before you clip them by hand; the optimizers' steps do not.

        For manual optimization: between ``self.manual_backward(loss)`` and
        ``self.clip_gradients(...)``. Everywhere else the callback does it.

        Raises:
            RuntimeError: ``training_step`` has not called `observe`, or there is no gradient.
        """
        if not self._training or not self._observed or not self._has_gradients():
            raise RuntimeError(
                "Balance.modulate belongs in training_step, after Balance.observe(logits, labels) "
                "and the backward pass"
            )
        scaler = _lightning.scaler_of(self._trainer)
        scale = scaler and amp.grad_scale(scaler, self.method.modalities.device)
        self._step(self._trainer, {"grad_scale": scale})
        self._to_come = set(self._holders or ())

    def _tuned(self) -> bool:
        """True if a finder runs, of the learning rate or the batch size: it has no callbacks."""
        known = self._trainer
        self._finder = known is not None and all(c is not self for c in known.callbacks)
        return self._finder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new run begins."""
        self._fitting = self._training = self._finder = False
        self._trainer = trainer

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The run is over."""
        self._trainer = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the encoders and makes the method."""
        _lightning.check_strategy(trainer)
        encoders = match_parameters(pl_module, self._encoders)
        known = self._module is pl_module and _lightning.same(self._known, encoders)
        if self.method is None or not known:
            self._build(pl_module)
        self._observed, self._backward, self._before = False, False, None
        # In manual optimization a backward pass need not be Lightning's; an update needs a step.
        self._drops = pl_module.automatic_optimization and self.method.apply_to == "gradient"
        self._to_come.clear()
        self._holders = None
        self._fitting = True
        self.method.begin()
        saved, self._saved = self._saved, None
        if saved is not None:
            self.method.load_state_dict(saved)
        self._log = None
        if self._log_every and trainer.is_global_zero and trainer.loggers:
            every = max(1, _STEPS_PER_COPY // self._log_every)
            self._log = ScalarLog(_lightning.loggers_of(trainer), every)

    def _build(self, module: LightningModule) -> None:
        encoders = match_parameters(module, self._encoders)
        self.method = checked(self._make(encoders, **self._hyperparameters))
        self._module, self._known = module, _lightning.parameters_of(encoders)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells all methods which epoch begins."""
        super().on_train_epoch_start(trainer, pl_module)
        self.method.set_epoch(trainer.current_epoch)
        self._holders = None  # another callback may have changed the optimizers

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Finds the optimizers with encoders' parameters, once in an epoch."""
        self._training = True
        if self._holders is None:
            self.method.set_epoch(trainer.current_epoch)  # for a run that is resumed within it
            self._find_optimizers(trainer)

    def _find_optimizers(self, trainer: Trainer) -> None:
        holders = _lightning.optimizers_of(trainer, self.method)
        if not self._warned:
            self._warned = True
            warn_of_adaptive(self.method, holders)
        if self.method.apply_to == "update":
            for optimizer in holders:
                if optimizer not in self.method._updates:
                    self.method.attach(optimizer)
        self._holders = frozenset(map(id, holders))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that there are gradients."""
        self._backward = True
        self._before = None

    def _drop(self) -> bool:
        """Forgets what a batch without a loss has shown: Lightning keeps no gradient of it."""
        before, self._before = self._before, None
        if before is not None:
            self.method._senses.restore(before)
            self._observed = self.method._senses.pending
        return before is not None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Modulates the gradients.

        Raises:
            RuntimeError: ``training_step`` has not called `observe`.
        """
        if self._holders is None or id(optimizer) not in self._holders:
            return
        dropped = self._drop()
        if not self._observed:
            if id(optimizer) in self._to_come:  # modulated before, for all optimizers
                self._to_come.discard(id(optimizer))
                _lightning.check_modulated(self.method, optimizer)
            elif self._has_gradients() and not dropped:
                raise RuntimeError(
                    f"training_step of {type(pl_module).__name__} has not called "
                    "Balance.observe(logits, labels) since the last optimizer step"
                )
            return
        if self.method.apply_to == "gradient" and not self._has_gradients():
            return
        self._step(trainer, self._scaling(trainer, optimizer))
        self._to_come = set(self._holders) - {id(optimizer)}

    def _step(self, trainer: Trainer, scaling: Mapping[str, Tensor | None]) -> None:
        self.result = self.method.step(**scaling)
        self._observed = self._backward = False
        if self._log is not None:
            self._count += 1
            if (self._count - 1) % self._log_every == 0:
                self._log.add(trainer.global_step, scalars_of(self.result, list(self._encoders)))

    def _has_gradients(self) -> bool:
        """True if a backward pass was run; the gradients tell where Lightning did not run it."""
        return self._backward or any(p.grad is not None for p in self.method.modalities.parameters)

    def _scaling(
        self, trainer: Trainer, optimizer: torch.optim.Optimizer
    ) -> dict[str, Tensor | None]:
        """The arguments of the method's step that come from the GradScaler."""
        scaler = _lightning.scaler_of(trainer)
        if scaler is None or not self._has_gradients():
            return {}
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            return {"grad_scale": amp.grad_scale(scaler, self.method.modalities.device)}
        return {"found_inf": amp.found_inf(scaler, optimizer)}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stops `observe` from taking micro-batches."""
        self._training = False
        self._drop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sends what is left to the loggers."""
        if self._log is not None:
            self._log.flush()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects nothing any more."""
        self._fitting, self._log = False, None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Sends what is left to the loggers if it was the user who has stopped the run."""
        self._fitting = self._training = False
        if isinstance(exception, KeyboardInterrupt) and self._log is not None:
            self._log.flush()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Warns of a checkpoint that has no state of this callback."""
        if trainer.state.fn == "fit" and not self._finder:  # which puts back what it has taken
            _lightning.warn_of_no_state(checkpoint, self.state_key, list(self._encoders))

    def state_dict(self) -> dict[str, Any]:
        """The method's state; sharded tensors as whole ones."""
        if self.method is None or self._saved is not None:
            return dict(self._saved or {})
        found: dict[str, Any] = whole_state(self.method.state_dict())
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken, as soon as there is a method."""
        if self._finder:
            self._finder = False
        elif self._fitting:
            self.method.load_state_dict(state_dict)
        elif self._trainer is None or self._trainer.state.fn == "fit":  # an evaluation has no step
            self._saved = state_dict
