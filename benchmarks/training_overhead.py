"""What mmfuse adds to a training step: `python benchmarks/training_overhead.py`.

Two ResNet-18 on small inputs, in one process and under DDP and FSDP2 with two (gloo), each process
with one thread. In every round a plain step and one with each method take turns on the same
network. The overhead is the difference of the medians; for OGM-GE the ratio of the overheads of two
ranks and of one process is printed. `--adapters` compares the loops of Accelerate and Lightning
with the plain one instead.
"""

from __future__ import annotations

import argparse
import csv
import gc
import multiprocessing
import pickle
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import _environment
import torch
import torch.distributed as dist
from _measure import quantile
from _networks import AudioVisual
from _report import show_ratio, show_time
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import mmfuse

# Name → how many processes; the first is what the others are compared with.
SETUPS = {"single": 1, "ddp": 2, "fsdp2": 2}
PLAIN = "plain"
METHODS = ("ogm-ge", "ogm", "inforeg", "redreg")
MAIN = "ogm-ge"
MODALITIES = 2
TARGET = 1.25  # of the overheads of MAIN, two DDP ranks to a single process
WIDTH, CLASSES, BATCH, SIDE = 512, 6, 4, 32
QUICK_WIDTH = 16
# So small that the scores, and with them what the methods decide, stay as they are.
RATE = 1e-6
LOOPS = ("torch", "accelerate", "lightning")

Timed = dict[str, list[float]]


class Network(AudioVisual):
    """Also gives each modality's logits, within the forward pass, where FSDP2's head is whole."""

    def forward(
        self, audio: Tensor, visual: Tensor, scores: bool
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Features, joint logits, and logits of each modality if there are to be scores."""
        a, v, out = super().forward(audio, visual)
        # FSDP2 warns of outputs that are views.
        features = {"audio": a.clone(), "visual": v.clone()}
        return features, out, mmfuse.unimodal_logits(self.fc, features) if scores else {}


@dataclass(frozen=True)
class Row:
    """One kind of step in one setup; times in milliseconds.

    Attributes:
        setup: Key of `SETUPS`.
        processes: How many there are.
        method: "plain", or one of `METHODS`.
        median_ms: Of a step; with several ranks of the slowest one's.
        p20_ms: Likewise.
        p80_ms: Likewise.
        overhead_ms: Of the medians over "plain".
        of_plain: Of the medians over "plain", as a ratio.
        vs_single: Of the overheads in this setup and in a single process.
        all_reduces: How many mmfuse makes in a step.
        floats: How many numbers they carry.
        most_floats: How many are allowed: 4 M, and 5 T for sharded parameters.
        samples: Steps timed.
    """

    setup: str
    processes: int
    method: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    overhead_ms: float
    of_plain: float
    vs_single: float | None
    all_reduces: int
    floats: int
    most_floats: int
    samples: int


@dataclass(frozen=True)
class AdapterRow:
    """One loop; times in milliseconds.

    Attributes:
        loop: One of `LOOPS`.
        plain_ms: Median of a step without mmfuse.
        balanced_ms: Of a step with OGM-GE.
        overhead_ms: The difference.
        own_ms: Mean time of a step in the adapter's own code: in the functions that the loop calls,
            less what they spend in the method and in the framework.
        samples: Steps timed, of either kind.
    """

    loop: str
    plain_ms: float
    balanced_ms: float
    overhead_ms: float
    own_ms: float
    samples: int


# In a process of its own.


class Counter:
    """What passes through torch.distributed.all_reduce, with which DDP and FSDP2 do not reduce."""

    def __init__(self) -> None:
        self.calls = self.numbers = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts for a while."""
        original = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.numbers += tensor.numel()
            return original(tensor, *args, **kwargs)

        dist.all_reduce = counted
        try:
            yield
        finally:
            dist.all_reduce = original


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Audio, images and labels; other ones on each rank."""
    generator = torch.Generator().manual_seed(rank)
    audio, visual = (torch.randn(BATCH, c, SIDE, SIDE, generator=generator) for c in (1, 3))
    return audio, visual, torch.arange(BATCH) % CLASSES


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


def make_method(name: str, encoders: Mapping[str, nn.Module]) -> Any:
    """The method with its paper's defaults, in its first epoch."""
    if name in ("ogm", "ogm-ge"):
        return mmfuse.OGM(encoders, noise=name == "ogm-ge")
    method = mmfuse.InfoReg(encoders) if name == "inforeg" else mmfuse.RedReg(encoders)
    method.set_epoch(0)
    return method


def steps_of(setup: str, rank: int, width: int) -> tuple[dict[str, Callable[[], None]], int]:
    """A step of each kind, on one network, and the number of the encoders' tensors."""
    torch.manual_seed(0)
    network = Network(width, CLASSES)
    tensors = sum(len(list(encoder.parameters())) for encoder in network.encoders.values())
    model = distributed(setup, network)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    audio, visual, labels = batch(rank)

    def step_with(name: str) -> Callable[[], None]:
        method = None if name == PLAIN else make_method(name, network.encoders)

        def step() -> None:
            optimizer.zero_grad()
            features, out, logits = model(audio, visual, method is not None)
            F.cross_entropy(out, labels).backward()
            if name == "redreg":
                method.step(logits, labels, features, {"audio": audio, "visual": visual})
            elif method is not None:
                method.step(logits, labels)
            optimizer.step()

        return step

    return {name: step_with(name) for name in (PLAIN, *METHODS)}, tensors


def time_steps(
    setup: str, rank: int, width: int, rounds: int
) -> tuple[Timed, dict[str, Counter], int]:
    """Seconds of every step, what each kind of step reduces, and the number of tensors."""
    steps, tensors = steps_of(setup, rank, width)
    counters = {name: Counter() for name in steps}
    for name, step in steps.items():
        step()  # warms up; the first step of a method also agrees on its stream
        with counters[name].counting():
            step()
    times: Timed = {name: [] for name in steps}
    order, names = random.Random(0), list(steps)  # the same on all ranks
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            if dist.is_initialized():
                dist.barrier()
            began = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - began)
    gc.enable()
    return times, counters, tensors


