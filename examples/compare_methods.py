"""Compares every method of mmfuse with baselines: search, training with fresh seeds, statistics.

It runs for some 40 minutes on one core, can be stopped at any time and goes on where it was::

    pip install -e ".[examples]" && pip install --no-deps animal-mnist==0.4 seglearn==1.2.5
    python examples/compare_methods.py wrist
    python examples/compare_methods.py animals

`docs/demonstrations.md` has the protocol and the results.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from demonstrations import figures, search, settings, summary
from demonstrations.baselines import Plan
from demonstrations.data import DataError
from demonstrations.measures import measure
from demonstrations.tasks import TASKS
from demonstrations.training import Run
from demonstrations.ways import ENSEMBLE, RATE, at_rates, build_of, needed, ways
from rich.console import Console
from tqdm import tqdm

HERE = Path(__file__).parent
RESULTS = HERE.parent / "build" / "compare"
PUBLISHED = HERE / "results"
PAGE = HERE.parent / "docs" / "demonstrations.md"
SEEDS = 15  # three times all people of the wrist movements
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
        self.ways = needed(args.methods or list(every), self.task.views)
        more = [way for way in self.ways if way not in (args.methods or every)]
        if more:
            print(f"also trained, to compare with: {', '.join(more)}", file=sys.stderr)
        self.plan = Plan(epochs=self.task.epochs)
        self.until = time.monotonic() + 60 * args.minutes
        self.data = None if args.stages == ["report"] else self.task.load()

    def in_time(self) -> None:
        """Stops when the minutes are over."""
        if time.monotonic() > self.until:
            raise OutOfTimeError(f"{self.args.minutes:g} minutes are over; run it again to go on")

    def search(self) -> None:
        """Runs the trials that are missing, and writes the settings of the best ones."""
        settings.same_trials(self.chosen, self.args.trials)  # before anything is trained
        seeds = range(SEARCH_SEED, SEARCH_SEED + self.task.search_seeds)
        splits = {seed: self.task.split(self.data, seed) for seed in seeds}
        views, classes = self.task.views, len(self.task.classes)
        journal = self.folder / "search.journal"
        found = search.Search(journal, self.args.task, views, splits, self.plan, classes)
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
                        found.trial(way, build_of(way, self.task.views))
                        bar.update()
        finally:
            bar.close()
            chosen = search.best(found, self.ways, trials)
            if chosen:  # what is there of other ways stays
                settings.save(
                    self.chosen, f"{command} --stages search --trials {trials}", trials, chosen
                )
                others = [way for way in chosen if way != ENSEMBLE]
                search.save_trials(self.folder / "trials.csv", found, others, trials)

    def train(self) -> None:
        """Trains with the seeds that are missing, each of which adds two rows to the table.

        Rows of other settings, epochs or batches than the present ones are taken out first.
        """
        if not self.chosen.is_file():
            raise DataError(f"{self.chosen} is not there: run the stage search first")
        _, tuned = settings.load(self.chosen)
        known = {way: tuned[way] for way in self.ways if way in tuned}
        without = [way for way in self.ways if way not in known]
        if without:
            print(f"no settings, not trained: {', '.join(without)}", file=sys.stderr)
        known |= at_rates(list(known), tuned)
        prints = {way: self.fingerprint(drawn) for way, drawn in known.items()}
        self.take_out(prints, at_rates(list(tuned), tuned))
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
                build_of(way, self.task.views),
                split,
                search.planned(self.plan, known[way], seed),
                len(self.task.classes),
            )
            run.train()
            rows = [{"epoch": "last", **measure(run)}]
            run.select()
            rows.append({"epoch": "selected", **measure(run, probes=False)})
            key = {"method": way, "seed": seed, "settings": prints[way]}
            self.add([{**key, **row} for row in rows])
            bar.update()
        bar.close()

    def fingerprint(self, drawn: settings.Drawn) -> str:
        """The mark of runs with these settings."""
        return settings.fingerprint(drawn, self.plan.epochs, self.plan.batch_size)

    def take_out(self, prints: Mapping[str, str], rates: Mapping[str, object]) -> None:
        """Takes rows out that are of other settings than these, or of a rate nobody has now."""
        rows, fit, old = summary.read(self.runs), [], {}
        for row in rows:
            way = row["method"]
            unused = RATE in way and way not in rates
            if unused or prints.get(way, row["settings"]) != row["settings"]:
                old[way] = row
            else:
                fit.append(row)
        if old:
            print(f"of other settings, taken out: {', '.join(old)}", file=sys.stderr)
            text = io.StringIO()
            table = csv.DictWriter(text, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(fit)
            settings.replace(self.runs, text.getvalue())

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
        _, tuned = settings.load(self.chosen)
        self.check(rows, tuned)
        table = summary.compare(rows, self.task.views, tuned)
        if not table:
            raise DataError(f"{self.runs} has no two seeds of a method and its baseline: add seeds")
        for warning in summary.too_few(table):
            print(warning, file=sys.stderr)
        summary.write(self.folder / "differences.csv", table)
        lines = summary.cells(table, rows, self.task.views)
        text = summary.markdown(lines)
        (self.folder / "table.md").write_text(text)
        console = Console(highlight=False, width=210)
        console.print(summary.show(lines))
        if not figures.complete(rows):
            raise DataError(f"no figures: {self.runs} has no seed of all ways: run the stage train")
        for path in figures.draw(self.folder, self.task, rows, table):
            console.print(f"figure: {path}", soft_wrap=True)
        if self.args.publish:
            self.publish(rows, text)

    def check(self, rows: list[summary.Row], tuned: dict[str, settings.Drawn]) -> None:
        """Refuses rows that are of other settings than those that are there."""
        known = tuned | at_rates(list(tuned), tuned)
        for row in rows:
            drawn = known.get(row["method"])
            if drawn is None or row["settings"] != self.fingerprint(drawn):
                raise DataError(
                    f"{self.runs} has runs of {row['method']!r} with other settings than "
                    f"{self.chosen.name}: run the stage train first"
                )

    def publish(self, rows: list[summary.Row], text: str) -> None:
        """Copies the results to the repository's, and the table to the page."""
        seeds = {way: len(summary.values(rows, way, "last", "accuracy")) for way in self.ways}
        few = [way for way, count in seeds.items() if count < self.args.seeds]
        if few:
            raise DataError(f"not published, {self.args.seeds} seeds are not there of: {few}")
        to = PUBLISHED / self.args.task
        to.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.suffix in (".csv", ".json", ".md", ".png") and path.parent != to:
                shutil.copyfile(path, to / path.name)
        summary.publish(PAGE, f"comparison {self.args.task}", text)


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
    add("--seeds", type=int, default=SEEDS, help="fresh seeds of the comparison")
    add("--minutes", type=float, default=float("inf"), help="stop after the run that goes over")
    add("--results", type=Path, default=RESULTS, help="folder of the results")
    add("--publish", action="store_true", help="also into the repository's results and page")
    args = parser.parse_args(argv)
    for name in ("trials", "seeds"):
        if not 1 <= getattr(args, name) <= SEARCH_SEED:
            parser.error(f"argument --{name}: must be from 1 to {SEARCH_SEED}")
    if args.publish and (args.methods or args.seeds != SEEDS or "report" not in args.stages):
        parser.error(f"argument --publish: goes with all methods, {SEEDS} seeds and the report")
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
