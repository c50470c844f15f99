"""Says what one commit made slower or faster than another: `make bench-compare A=main B=HEAD`.

Each commit gets a worktree under build/compare, and is built there once. Runs of both take turns,
A B B A and so on, so that a drift of the machine hits both; each run is a process of its own. The
cases are this checkout's for both: only the package differs. *slower* and *faster* are what every
run of one commit was than every run of the other, by more than the least change that counts; with
five runs each, chance alone does that once in 252 times. `foreach` is the same code in both: where
it moves, the machine did, and what moves no more than that is noise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine import results
from engine.report import NO_NUMBER, show_time
from engine.rows import Row

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "compare"
CONTROL = "foreach"
_CASES = (
    "modality_scores",
    "decision",
    "update_scale",
    "ogm_ge",
    "ogm_ge_step",
    "inforeg",
    "redreg",
)
_WORKLOADS = ("classes_6", "resnet18")
#: Changes below this are not worth a word.
LEAST_CHANGE = 0.03
WITHIN = "within noise"

Key = tuple[str, str, str, str]
#: The rows of one run.
Run = Sequence[Row]
#: Runs a commit, and returns the rows; the number tells the runs apart.
Runner = Callable[[str, int], Run]


def judged(before: Sequence[float], after: Sequence[float], least: float = LEAST_CHANGE) -> str:
    """The verdict in a word or two; a change that counts is larger than `least`."""
    ratio = statistics.median(after) / statistics.median(before)
    if min(after) > max(before) and ratio > 1 + least:
        return "slower"
    if max(after) < min(before) and 1 / ratio > 1 + least:
        return "faster"
    return WITHIN


@dataclass(frozen=True)
class Change:
    """One provider in one case.

    Attributes:
        key: Case, workload, dtype, provider.
        before: Milliseconds in each run of the first commit.
        after: Of the second one.
        host: Microseconds of the host in each run of both; None where they are not known.
        drift: How much the control of the case has moved; more than that has to change.
    """

    key: Key
    before: Sequence[float]
    after: Sequence[float]
    host: tuple[Sequence[float], Sequence[float]] | None = None
    drift: float = 0.0

    @property
    def ratio(self) -> float:
        """Above 1 for what takes longer now."""
        return statistics.median(self.after) / statistics.median(self.before)

    @property
    def verdict(self) -> str:
        """The verdict on the whole call."""
        return judged(self.before, self.after, LEAST_CHANGE + self.drift)

    @property
    def host_verdict(self) -> str:
        """The verdict on the host's part, which a neighbour disturbs less than much data."""
        return judged(*self.host) if self.host else WITHIN

    @property
    def noise(self) -> float:
        """The larger of both commits' spreads, as a share of the median."""
        return max(
            (max(times) - min(times)) / statistics.median(times)
            for times in (self.before, self.after)
        )


def take_turns(commits: tuple[str, str], runs: int, run: Runner) -> tuple[list[Run], list[Run]]:
    """A B, B A, A B and so on."""
    found: dict[str, list[Run]] = {"a": [], "b": []}
    for n in range(runs):
        for side in ("ab", "ba")[n % 2]:
            found[side].append(run(commits["ab".index(side)], n))
    return found["a"], found["b"]


def changes(before: Sequence[Run], after: Sequence[Run]) -> list[Change]:
    """The changes of every measurement that all runs have."""
    sides = [[{_key(row): row for row in run} for run in side] for side in (before, after)]
    every = [run for side in sides for run in side]
    keys = [key for key in every[0] if all(key in run for run in every)]
    out = []
    for key in keys:
        times = [[run[key].median_ms for run in side] for side in sides]
        hosts = [[run[key].host_us for run in side] for side in sides]
        known = all(host is not None for side in hosts for host in side)
        out.append(Change(key, *times, tuple(hosts) if known else None))
    moved = {c.key[:3]: max(c.ratio, 1 / c.ratio) - 1 for c in out if c.key[3] == CONTROL}
    return [c if c.key[3] == CONTROL else replace(c, drift=moved.get(c.key[:3], 0.0)) for c in out]


def _key(row: Row) -> Key:
    return row.case, row.workload, row.dtype, row.provider