class OwnTime:
    """Time inside of some functions, less that inside of others which they call.

    Attributes:
        seconds: The sum so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def count(self, target: Any, *names: str) -> None:
        """Counts the time in these methods of an object."""
        for name in names:
            setattr(target, name, self._timed(getattr(target, name), 1.0))

    def leave_out(self, target: Any, *names: str) -> None:
        """Takes the time in these away again."""
        for name in names:
            setattr(target, name, self._timed(getattr(target, name), -1.0))

    def _timed(self, function: Callable[..., Any], sign: float) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            # What is left out counts only where it is called from what is counted.
            counts = sign > 0 or self._depth > 0
            self._depth += sign > 0
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += sign * counts * (time.perf_counter() - start)
                self._depth -= sign > 0

        return timed


Loop = tuple[list[float], float]  # times of the steps; seconds a step in the adapter's own code


def torch_loop(balanced: bool, width: int, steps: int) -> Loop:
    """Times of the plain loop's steps."""
    torch.manual_seed(0)
    network = Network(width, CLASSES)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9)
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
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9)
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
            return torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)

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
    """From each stamp to the next; the first two warm up."""
    return [b - a for a, b in pairwise(stamps)][2:]


def time_loops(
    width: int, steps: int, repeats: int
) -> dict[str, tuple[list[float], list[float], float]]:
    """Loop → times of its steps without and with OGM-GE, and the adapter's own time a step."""
    loops = dict(zip(LOOPS, (torch_loop, accelerate_loop, lightning_loop), strict=True))
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in loops}
    own: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(repeats):
        for name, loop in loops.items():  # the loops take turns
            for balanced in (False, True):
                found, seconds = loop(balanced, width, steps)
                times[name][balanced].extend(found)
            own[name].append(seconds)
    return {name: (*times[name], statistics.mean(own[name])) for name in loops}


def _work(target: Callable[..., Any], rank: int, size: int, folder: str, arguments: Any) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
        )
    result = target(*arguments)
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    if size > 1:
        dist.destroy_process_group()


# In the process that the user has started.


