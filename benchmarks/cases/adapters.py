"""The loops of Accelerate and Lightning against the plain one, and the adapters' own time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from engine.case import register
from engine.gate import PLAIN
from engine.measure import Sample
from engine.process_case import Found, ProcessCase
from engine.processes import OwnTime, in_processes
from engine.workloads import Workload
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import mmfuse

from .overhead import CLASSES, Network, batch, optimizer_of

_METHOD = "OGM-GE"
_WIDTH, _STEPS = 16, 60

Loop = tuple[list[float], float]  # times of the steps; seconds a step in the adapter's own code


def torch_loop(balanced: bool, width: int, steps: int) -> Loop:
    """Times of the plain loop's steps."""
    torch.manual_seed(0)
    network = Network(width, CLASSES)
    optimizer = optimizer_of(network)
    ogm = mmfuse.OGM(network.encoders) if balanced else None
    audio, visual, labels = batch(0)
    stamps = []
    for _ in range(steps + 1):
        stamps.append(time.perf_counter())
        optimizer.zero_grad()
        _, out, logits = network(audio, visual, balanced)
        F.cross_entropy(out, labels).backward()
        if ogm is not None:
            ogm.step(logits, labels)
        optimizer.step()
    return differences(stamps), 0.0


def accelerate_loop(balanced: bool, width: int, steps: int) -> Loop:
    """Times of the steps of a loop with Accelerate."""
    from accelerate import Accelerator

    from mmfuse.adapters.accelerate import Balance

    torch.manual_seed(0)
    network = Network(width, CLASSES)
    optimizer = optimizer_of(network)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(network, optimizer)
    balance = Balance(accelerator, mmfuse.OGM(network.encoders)) if balanced else None
    own = OwnTime()
    if balance is not None:
        own.count(balance, "backward")
        own.leave_out(accelerator, "backward")
        own.leave_out(balance.method, "observe", "step")
    audio, visual, labels = batch(0)
    stamps = []
    for _ in range(steps + 1):
        stamps.append(time.perf_counter())
        optimizer.zero_grad()
        _, out, logits = model(audio, visual, balanced)
        loss = F.cross_entropy(out, labels)
        if balance is not None:
            balance.backward(loss, logits, labels)
        else:
            accelerator.backward(loss)
        optimizer.step()
    return differences(stamps), own.seconds / len(stamps)


def lightning_loop(balanced: bool, width: int, steps: int) -> Loop:
    """Times of the steps of Lightning's Trainer, from one batch's start to the next one's."""
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    from lightning.pytorch import Callback, LightningModule, Trainer

    from mmfuse.adapters.lightning import Balance

    torch.manual_seed(0)
    stamps: list[float] = []

    class Stamps(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            stamps.append(time.perf_counter())

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network(width, CLASSES)

        def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
            audio, visual, labels = batch
            _, out, logits = self.network(audio, visual, balanced)
            if balanced:
                balance.observe(logits, labels)
            return F.cross_entropy(out, labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    encoders = {"audio": "network.audio_net", "visual": "network.visual_net"}
    own = OwnTime()

    def make(found: Any) -> mmfuse.OGM:
        method = mmfuse.OGM(found)
        own.leave_out(method, "observe", "step")
        return method

    balance = Balance(make, encoders)
    own.count(
        balance,
        "observe",
        "on_train_batch_start",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    )
    callbacks = [Stamps(), balance] if balanced else [Stamps()]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader([batch(0)] * (steps + 1), batch_size=None))
    return differences(stamps), own.seconds / len(stamps)


def differences(stamps: Sequence[float]) -> list[float]:
    """The times from each stamp to the next; the first two warm up."""
    return [b - a for a, b in pairwise(stamps)][2:]


LOOPS: dict[str, Callable[[bool, int, int], Loop]] = {
    "torch": torch_loop,
    "accelerate": accelerate_loop,
    "lightning": lightning_loop,
}


def time_loop(name: str, width: int, steps: int, seconds: float) -> tuple[list[Loop], list[Loop]]:
    """The loop again and again, without and with OGM-GE in turns."""
    found: tuple[list[Loop], list[Loop]] = ([], [])
    end = time.perf_counter() + seconds
    while not found[0] or time.perf_counter() < end:
        for balanced in (False, True):
            found[balanced].append(LOOPS[name](balanced, width, steps))
    return found


def _workload(name: str) -> Workload:
    title = f"{name}'s loop, two small ResNet-18"
    return Workload(f"{name}_loop", title, "loops", classes=CLASSES, width=_WIDTH)


@register
class Adapters(ProcessCase):
    """So small a network that the loops' own time shows."""

    name = "adapters"
    title = "a step in a framework's loop"
    kind = "loops"
    workloads = tuple(_workload(name) for name in LOOPS)

    def measure(self, workload: Workload, seconds: float) -> Found:
        """Measures in one process of one thread."""
        name = workload.name.removesuffix("_loop")
        plain, balanced = in_processes(time_loop, [(name, workload.width, _STEPS, seconds)])[0]
        samples = {
            who: [Sample(s, s) for times, _ in loops for s in times]
            for who, loops in ((PLAIN, plain), (_METHOD, balanced))
        }
        own = {} if name == "torch" else {_METHOD: statistics.mean(own for _, own in balanced)}
        return Found(samples, own)
