"""A demonstration at the prompt: trains each way on one data set, prints a table, draws curves."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import mmfuse

from . import report
from .arguments import count, rate
from .baselines import Plan
from .data import DataError, Split
from .measures import SEVERITIES, measure
from .settings import folded, load
from .tasks import Task
from .training import History, Run
from .ways import JOINT, ONLY, OWN_LOSSES, baseline_of, method_of, ways

matplotlib.use("Agg")  # draws to a file; needs no display
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

HERE = Path(__file__).parents[1]
DEFAULT = (JOINT, OWN_LOSSES, "OGM-GE", "OPM", "InfoReg", "RedReg", "ARM")
SEVERITY = SEVERITIES[2]
SPEED_ROUNDS, SPEED_STEPS = 5, 10
PLOT_COLUMNS = 5


class Result(NamedTuple):
    """One way to train with one seed."""

    measured: dict[str, float]
    history: History
    run: Run  # the trained model, with its split


def plan_of(way: str, task: Task, args: argparse.Namespace, seed: int) -> Plan:
    """The tuned settings, if there are any and no learning rate is asked for."""
    lr, options = folded({"lr": args.lr} if args.lr else args.settings.get(way, {}))
    epochs = args.epochs or task.epochs
    return Plan(lr or Plan.lr, epochs, args.batch_size, options, seed, args.backend, args.device)


def runs(way: str, task: Task, split: Split, args: argparse.Namespace, seed: int) -> Run:
    """A model before its training."""
    build = ways(task.views)[way]
    return Run(build, split, plan_of(way, task, args, seed), len(task.classes))


def train_all(
    task: Task, splits: Sequence[Split], args: argparse.Namespace
) -> dict[str, list[Result]]:
    """Trains every way with every seed: way → one result per seed."""
    results: dict[str, list[Result]] = {way: [] for way in args.methods}
    total = len(splits) * len(results) * (args.epochs or task.epochs)
    with tqdm(total=total, unit="epoch", disable=None) as progress:
        for seed, split in enumerate(splits):
            for way in results:
                progress.set_description(f"{way}, seed {seed}")
                run = runs(way, task, split, args, seed)
                history = run.train(progress.update)
                results[way].append(Result(measure(run), history, run))
    return results


def steps_per_second(task: Task, split: Split, args: argparse.Namespace) -> dict[str, float]:
    """Median speed of training steps.

    The ways to train take turns, a few steps each, so that whatever else the machine does meets
    all of them alike; the first round is warm-up. A step has its share of what begins an epoch.
    """
    models = {way: runs(way, task, split, args, 0) for way in args.methods}
    batches = {way: run.batches() for way, run in models.items()}
    steps: dict[str, list[float]] = {way: [] for way in models}
    begins: dict[str, list[float]] = {way: [] for way in models}
    for epoch in range(2 if args.quick else SPEED_ROUNDS):
        for way, run in models.items():
            synchronize(args.device)
            begun = time.perf_counter()
            run.method.set_epoch(epoch)
            synchronize(args.device)
            started = time.perf_counter()
            for i in range(SPEED_STEPS):
                run.step(*batches[way][i % len(batches[way])])
            synchronize(args.device)
            steps[way].append((time.perf_counter() - started) / SPEED_STEPS)
            begins[way].append(started - begun)
    # The mean of the beginnings: some methods have work in a few epochs only.
    return {
        way: 1 / (statistics.median(of[1:]) + statistics.fmean(begins[way]) / len(batches[way]))
        for way, of in steps.items()
    }


def synchronize(device: str) -> None:
    """Waits for the GPU, which may still be working when Python is not."""
    if device == "cuda":
        torch.cuda.synchronize()


def mean_sd(values: Sequence[float], sign: str = "") -> str:
    """'0.968 ± 0.002'; without the deviation for a single seed."""
    mean = f"{statistics.fmean(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def columns(task: Task) -> dict[str, str]:
    """Measure → heading of the table."""
    noises = {f"noise {SEVERITY:g} {view}": f"noisy {view}" for view in task.views}
    probes = {f"probe {view}": f"probe {view}" for view in task.views}
    return {"accuracy": "accuracy"} | (noises if len(task.views) == 2 else {}) | probes


def table(
    task: Task, results: dict[str, list[Result]], speeds: dict[str, float], args: argparse.Namespace
) -> Table:
    """One row for each way to train, and one for what it changes.

    Within a seed all share split, initial weights and batches. The deviation of the difference
    therefore says more about a method than the deviations of both accuracies.
    """
    seeds = f"mean ± sd over {args.seeds} seeds" if args.seeds > 1 else "one seed"
    out = Table(title=f"{task.title}: test accuracy, {seeds}", box=box.SIMPLE, title_style="bold")
    shown = columns(task)
    noise = f"noisy: Gaussian noise of {SEVERITY:g} standard deviations on one modality; "
    out.caption = noise if any(measure.startswith("noise") for measure in shown) else ""
    out.caption += "probe: a linear classifier on one frozen encoder"
    out.add_column("trained with", no_wrap=True)
    for heading in (*shown.values(), "steps/s"):
        out.add_column(heading, justify="right", no_wrap=True)
    numbers = {
        way: [[run.measured[measure] for run in of_way] for measure in shown]
        for way, of_way in results.items()
    }
    for way, values in numbers.items():
        out.add_row(way, *map(mean_sd, values), f"{speeds[way]:.0f}")
    out.add_section()
    for way, values in numbers.items():
        baseline = baseline_of(way)
        if baseline in numbers:
            pairs = zip(values, numbers[baseline], strict=True)
            changes = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
            out.add_row(f"{way} − {baseline}", *(mean_sd(change, "+") for change in changes))
    return out


def plot(task: Task, results: dict[str, list[Result]], args: argparse.Namespace) -> Path:
    """Draws each modality's score and coefficient over the epochs of the first seed, by method."""
    shown = [way for way in results if method_of(way)] or list(results)
    columns = min(len(shown), PLOT_COLUMNS)
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        2 * rows,
        columns,
        figsize=(max(5.0, 3.0 * columns), 5.0 * rows + 0.6),
        layout="constrained",
        squeeze=False,
    )
    pairs = axes.reshape(rows, 2, columns).transpose(0, 2, 1).reshape(-1, 2)
    for axis in pairs[len(shown) :].flat:
        axis.axis("off")
    for (upper, lower), way in zip(pairs, shown, strict=False):
        history = results[way][0].history
        epochs = range(1, len(history.accuracy) + 1)
        baseline = baseline_of(way)
        for m in range(len(task.views)):
            upper.plot(epochs, history.scores[:, m], color=f"C{m}")
            lower.plot(epochs, history.coefficients[:, m], color=f"C{m}")
            if baseline in results:
                upper.plot(
                    epochs, results[baseline][0].history.scores[:, m], "--", color=f"C{m}", lw=1
                )
        upper.set(title=way, ylim=(0, 1.02))
        lower.set(xlabel="epoch", ylabel=results[way][0].run.method.coefficients)
        if lower.get_ylim()[1] < 1.05:
            lower.set_ylim(-0.02, 1.05)
        for axis in (upper, lower):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    for axis in axes[::2, 0]:
        axis.set_ylabel("probability of the true class\nfrom one modality alone")
    line = plt.Line2D
    keys = [line([], [], color=f"C{m}", label=view) for m, view in enumerate(task.views)]
    keys += [
        line([], [], color="0.4", ls=style, label=label)
        for style, label in (("-", "the method"), ("--", "its baseline, without the method"))
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    figure.suptitle(
        f"{task.title}, seed 0. Above: validation data after each epoch, all from the same formula."
        "\nBelow: what the method does to each modality, mean of the epoch's steps.",
        fontsize="medium",
    )
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.task}.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def backend_names(args: argparse.Namespace) -> str:
    """The backends that run the ops of the methods here; usually one.

    Raises:
        RuntimeError: the backend asked for is not available; the message says why.
    """
    ops = ("modality_scores", "grad_stats", "update_grads_", "noisy_views", "drop_modalities")
    used = {mmfuse.ops.active_backend(op, args.device, args.backend) for op in ops}
    return " and ".join(sorted(used))


