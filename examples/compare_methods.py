"""Compares every method of mmfuse with baselines: search, training with fresh seeds, statistics.

It runs for some 20 minutes on two cores, can be stopped at any time and goes on where it was::

    pip install -e ".[examples]" && pip install --no-deps animal-mnist==0.4 seglearn==1.2.5
    python examples/compare_methods.py wrist
    python examples/compare_methods.py animals

`docs/demonstrations.md` has the protocol and the results.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from demonstrations import figures, search, settings, summary
from demonstrations.baselines import Plan
from demonstrations.data import DataError
from demonstrations.measures import measure
from demonstrations.tasks import TASKS
from demonstrations.training import Run
from demonstrations.ways import ENSEMBLE, ways
from rich.console import Console
from tqdm import tqdm

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "demonstrations.md"
SEARCH_SEED = 1000  # and after it; the seeds of the comparison begin at 0
STAGES = ("search", "train", "report")


class OutOfTimeError(RuntimeError):
    """The minutes that were given are over."""


class Comparison:
    """One data set's comparison, with its files."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.task = args, TASKS[args.task]
        self.folder = args.results / args.task
        self.folder.mkdir(parents=True, exist_ok=True)
        self.chosen, self.runs = self.folder / "settings.json", self.folder / "runs.csv"
        every = ways(self.task.views)
        self.ways = {way: every[way] for way in args.methods or every}
        self.plan = Plan(epochs=self.task.epochs)
        self.until = time.monotonic() + 60 * args.minutes
        self.data = None if args.stages == ["report"] else self.task.load()

    def in_time(self) -> None:
        """Stops when the minutes are over."""
        if time.monotonic() > self.until:
            raise OutOfTimeError(f"{self.args.minutes:g} minutes are over; run it again to go on")

    def search(self) -> None:
        """Runs the trials that are missing, and writes the settings of the best ones."""
        seeds = range(SEARCH_SEED, SEARCH_SEED + self.task.search_seeds)
        splits = {seed: self.task.split(self.data, seed) for seed in seeds}
        journal = HERE / "output" / f"{self.args.task}.journal"
        found = search.Search(journal, self.args.task, splits, self.plan, len(self.task.classes))
        tuned = [way for way in self.ways if way != ENSEMBLE]
        trials, command = self.args.trials, f"python examples/compare_methods.py {self.args.task}"
        done = {way: len(found.finished(way)) for way in tuned}
        bar = tqdm(total=trials * len(tuned), unit="trial", disable=None)
        bar.update(sum(min(trials, n) for n in done.values()))
        try:
            for number in range(trials):  # a trial of each way, then the next: all get on alike
                for way in tuned:
                    if number >= done[way]:
                        self.in_time()
                        bar.set_description(f"search: {way}")
                        found.trial(way, self.ways[way], self.task.views)
                        bar.update()
        finally:
            bar.close()
            every = list(ways(self.task.views))
            chosen = search.best(found, every, trials)
            settings.save(
                self.chosen, f"{command} --stages search --trials {trials}", trials, chosen
            )
            others = [way for way in every if way != ENSEMBLE and way in chosen]
            search.save_trials(self.folder / "trials.csv", found, others, trials)

    def train(self) -> None:
        """Trains with the seeds that are missing, each of which adds two rows to the table."""
        if not self.chosen.is_file():
            raise DataError(f"{self.chosen} is not there: run the stage search first")
        _, tuned = settings.load(self.chosen)
        known = [way for way in self.ways if way in tuned]
        done = {(row["method"], int(row["seed"])) for row in summary.read(self.runs)}
        missing = [
            (way, seed)
            for seed in range(self.args.seeds)
            for way in known
            if (way, seed) not in done
        ]
        bar = tqdm(total=self.args.seeds * len(known), unit="run", disable=None)
        bar.update(self.args.seeds * len(known) - len(missing))
        at, split = -1, None
        for way, seed in missing:
            self.in_time()
            bar.set_description(f"train: {way}, seed {seed}")
            if seed != at:
                at, split = seed, self.task.split(self.data, seed)
            run = Run(
                self.ways[way],
                split,
                search.planned(self.plan, tuned[way], seed),
                len(self.task.classes),
            )
            run.train()
            rows = [{"epoch": "last", **measure(run)}]
            run.select()
            rows.append({"epoch": "selected", **measure(run, probes=False)})
            self.add([{"method": way, "seed": seed, **row} for row in rows])
            bar.update()
        bar.close()

    def add(self, rows: list[dict[str, object]]) -> None:
        """Appends both rows of a run at once, so that a stop leaves whole runs."""
        new = not self.runs.is_file()
        with self.runs.open("a", newline="") as file:
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            if new:
                table.writeheader()
            table.writerows(
                {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            )

    def report(self) -> None:
        """Writes the table of differences and draws the figures."""
        rows = summary.read(self.runs)
        if not rows:
            raise DataError(f"{self.runs} has no runs: run the stage train first")
        table = summary.compare(rows, self.task.views)
        summary.write(self.folder / "differences.csv", table)
        lines = summary.cells(table, rows, self.task.views)
        text = summary.markdown(lines)
        (self.folder / "table.md").write_text(text)
        if self.args.results == RESULTS:  # what the repository publishes
            summary.publish(PAGE, f"comparison {self.args.task}", text)
        console = Console(highlight=False, width=210)
        console.print(summary.show(lines))
        for path in figures.draw(self.folder, self.task, rows, table):
            console.print(f"figure: {path}", soft_wrap=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("task", choices=TASKS, help="the data set")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to do of it")
    add("--methods", nargs="+", metavar="METHOD", help="ways to train; none: all of them")
    add("--trials", type=int, default=12, help="trials of the search for every way to train")
    add("--seeds", type=int, default=10, help="fresh seeds of the comparison")
    add("--minutes", type=float, default=float("inf"), help="stop after the run that goes over")
    add("--results", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    for name in ("trials", "seeds"):
        if not 1 <= getattr(args, name) <= SEARCH_SEED:
            parser.error(f"argument --{name}: must be from 1 to {SEARCH_SEED}")
    every = ways(TASKS[args.task].views)
    for way in args.methods or ():
        if way not in every:
            parser.error(f"argument --methods: {way!r} is none of: {', '.join(every)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns the exit status."""
    args = parse(argv)
    try:
        comparison = Comparison(args)
        for stage in STAGES:
            if stage in args.stages:
                getattr(comparison, stage)()
    except (DataError, OutOfTimeError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small are not worth sharing out among threads
    sys.exit(main())