def table(found: Sequence[Change], commits: tuple[str, str]) -> list[str]:
    """Lines of Markdown: what got slower comes first."""
    a, b = commits
    lines = [
        f"| case | on | provider | {a} | {b} | {b} / {a} | noise | host: {a} | {b} | |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    order = ("slower", "faster", WITHIN)
    for change in sorted(found, key=lambda c: order.index(c.verdict)):
        case, workload, dtype, provider = change.key
        times = (show_time(statistics.median(t)) for t in (change.before, change.after))
        host = [NO_NUMBER] * 2
        if change.host is not None:
            host = [show_time(statistics.median(h) / 1e3) for h in change.host]
        word = change.verdict if change.verdict == WITHIN else f"**{change.verdict}**"
        if change.host_verdict != WITHIN:
            word += f", host **{change.host_verdict}**"
        if provider == CONTROL:
            word += ", the control"
        cells = (case, f"{workload}, {dtype}", provider, *times, f"{change.ratio:.2f}×")
        lines.append(f"| {' | '.join([*cells, f'{change.noise:.0%}', *host, word])} |")
    moved = [c for c in found if c.key[3] == CONTROL and c.verdict != WITHIN]
    if moved:
        lines += [
            "",
            f"The machine has drifted: {CONTROL}, the same in both, moved {len(moved)} ×.",
        ]
    slower = got_slower(found)
    return [*lines, "", f"{len(slower)} of {len(found)} got slower beyond noise."]


def got_slower(found: Sequence[Change]) -> list[Change]:
    """The slower calls, as a whole or in the host's part; not the control."""
    return [c for c in found if c.key[3] != CONTROL and "slower" in (c.verdict, c.host_verdict)]


def git(*words: str) -> str:
    """Git's answer.

    Raises:
        SystemExit: it refuses.
    """
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench-compare: git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def checkout(commit: str) -> Path:
    """A worktree of a commit, built.

    Raises:
        SystemExit: it cannot be built; the log says why.
    """
    folder = FOLDER / commit
    if not folder.is_dir():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(folder), commit)
    built = folder / "build" / "built"
    if not built.is_file():
        built.parent.mkdir(exist_ok=True)
        log = FOLDER / f"{commit}.log"
        with log.open("w") as file:
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            demanded = {**os.environ, "MMFUSE_NATIVE": "1"}
            code = subprocess.run(
                command, cwd=folder, env=demanded, stdout=file, stderr=file, check=False
            )
        if code.returncode:
            raise SystemExit(f"bench-compare: {commit} cannot be built; see {log}")
        built.touch()
    return folder


def runner(words: Sequence[str]) -> Runner:
    """Measures a commit with these arguments of run.py."""

    def run(commit: str, number: int) -> Run:
        output = FOLDER / "runs" / f"{commit}-{number}"
        command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *words]
        environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(checkout(commit))}
        done = subprocess.run(
            [*command, "--output", str(output)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(
                f"bench-compare: {commit}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        rows, facts = results.load(output)
        if f"commit {commit}" not in facts.environment["mmfuse"]:
            raise SystemExit(f"bench-compare: not {commit} was measured: {facts.environment}")
        return rows

    return run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("a", help="a commit, as git names it")
    parser.add_argument("b", help="the other one")
    parser.add_argument("--runs", type=int, default=5, help="of each commit")
    parser.add_argument("--seconds", default="2", help="as for run.py, and so are the others")
    parser.add_argument("--cases", nargs="+", default=_CASES)
    parser.add_argument("--workloads", nargs="+", default=_WORKLOADS)
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--providers", nargs="+", default=[CONTROL, "cpu"])
    options = parser.parse_args(argv)
    if options.runs < 2:
        parser.error("--runs: one run says nothing of its noise")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; the exit code is 1 if something got slower."""
    options = parse(argv)
    commits = tuple(
        git("rev-parse", "--short=10", f"{name}^{{commit}}") for name in (options.a, options.b)
    )
    for commit in commits:
        checkout(commit)  # before anything is timed
    words = ["--no-plots", "--no-busy", "--seconds", options.seconds]
    for name in ("cases", "workloads", "dtype", "providers"):
        words += [f"--{name}", *getattr(options, name)]
    found = changes(*take_turns(commits, options.runs, runner(words)))
    if not found:
        raise SystemExit(
            "bench-compare: no measurement is in all runs, so that nothing was compared: --cases, "
            "--workloads and --providers have to fit together"
        )
    print("\n".join(table(found, commits)))
    return int(bool(got_slower(found)))


if __name__ == "__main__":
    sys.exit(main())