def in_processes(target: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Runs the target in new processes, one for each tuple of arguments; returns what they return.

    Raises:
        RuntimeError: one of them has failed; it has printed why.
    """
    size = len(arguments)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_work, args=(target, rank, size, folder, mine))
            for rank, mine in enumerate(arguments)
        ]
        for process in processes:
            process.start()
        # One that fails leaves the others waiting for it.
        while any(process.is_alive() for process in processes):
            if any(process.exitcode not in (None, 0) for process in processes):
                for process in processes:
                    process.kill()
            processes[0].join(0.05)
        for process in processes:
            process.join()
        failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
        if failed:
            raise RuntimeError(f"{target.__name__} has failed in process {failed[0]} of {size}")
        return [pickle.loads((Path(folder) / f"{r}.pickle").read_bytes()) for r in range(size)]


def measure(options: argparse.Namespace) -> list[Row]:
    """All setups in turns, so that a slow spell of the machine hits all of them."""
    times: dict[str, Timed] = {s: {name: [] for name in (PLAIN, *METHODS)} for s in options.setups}
    counted: dict[str, tuple[dict[str, Counter], int]] = {}
    for _ in range(options.repeats):
        for setup in options.setups:
            ranks = range(SETUPS[setup])
            arguments = [(setup, rank, options.width, options.rounds) for rank in ranks]
            results = in_processes(time_steps, arguments)
            counted[setup] = results[0][1:]
            for name, mine in times[setup].items():
                each = zip(*(result[0][name] for result in results), strict=True)
                mine += [max(sample) for sample in each]
    rows: list[Row] = []
    for setup, timed in times.items():
        counters, tensors = counted[setup]
        plain = statistics.median(timed[PLAIN])
        for name, seconds in timed.items():
            median = statistics.median(seconds)
            overhead = (median - plain) * 1e3
            alone = next((r for r in rows if (r.setup, r.method) == ("single", name)), None)
            compared = alone is not None and name != PLAIN and alone.overhead_ms > 0
            sharded = 5 * tensors if setup == "fsdp2" else 0
            most = 0 if SETUPS[setup] == 1 or name == PLAIN else 4 * MODALITIES + sharded
            rows.append(
                Row(
                    setup=setup,
                    processes=SETUPS[setup],
                    method=name,
                    median_ms=median * 1e3,
                    p20_ms=quantile(seconds, 0.2) * 1e3,
                    p80_ms=quantile(seconds, 0.8) * 1e3,
                    overhead_ms=overhead,
                    of_plain=median / plain,
                    vs_single=overhead / alone.overhead_ms if compared else None,
                    all_reduces=counters[name].calls,
                    floats=counters[name].numbers,
                    most_floats=most,
                    samples=len(seconds),
                )
            )
    return rows


def measure_adapters(options: argparse.Namespace) -> list[AdapterRow]:
    """The same step of a small network in the plain loop and through the adapters."""
    arguments = [(QUICK_WIDTH, options.adapter_steps, options.repeats)]
    times = in_processes(time_loops, arguments)[0]
    rows: list[AdapterRow] = []
    for loop, (without, with_ogm, own) in times.items():
        plain, balanced = (statistics.median(t) * 1e3 for t in (without, with_ogm))
        row = AdapterRow(loop, plain, balanced, balanced - plain, own * 1e3, len(with_ogm))
        rows.append(row)
    return rows


def show(value: float) -> str:
    """Milliseconds with a unit and a sign."""
    return f"{'−' if value < 0 else ''}{show_time(abs(value))}"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table with its head."""
    head = ["setup", "step", "median", "p20", "p80", "overhead", "of plain", "×single"]
    out = [[*head, "all-reduces", "floats", "at most"]]
    for r in rows:
        times = (show_time(t) for t in (r.median_ms, r.p20_ms, r.p80_ms))
        plain = r.method == PLAIN
        ratio = "—" if plain or r.setup == "single" else show_ratio(r.vs_single)
        overhead = "—" if plain else show(r.overhead_ms)
        counts = map(str, (r.all_reduces, r.floats, r.most_floats))
        out.append([r.setup, r.method, *times, overhead, show_ratio(r.of_plain), ratio, *counts])
    return out


def adapter_cells(rows: Sequence[AdapterRow]) -> list[list[str]]:
    """The adapters' table with its head."""
    out = [["loop", "plain step", "with OGM-GE", "overhead", "the adapter's own"]]
    for r in rows:
        own = "—" if r.loop == LOOPS[0] else show(r.own_ms)
        times = map(show_time, (r.plain_ms, r.balanced_ms))
        out.append([r.loop, *times, show(r.overhead_ms), own])
    return out


def verdict(rows: Sequence[Row]) -> str:
    """The target's ratio in words."""
    found = next((r for r in rows if (r.setup, r.method) == ("ddp", MAIN)), None)
    if found is None or found.vs_single is None:
        return f"overhead of {MAIN}, 2 DDP ranks / single process: not measured"
    met = "met" if found.vs_single <= TARGET else "missed"
    return (
        f"overhead of {MAIN}, 2 DDP ranks / single process: {found.vs_single:.2f} "
        f"(target: at most {TARGET}; {met})"
    )


def write(
    rows: Sequence[Row] | Sequence[AdapterRow],
    table: Sequence[Sequence[str]],
    notes: Sequence[str],
    environment: Mapping[str, str],
    output: Path,
    name: str,
) -> None:
    """Writes CSV and Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(rows[0]))
        writer.writerows(astuple(row) for row in rows)
    lines = [f"# Training overhead on {environment['device']}", ""]
    lines += [f"- {key}: `{value}`" for key, value in environment.items()]
    lines += ["", *(line for note in notes for line in (note, ""))]
    lines.append("| " + " | ".join(table[0]) + " |")
    lines.append("|---" * 2 + "|--:" * (len(table[0]) - 2) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in table[1:]]
    (output / f"{name}.md").write_text("\n".join([*lines, ""]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--setups", nargs="+", choices=SETUPS, default=list(SETUPS), help=", ".join(SETUPS))
    add("--rounds", type=int, default=15, help="of one start of a setup's processes")
    add("--repeats", type=int, default=3, help="how often each setup's processes are started")
    add("--adapters", action="store_true", help="measure the adapters' loops instead")
    add("--quick", action="store_true", help="tiny encoders and few rounds, to see that it runs")
    add("--output", type=Path, help="folder; default: results/<machine>/training_overhead, here")
    options = parser.parse_args(argv)
    options.width, options.adapter_steps = WIDTH, 200
    if options.quick:
        options.width, options.adapter_steps = QUICK_WIDTH, 8
        options.rounds, options.repeats = 2, 1
    for name in ("rounds", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1")
    # A single process comes first: the others are compared with it.
    options.setups = [setup for setup in SETUPS if setup in options.setups]
    if options.output is None:
        machine = _environment.folder_name(_environment.machine_model(torch.device("cpu")))
        options.output = Path(__file__).resolve().parent / "results" / machine / "training_overhead"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code."""
    options = parse(argv)
    console = Console(width=max(Console().width, 120))  # narrower, the table is cut
    environment = _environment.describe(torch.device("cpu"))
    environment["threads"] = "1 in each process"
    bystanders = _environment.Bystanders()
    rows: Sequence[Row] | Sequence[AdapterRow]
    if options.adapters:
        rows = measure_adapters(options)
        table, name = adapter_cells(rows), "adapters"
        notes = [f"Two ResNet-18 of width {QUICK_WIDTH // 8}, so that the loops' own time shows."]
    else:
        rows = measure(options)
        table, name = cells(rows), "results"
        encoders = f"Two ResNet-18 with a stem of {options.width // 8} channels"
        inputs = f"{BATCH} samples of 3×{SIDE}×{SIDE} and 1×{SIDE}×{SIDE} on each rank"
        notes = [f"{encoders}, {inputs}, SGD with momentum.", verdict(rows)]
    share = bystanders.share()
    if share is not None:
        environment["CPU taken by others"] = f"{share:.0%}"
    for key, value in environment.items():
        console.print(f"[bold]{key}[/]: {escape(value)}", highlight=False, soft_wrap=True)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(table[0]):
        shown.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for row in table[1:]:
        shown.add_row(*row)
    console.print(shown)
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False)
    write(rows, table, notes, environment, options.output, name)
    console.print(f"written to {options.output}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
