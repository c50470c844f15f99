"""Benchmarks of mmfuse: `python benchmarks/run.py`; `--quick --output FOLDER` takes half a minute.

Every provider's result is compared with the reference before it is timed; on a GPU also that of its
call recorded in a CUDA graph. One that is wrong is refused, and the run then ends with exit code 1.
Results are written after every measurement, to results/<machine>/<commit>/ where the tree is clean.

`--minutes` limits the whole run: the main cases come first, every case gets fewer samples, and the
report lists what there was no time for. `--plan` measures a list that is fixed, and `--shrink 4096`
rehearses it in seconds on a CPU. A run that was stopped goes on with `--resume`, which passes over
all that its folder has, but for units that the documents show and that have too few samples. Runs
that leave out providers or are short take `--output`: in a commit's folder they would replace whole
measurements. `--report FOLDER` only writes tables and plots anew.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import tables
import torch
from cases import CASES, WORKLOADS
from engine import environment, plan, providers, replay, results
from engine.measure import SHOWN_SAMPLES, BigCopy, Clock
from engine.rows import Row
from engine.session import Session
from engine.workloads import shrunk
from rich.console import Console
from rich.markup import escape

PLANS = {**plan.PLANS, "readme": tables.README}
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_QUICK = {
    "cases": ["modality_scores", "decision", "update_scale", "ogm_ge"],
    "workloads": ["classes_6", "resnet18"],
    "dtype": ["float32"],
    "seconds": 4.0,
}
# Share of the CPU that others may take before the numbers are suspect.
_BUSY = 0.05
# Seconds for the samples of one measurement, beside a busy neighbour too.
_SECONDS = 5.0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--cases", choices=CASES, help=", ".join(CASES), **several)
    parser.add_argument("--workloads", choices=WORKLOADS, help=", ".join(WORKLOADS), **several)
    parser.add_argument(
        "--providers", help="plain, official, foreach, compile, or a backend", **several
    )
    parser.add_argument("--dtype", choices=_DTYPES, help=", ".join(_DTYPES), **several)
    parser.add_argument("--device", type=torch.device, help="cpu or cuda; default: cuda if it can")
    parser.add_argument(
        "--select",
        choices=("all", "conv"),
        default="all",
        help="parameters that are modulated; conv: four-dimensional ones, as in the released code",
    )
    parser.add_argument("--seconds", type=float, help="per case, for all providers together")
    parser.add_argument("--minutes", type=float, help="for the whole run")
    parser.add_argument("--tf32", action="store_true", help="in the training steps' convolutions")
    parser.add_argument("--quick", action="store_true", help="a short run on the main cases")
    plans = "; ".join(f"{name}: {made.about}" for name, made in PLANS.items())
    parser.add_argument("--plan", choices=PLANS, help=f"a list that is fixed. {plans}")
    parser.add_argument(
        "--shrink", type=int, default=1, metavar="N", help="divide all sizes by N: a rehearsal"
    )
    for name, what in (
        ("plots", "default: but for the plans of a GPU"),
        (
            "busy",
            "beside processes that keep all cores busy, too; default: in a whole run on a CPU",
        ),
    ):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=what)
    parser.add_argument("--output", type=Path, help="folder; default: that of machine and commit")
    parser.add_argument(
        "--resume", action="store_true", help="pass over what the folder has, with enough samples"
    )
    parser.add_argument("--report", type=Path, help="measure nothing, write this folder's anew")
    options = parser.parse_args(argv)
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = providers.provider_names(options.device)
    for name in options.providers or []:
        if name not in known:
            parser.error(f"on {options.device.type} the providers are {', '.join(known)}")
    options.partial = why_partial(options, known)
    if options.plan and (options.quick or options.cases or options.workloads or options.dtype):
        parser.error("--plan names the cases, workloads and dtypes; leave them and --quick out")
    if options.shrink < 1:
        parser.error("--shrink must be at least 1")
    chosen = PLANS.get(options.plan)
    quick = _QUICK if options.quick else {}
    options.left_out = []
    if options.plots is None:
        options.plots = chosen is None or chosen.plots
    if options.busy is None:
        short = options.quick or options.minutes is not None or options.shrink > 1
        options.busy = options.device.type == "cpu" and not short
    if options.providers is None:
        slow = chosen.without if chosen else ("compile", "reference") if options.quick else ()
        if options.minutes is not None and not (options.quick or chosen):
            slow = ("compile", "reference")
            options.left_out += [f"{name}: too slow for a run with --minutes" for name in slow]
        options.providers = [name for name in known if name not in slow]
    named = options.cases is not None
    whole = not (named or options.workloads or options.dtype or options.quick or chosen)
    options.cases = options.cases or quick.get("cases")
    if options.cases is None:
        options.cases = [name for name, case in CASES.items() if not case.named_only]
    if options.workloads is None and chosen is None:
        own = [w.name for case in CASES.values() if case.named_only for w in case.workloads]
        unasked = [] if named else own
        everything = [
            name for name, w in WORKLOADS.items() if not w.named_only and name not in unasked
        ]
        options.workloads = quick.get("workloads", everything)
        if options.device.type == "cpu":
            large = [name for name in options.workloads if WORKLOADS[name].gpu]
            options.workloads = [name for name in options.workloads if name not in large]
            reason = "too much for a CPU; measured there if --workloads names it"
            options.left_out += [f"{name}: {reason}" for name in large]
    options.once = []
    if whole and options.device.type == "cpu":
        options.once = [torch.bfloat16]
        options.left_out.append(
            "bfloat16 on other workloads than a case's first: a run would take half as long "
            "again; measured if --dtype names it"
        )
    options.dtype = options.dtype or quick.get("dtype", ["float32", "bfloat16"])
    options.seconds = options.seconds or quick.get("seconds", _SECONDS)
    return options


def why_partial(options: argparse.Namespace, known: Sequence[str]) -> str | None:
    """The option that makes a run's units less than whole ones, if there is one."""
    if options.providers and {*known} - {*options.providers}:
        return "--providers"
    named = ("quick", "minutes") if options.plan is None else ("minutes",)
    given = [name for name in named if getattr(options, name)]
    given += ["shrink"] if options.shrink > 1 else []
    return f"--{given[0]}" if given else None