def parser(description: str, views: Sequence[str]) -> argparse.ArgumentParser:
    """The options that all demonstrations have."""
    out = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = out.add_argument
    every = list(ways(views))
    add("--methods", nargs="+", choices=every, default=list(DEFAULT), help="what to train with")
    add("--seeds", type=count, default=1, help="number of seeds: splits, weights, batches, noise")
    add("--epochs", type=count, help="passes over the training samples; none: the data set's")
    add("--batch-size", type=count, default=Plan.batch_size, help="samples in a step")
    add("--lr", type=rate, help="learning rate of SGD, with nothing tuned; none: the tuned one")
    add("--backend", choices=mmfuse.ops.BACKENDS, help="of mmfuse; none: the best one")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    add("--output", type=Path, default=HERE / "output", help="for the plot")
    add(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the imbalance report of the first method's model",
    )
    add("--quick", action="store_true", help="one seed and 3 epochs, to see that it runs")
    return out


def checked(
    asked: argparse.ArgumentParser, task: str, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Reads the command line, and the tuned settings of the data set."""
    args = asked.parse_args(argv)
    args.task = task
    if args.quick:
        args.seeds, args.epochs = 1, 3
    if args.device == "cuda" and not torch.cuda.is_available():
        asked.error("argument --device: PyTorch finds no CUDA device")
    try:
        args.backends = backend_names(args)
    except RuntimeError as error:
        asked.error(f"argument --backend: {error}")
    try:
        args.found_by, args.settings = load(HERE / "results" / task / "settings.json")
    except DataError as error:
        asked.error(f"{error}, or give --lr" if args.lr is None else str(error))
    return args


def reported(
    task: Task, results: dict[str, list[Result]], split: Split, args: argparse.Namespace
) -> str:
    """Trains a model of each modality, and says where the first way's imbalance report is."""
    way, ours = next(iter(results.items()))
    only = {view: runs(f"{ONLY}{view}", task, split, args, 0) for view in task.views}
    for run in only.values():
        run.train()
    try:
        page = report.write(ours[0].run, only, args.output / f"{args.task}_report.html")
    except ImportError as error:
        return str(error)
    return f"imbalance report of {way!r}: {page}"


def demonstrate(task: Task, args: argparse.Namespace) -> int:
    """Trains, prints and draws; returns the exit status."""
    console = Console(highlight=False, width=max(110, 58 + 17 * len(columns(task))))
    console.print(task.citation, soft_wrap=True)
    started = time.perf_counter()
    try:
        data = task.load()
        splits = [task.split(data, seed) for seed in range(args.seeds)]
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    sizes = ", ".join(
        f"{len(part.labels)} {name}" for name, part in zip(Split._fields, splits[0], strict=True)
    )
    console.print(
        f"modalities {' + '.join(task.views)}; samples: {sizes}; "
        f"mmfuse {mmfuse.__version__}, backend {args.backends}, device {args.device}",
        soft_wrap=True,
    )
    if args.settings and args.lr is None:
        console.print(f"settings found by: {args.found_by}", soft_wrap=True)
    else:
        console.print("settings: not tuned, the papers' values", soft_wrap=True)
    results = train_all(task, splits, args)
    console.print(table(task, results, steps_per_second(task, splits[0], args), args))
    console.print(f"plot: {plot(task, results, args)}", soft_wrap=True)
    if args.report:
        console.print(reported(task, results, splits[0], args), soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} s")
    return 0
