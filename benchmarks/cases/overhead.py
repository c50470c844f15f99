"""Steps in one process and with several ranks: what each gradient method adds to a plain one.

Two ResNet-18 on small inputs, in one process and under DDP and FSDP2 with two (gloo), each process
with one thread. In every round a plain step and one with each method take turns on one network.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from engine.case import register
from engine.gate import PLAIN, ParityError
from engine.measure import Sample
from engine.networks import AudioVisual
from engine.process_case import Found, ProcessCase
from engine.processes import Counter, in_processes
from engine.workloads import Workload
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import mmfuse

#: How many processes there are; the first is what the others are compared with.
SETUPS = {"single": 1, "ddp": 2, "fsdp2": 2}
MODALITIES = 2
CLASSES, BATCH, SIDE = 6, 4, 32
#: Variants of a method; one that is not here has one, its paper's.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "OGM": {"OGM-GE": {"noise": True}, "OGM": {"noise": False}}
}
# So small that the scores, and with them what the methods decide, stay as they are.
_RATE = 1e-6
_STARTS, _FEWEST_ROUNDS = 2, 5

Timed = dict[str, list[float]]


class Network(AudioVisual):
    """Gives each modality's logits, too, within the forward pass, where FSDP2's head is whole."""

    def forward(
        self, audio: Tensor, visual: Tensor, scores: bool
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Features, joint logits, and logits of each modality if there are to be scores."""
        a, v, out = super().forward(audio, visual)
        # FSDP2 warns of outputs that are views.
        features = {"audio": a.clone(), "visual": v.clone()}
        return features, out, mmfuse.unimodal_logits(self.fc, features) if scores else {}


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Audio, images and labels; other ones on each rank."""
    generator = torch.Generator().manual_seed(rank)
    audio, visual = (torch.randn(BATCH, c, SIDE, SIDE, generator=generator) for c in (1, 3))
    return audio, visual, torch.arange(BATCH) % CLASSES


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    """The optimizer of all steps."""
    return torch.optim.SGD(model.parameters(), lr=_RATE, momentum=0.9)


def gradient_methods() -> dict[str, Callable[[Mapping[str, nn.Module]], Any]]:
    """Name → what makes it, in its first epoch: the catalogue's methods that act on gradients."""
    found: dict[str, Callable[[Mapping[str, nn.Module]], Any]] = {}
    for name, made in mmfuse.METHODS.items():
        if made.card.acts != "gradient":
            continue
        for variant, options in VARIANTS.get(name, {name: {}}).items():

            def start(
                encoders: Mapping[str, nn.Module],
                made: Any = made,
                options: Mapping[str, Any] = options,
            ) -> Any:
                method = made(encoders, **options)
                method.set_epoch(0)
                return method

            found[variant] = start
    return found


def distributed(setup: str, network: Network) -> nn.Module:
    """The network as the setup trains it."""
    if setup == "ddp":
        return DistributedDataParallel(network)
    if setup == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for encoder in network.encoders.values():
            fully_shard(encoder)
        return fully_shard(network)
    return network


def steps_of(
    setup: str, rank: int, width: int
) -> tuple[dict[str, Callable[[], None]], tuple[int, int]]:
    """A step of each kind, on one network; how many tensors and elements its encoders have."""
    torch.manual_seed(0)
    network = Network(width, CLASSES)
    params = [p for encoder in network.encoders.values() for p in encoder.parameters()]
    sizes = len(params), sum(p.numel() for p in params)
    model = distributed(setup, network)
    optimizer = optimizer_of(model)
    audio, visual, labels = batch(rank)

    def plain() -> None:
        optimizer.zero_grad()
        _, out, _ = model(audio, visual, False)
        F.cross_entropy(out, labels).backward()
        optimizer.step()

    def step_with(method: Any) -> Callable[[], None]:
        needs = method.card.needs

        def step() -> None:
            optimizer.zero_grad()
            features, out, logits = model(audio, visual, True)
            loss = F.cross_entropy(out, labels)
            if "unimodal_losses" in needs:
                losses = {name: F.cross_entropy(z, labels) for name, z in logits.items()}
                method.backward(loss, unimodal_losses=losses)
            else:
                loss.backward()
                given = {
                    "logits": logits,
                    "features": features,
                    "inputs": {"audio": audio, "visual": visual},
                }
                method.step(labels=labels, **{name: given[name] for name in needs})
            optimizer.step()

        return step

    made = {name: start(network.encoders) for name, start in gradient_methods().items()}
    return {PLAIN: plain, **{name: step_with(method) for name, method in made.items()}}, sizes


