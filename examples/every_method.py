"""Every method of the catalogue on the handwritten digits: pictures and the table of the site.

Trains each of them as `examples/handwritten.py` does, draws the coefficients of the first run into
`docs/images/coefficients/`, and writes the accuracies of all seeds into `docs/which_method.md`::

    python examples/every_method.py

Finished runs are kept in `build/every_method`, so that a second call goes on where one was stopped.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from demonstrations.arguments import count
from demonstrations.baselines import Plan
from demonstrations.handwritten_data import CLASSES, load, split
from demonstrations.measures import measure
from demonstrations.paired import LEVEL, difference, holm
from demonstrations.show import mean_sd
from demonstrations.summary import publish
from demonstrations.training import History, Run
from demonstrations.ways import JOINT, ONLY, baseline_of, method_of, ways
from tqdm import tqdm

import mmfuse

matplotlib.use("Agg")  # draws to a file; needs no display
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
VIEWS = ("pix", "fou")
BATCH, SEEDS, EPOCHS = 64, 15, 60
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


class Result(NamedTuple):
    """One training."""

    numbers: list[float]  # accuracy, and a probe of each view, on test data
    history: History
    coefficients: str  # the meaning of the history's


def train(names: Sequence[str], seeds: int, epochs: int, kept: Path) -> dict[str, list[Result]]:
    """Way to train → one result per seed."""
    data, known = load(VIEWS), ways(VIEWS)
    kept.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Result]] = {name: [] for name in names}
    with tqdm(total=len(names) * seeds * epochs, unit="epoch", disable=None) as bar:
        for name in names:
            bar.set_description(name)
            for seed in range(seeds):
                # Another version of the library may train differently.
                path = kept / f"{name}_{seed}_{epochs}_{mmfuse.__version__}.pt"
                if (found := finished(path)) is not None:
                    bar.update(epochs)
                    results[name].append(found)
                    continue
                plan = Plan(epochs=epochs, batch_size=BATCH, seed=seed)
                run = Run(known[name], split(data, seed), plan, len(CLASSES))
                history = run.train(bar.update)
                measured = measure(run)
                numbers = [measured[m] for m in ("accuracy", *(f"probe {v}" for v in VIEWS))]
                result = Result(numbers, history, run.method.coefficients)
                new = path.with_suffix(".new")
                torch.save((numbers, tuple(history), result.coefficients), new)
                new.replace(path)
                results[name].append(result)
    return results


def finished(path: Path) -> Result | None:
    """A training that was kept; None if there is none, or its file is damaged."""
    try:
        numbers, history, meaning = torch.load(path)
        return Result(numbers, History(*history), meaning)
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, pickle.UnpicklingError):
        return None


def draw(name: str, result: Result, folder: Path) -> Path:
    """Scores on the left, coefficients on the right, epoch by epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.lower().replace(' ', '_')}.svg"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(7, 2.5), layout="constrained")
        drawn = (result.history.scores, result.history.coefficients)
        for axis, values in zip(axes, drawn, strict=True):
            for m, view in enumerate(VIEWS):
                axis.plot(values[:, m], f"C{m}", label=view)
            axis.grid(alpha=0.25)
            axis.set(xlabel="epoch", xlim=(0, max(1, len(values) - 1)))
        axes[0].set(title="score of each view alone", ylim=(-0.02, 1.05))
        axes[1].set_title(result.coefficients)
        axes[0].legend(frameon=False, labelcolor=INK, loc="lower right")
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # matplotlib leaves blanks at the ends of lines.
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
    return path


def table(results: dict[str, list[Result]]) -> list[str]:
    """Markdown: each way to train against the same losses without its method, by seed."""
    heads = ["joint accuracy", *(f"probe {view}" for view in VIEWS)]
    columns = {
        name: list(zip(*(run.numbers for run in runs), strict=True))
        for name, runs in results.items()
    }
    lines = ["| method | compared with | " + " | ".join(heads) + " |"]
    lines.append("|---|---" + "|--:" * len(heads) + "|")
    lines.append(f"| **{JOINT}** | — | {' | '.join(map(mean_sd, columns[JOINT]))} |")
    pairs = {name: base for name in columns if (base := baseline_of(name)) is not None}
    sure = [significant(columns, pairs, place) for place in range(len(heads))]
    for name, baseline in pairs.items():
        cells = []
        for place, (mine, theirs) in enumerate(zip(columns[name], columns[baseline], strict=True)):
            text = mean_sd([a - b for a, b in zip(mine, theirs, strict=True)], "+")
            cells.append(f"**{text}**" if name in sure[place] else text)
        lines.append(f"| {name} | {baseline} | {' | '.join(cells)} |")
    return lines


def significant(
    columns: dict[str, list[tuple[float, ...]]], pairs: dict[str, str], place: int
) -> set[str]:
    """The ways whose difference in a column is, after Holm's correction over it."""
    claims = {name: base for name, base in pairs.items() if not name.startswith(ONLY)}
    p_values = [
        difference(columns[name][place], columns[base][place]).p for name, base in claims.items()
    ]
    corrected = zip(claims, holm(p_values), strict=True)
    return {name for name, p in corrected if p < LEVEL}


CAPTION = (
    "Means ± standard deviations over {} seeds: of joint training its values, of all others the "
    "differences to what is in the second column, seed by seed. **Bold**: p < 0.05 by a sign-flip "
    "test after Holm's correction over the column; one view alone has no test."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, draws and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=count, default=SEEDS, help="splits, weights and batches")
    parser.add_argument("--epochs", type=count, default=EPOCHS, help="passes over the digits")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        choices=ways(VIEWS),
        help="some only: draws them, and writes no table",
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the documentation")
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "every_method")
    given = parser.parse_args(argv)
    if given.epochs != EPOCHS and given.docs.resolve() == DOCS:
        parser.error(f"argument --epochs: the site shows {EPOCHS}; give another folder as --docs")
    torch.set_num_threads(1)  # the networks are small
    names = given.methods or list(ways(VIEWS))
    results = train(names, given.seeds, given.epochs, given.kept)
    for name, runs in results.items():
        if method_of(name) is not None:
            draw(name, runs[0], given.docs / "images" / "coefficients")
    if given.methods is None and (given.seeds, given.epochs) == (SEEDS, EPOCHS):
        text = "".join(f"{line}\n" for line in (CAPTION.format(given.seeds), "", *table(results)))
        publish(given.docs / "which_method.md", "digits", text)
    else:
        print("no table written: it goes with all methods and the default seeds and epochs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
