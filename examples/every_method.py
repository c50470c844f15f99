"""Every method of the catalogue on the handwritten digits: pictures and the table of the site.

Trains each of them as `examples/handwritten.py` does, draws the coefficients of the first run into
`docs/images/coefficients/`, and writes the accuracies of all seeds into `docs/which_method.md`::

    python examples/every_method.py --seeds 10

Finished runs are kept in `build/every_method`, so that a second call goes on where one was stopped.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import handwritten
import matplotlib
import torch
from _handwritten_data import load, split
from _handwritten_methods import METHODS, ON_ALL_LOSSES, Record, build
from handwritten import Result, Run
from tqdm import tqdm

import mmfuse

matplotlib.use("Agg")  # draws to a file; needs no display
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
#: Points of a drawn line.
POINTS = 120
TABLE = re.compile(r"(<!-- digits: .*?-->\n).*?(<!-- end of digits -->)", re.DOTALL)
# Grey that can be read on white and on black: one file serves both themes.
INK = "#8a8a8a"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmfuse",  # the same picture has the same bytes
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "font.size": 9,
}


def everything() -> list[str]:
    """Baselines and every method of the catalogue, in its order."""
    in_turns = [name for name, made in mmfuse.METHODS.items() if made.card.acts == "head"]
    METHODS.update({name: build(name) for name in in_turns})
    return list(METHODS)


def train(methods: Sequence[str], args: argparse.Namespace, kept: Path) -> dict[str, list[Result]]:
    """Method → one result per seed."""
    features, labels = load(args.views)
    kept.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Result]] = {}
    with tqdm(total=len(methods) * args.seeds * args.epochs, unit="epoch", disable=None) as bar:
        for method in methods:
            bar.set_description(method)
            for seed in range(args.seeds):
                path = kept / f"{method}_{seed}_{args.epochs}.pt"
                if path.exists():
                    bar.update(args.epochs)
                    *found, history = torch.load(path)
                    result = Result(*found[:2], Record(*history), found[2])
                else:
                    run = Run(method, split(features, labels, args.train, seed), seed, args)
                    history = run.train(bar)
                    shown = run.backward.coefficients
                    result = Result(*run.accuracies(), history, shown)
                    torch.save((*result[:2], shown, tuple(history)), path)
                results.setdefault(method, []).append(result)
    return results


def draw(method: str, result: Result, views: Sequence[str], folder: Path) -> Path:
    """Scores on the left, coefficients on the right, as means over a few steps."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{method.lower().replace(' ', '_')}.svg"
    window = max(1, min(10, len(result.history.scores) // 4))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(7, 2.5), layout="constrained")
        for axis, values in zip(axes, result.history, strict=True):
            for m, view in enumerate(views):
                steps, means = handwritten.running_mean(values[:, m], window)
                every = max(1, len(steps) // POINTS)
                axis.plot(steps[::every], means[::every], f"C{m}", label=view)
            axis.grid(alpha=0.25)
            axis.set(xlabel="step", xlim=(0, len(values)))
        axes[0].set(title="score of each view alone", ylim=(-0.02, 1.05))
        axes[1].set_title(result.coefficients)
        axes[0].legend(frameon=False, labelcolor=INK, loc="lower right")
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # matplotlib leaves blanks at the ends of lines.
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
    return path


def table(results: dict[str, list[Result]], views: Sequence[str]) -> list[str]:
    """Markdown: each method against the baseline that trains on the same losses, by seed."""
    heads = ["joint accuracy", *(f"probe {view}" for view in views)]
    columns = {
        method: list(zip(*((run.joint, *run.probes) for run in runs), strict=True))
        for method, runs in results.items()
    }
    lines = [
        "| method | compared with | " + " | ".join(heads) + " |",
        "|---|---" + "|--:" * 3 + "|",
    ]
    for baseline in ("joint", "all losses"):
        cells = " | ".join(map(handwritten.mean_sd, columns[baseline]))
        lines.append(f"| **{baseline}** | — | {cells} |")
    for method, values in columns.items():
        if method in ("joint", "all losses"):
            continue
        baseline = "all losses" if method in ON_ALL_LOSSES else "joint"
        cells = []
        for mine, theirs in zip(values, columns[baseline], strict=True):
            change = [a - b for a, b in zip(mine, theirs, strict=True)]
            # More than two standard errors away from no change.
            sure = len(change) > 2 and abs(statistics.fmean(change)) > 2 * (
                statistics.stdev(change) / len(change) ** 0.5
            )
            text = handwritten.mean_sd(change, "+")
            cells.append(f"**{text}**" if sure else text)
        lines.append(f"| {method} | {baseline} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, draws and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="splits, weights and batches")
    parser.add_argument("--epochs", type=int, default=60, help="passes over the training digits")
    parser.add_argument("--methods", nargs="+", help="some only: draws them, and writes no table")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the documentation")
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "every_method")
    given = parser.parse_args(argv)
    args = handwritten.parse([])
    args.seeds, args.epochs = given.seeds, given.epochs
    torch.set_num_threads(1)  # the networks are small
    known = everything()
    results = train(given.methods or known, args, given.kept)
    for method, runs in results.items():
        if method not in ("joint", "all losses"):
            draw(method, runs[0], args.views, given.docs / "images" / "coefficients")
    if given.methods is None:
        page = given.docs / "which_method.md"
        lines = "\n".join(["", *table(results, args.views), ""])
        page.write_text(TABLE.sub(lambda found: f"{found[1]}{lines}\n{found[2]}", page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