def has_enough(rows: Sequence[Row], key: plan.Key) -> bool:
    """True if a unit's rows are no reason to measure it anew."""
    few = [r for r in rows if r.samples < SHOWN_SAMPLES and r.provider != providers.REFERENCE]
    return not (key in tables.README.units and few)


def measure_all(
    session: Session, options: argparse.Namespace, old: Sequence[Row] = ()
) -> Iterator[plan.Unit]:
    """Measures what there is time for, and what `old` has not; yields each measurement's unit."""
    if options.plan:
        units = plan.planned(PLANS[options.plan], options.shrink, options.select)
    else:
        units = plan.units(
            [CASES[name] for name in options.cases],
            [shrunk(WORKLOADS[name], options.shrink) for name in options.workloads],
            [getattr(torch, name) for name in options.dtype],
            options.select,
            main_first=options.minutes is not None,
            once=options.once,
        )
    session.skipped += options.left_out
    there: dict[tuple[str, str, str], list[Row]] = {}
    for row in old:
        there.setdefault(results.unit_of(row), []).append(row)
    units = [u for u in units if u.labels not in there or not has_enough(there[u.labels], u.key)]
    began = time.monotonic()
    for number, (unit, seconds) in enumerate(
        plan.share(units, options.seconds, options.minutes), start=1
    ):
        if seconds is None:
            session.skipped.append(f"{unit}: no time left")
            continue
        session.measure(unit, options.providers, seconds)
        gc.collect()
        took = "{}:{:02d}".format(*divmod(int(time.monotonic() - began), 60))
        session.console.print(f"[dim]{number} of {len(units)} measurements, {took} minutes[/]")
        yield unit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit code."""
    options = parse(argv)
    if options.report is not None:
        results.write(options.report, *results.load(options.report), plots=True)
        return 0
    # Before anything is measured: a tree that is not clean has no folder.
    if options.output is None and options.partial is not None:
        raise results.DirtyTree(
            f"{options.partial} makes less than whole measurements, which would replace those of "
            "the commit's folder: name a folder with --output"
        )
    output = options.output or results.folder_of_commit(options.device)
    fresh = options.output and not options.resume
    old_rows, old = ([], results.Facts()) if fresh else results.load(output)
    if options.device.index is not None:
        torch.cuda.set_device(options.device)
    console = Console()
    facts = environment.describe(options.device)
    if options.device.type == "cuda":
        facts["TF32 in training steps"] = "yes" if options.tf32 else "no"
    for key, value in facts.items():
        console.print(f"[bold]{key}[/]: {escape(value)}", highlight=False, soft_wrap=True)
    results.check_same(output, old, facts)
    this_run = {key: facts.pop(key) for key in results.OF_A_RUN if key in facts}
    bystanders = environment.Bystanders()
    clock = Clock(options.device, options.shrink)
    copy = BigCopy(options.device, options.shrink)
    session = Session(options.device, options.select, options.tf32, console, clock, copy)
    session.record = replay.recorder_for(options.device)
    session.busy = options.busy
    if options.plan:
        session.samples = PLANS[options.plan].samples
    if not (options.quick or options.minutes is not None or options.shrink > 1):
        session.shown = tables.README.units
    again: set[str] = set()

    def write(*, plots: bool = False) -> float | None:
        share = bystanders.share()
        if share is not None:
            this_run[environment.LOAD] = f"{share:.0%}"
        lists = [
            results.merged_lines(before, now, again)
            for before, now in ((old.skipped, session.skipped), (old.refused, session.refused))
        ]
        found = results.Facts(facts, *lists, [*old.invocations, this_run])
        results.write(output, results.merged(old_rows, session.rows), found, plots=plots)
        return share

    for unit in measure_all(session, options, old_rows if options.resume else ()):
        again |= {str(unit), unit.workload.name}
        # A run that is cut short leaves its results.
        write()
    share = write(plots=options.plots)
    if share is not None and share > _BUSY:
        console.print(
            f"[bold yellow]others took {share:.0%} of the CPU: these numbers are noisy[/]"
        )
    console.print(f"written to {output}")
    return 1 if session.refused else 0


if __name__ == "__main__":
    sys.exit(main())