def time_steps(
    setup: str, rank: int, width: int, seconds: float
) -> tuple[Timed, dict[str, Counter], tuple[int, int]]:
    """Seconds of every step, what each kind of step reduces, and the encoders' sizes."""
    steps, sizes = steps_of(setup, rank, width)
    counters = {name: Counter() for name in steps}
    for name, step in steps.items():
        step()  # warms up; the first step of a method also agrees on its stream
        with counters[name].counting():
            step()
    times: Timed = {name: [] for name in steps}
    order, names = random.Random(0), list(steps)  # the same on all ranks
    gc.collect()
    gc.disable()
    end = time.perf_counter() + seconds
    rounds = 0
    while _go_on(rounds < _FEWEST_ROUNDS or time.perf_counter() < end):
        order.shuffle(names)
        for name in names:
            if dist.is_initialized():
                dist.barrier()
            began = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - began)
        rounds += 1
    gc.enable()
    return times, counters, sizes


def _go_on(wanted: bool) -> bool:
    """The first rank's answer."""
    if not dist.is_initialized():
        return wanted
    said = torch.tensor(wanted)
    dist.broadcast(said, 0)
    return bool(said)


def _workload(setup: str, count: int) -> Workload:
    how = "one process" if count == 1 else f"{setup.upper()}, {count} ranks"
    title = f"{how}: two ResNet-18, {BATCH} samples of {SIDE}×{SIDE} a rank"
    return Workload(setup, title, "ranks", classes=CLASSES, batch=BATCH)


@register
class Overhead(ProcessCase):
    """All gradient methods of the catalogue; of several ranks a step's slowest counts."""

    name = "overhead"
    title = "a step with each method"
    kind = "ranks"
    workloads = tuple(_workload(setup, count) for setup, count in SETUPS.items())

    def steps(self) -> list[str]:
        """Names of the steps with a method."""
        return list(gradient_methods())

    def measure(self, workload: Workload, seconds: float) -> Found:
        """Starts the processes a few times."""
        setup = workload.name
        times: Timed = {}
        counters: dict[str, Counter] = {}
        sizes = (0, 0)
        for _ in range(_STARTS):
            results = in_processes(
                time_steps,
                [(setup, rank, workload.width, seconds / _STARTS) for rank in range(SETUPS[setup])],
            )
            _, counters, sizes = results[0]
            for name in results[0][0]:
                each = zip(*(result[0][name] for result in results), strict=True)
                times.setdefault(name, []).extend(max(sample) for sample in each)
        for name, counter in counters.items():
            check_reduced(setup, name, counter, *sizes)
        samples = {name: [Sample(s, s) for s in each] for name, each in times.items()}
        return Found(samples, reduced={name: c.numbers for name, c in counters.items()})


def check_reduced(setup: str, name: str, counter: Counter, tensors: int, elements: int) -> None:
    """Holds what a step reduces against what it may: 4·M numbers, and of shards 5·T.

    A second gradient, which DistributedDataParallel does not know of, is reduced whole.

    Raises:
        ParityError: it is more.
    """
    most = 0
    if SETUPS[setup] > 1 and name != PLAIN:
        most = 4 * MODALITIES + (5 * tensors if setup == "fsdp2" else 0)
        if setup == "ddp" and "unimodal_losses" in mmfuse.METHODS.get(name, mmfuse.OGM).card.needs:
            most += elements
    if counter.numbers > most:
        raise ParityError(f"{name} reduces {counter.numbers} numbers, more than {most}")
