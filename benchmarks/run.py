"""Benchmarks of mmfuse: `python benchmarks/run.py`, or with `--quick` for half a minute.

`--minutes` limits the whole run: the main cases come first, every case gets fewer samples, and the
report lists what there was no time for.

Every provider's result is compared with the reference before it is timed. One that is wrong is
refused, and the run then ends with exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import _environment
import _parity
import _plan
import _plot
import _providers
import _report
import torch
from _cases import CASES
from _inputs import Inputs
from _measure import BigCopy, Clock, Prepared, convolutions, cost_of, interleaved
from _workloads import WORKLOADS, Workload
from rich.console import Console
from rich.markup import escape

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_QUICK = {
    "cases": ["modality_scores", "decision", "update_scale", "ogm_ge"],
    "workloads": ["classes_6", "resnet18"],
    "dtype": ["float32"],
    "seconds": 4.0,
}
# Share of the CPU that others may take before the numbers are suspect.
_BUSY = 0.05
# Columns of a terminal that shows the whole table.
_WIDE = 125
# Gradients, their restored copy, weights, anchors, and what the hungriest provider allocates.
_COPIES = 10
# Elements that a training step keeps for each pixel, between the passes and at the worst moment of
# the backward pass: autograd alone keeps 111 for the pixels of CREMA-D.
_PER_PIXEL = 200
# Results are written as often as this many seconds pass.
_WRITE_EVERY = 60.0


@dataclass
class Session:
    """The options of a run, and what it has found out so far."""

    device: torch.device
    select: str
    tf32: bool
    console: Console
    clock: Clock
    copy: BigCopy
    rows: list[_report.Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def measure(self, unit: _plan.Unit, providers: Sequence[str], seconds: float) -> None:
        """Checks and times the providers of one case on one workload."""
        need = bytes_needed(unit.workload, unit.dtype)
        free = _environment.available_bytes(self.device)
        if need > free:
            self.skipped.append(f"{unit}: {need / 2**30:.0f} GiB wanted, {free / 2**30:.0f} free")
            return
        training = unit.case.kind == "training"
        with convolutions(tf32=self.tf32) if training else contextlib.nullcontext():
            self._measure(unit, providers, seconds)

    def _measure(self, unit: _plan.Unit, providers: Sequence[str], seconds: float) -> None:
        case, workload = unit.case, unit.workload
        torch.compiler.reset()
        options = {"select": self.select} if case.kind == "gradients" else {}
        inputs = case.make(workload, unit.dtype, self.device, **options)
        with torch.set_grad_enabled(case.autograd):
            passed = self._gate(unit, inputs, providers)
            costs = {}
            for name, prepared in passed.items():
                inputs.restore()
                costs[name] = cost_of(prepared, self.device)
            # Small calls wait for launches, not for memory.
            large = case.floor_bytes(inputs) >= _report.LATENCY_BYTES
            timed = {**passed, "copy": self.copy.prepared} if large else passed
            # In a row, an update in place would go on shrinking the same gradient.
            in_rows = not large and case.kind not in ("gradients", "training")
            samples = interleaved(timed, self.clock, seconds, cold=large, in_rows=in_rows)
        labels = {
            "case": case.name,
            "title": case.title,
            "workload": workload.title,
            "dtype": str(inputs.dtype).removeprefix("torch."),
            "device": self.device.type,
        }
        rows = _report.make_rows(labels, samples, costs, case.floor_bytes(inputs), self.copy.nbytes)
        if rows:
            self.console.print(_report.terminal_table(rows, wide=self.console.width >= _WIDE))
        self.rows += rows

    def _gate(
        self, unit: _plan.Unit, inputs: Inputs, providers: Sequence[str]
    ) -> dict[str, Prepared]:
        """The providers that give the reference's result."""
        case, passed = unit.case, {}
        for name in providers:
            if name == _parity.PLAIN and case.kind != "training":
                continue
            reason = _providers.why_not(name, case, unit.workload, self.device)
            if reason is not None:
                self.skipped.append(f"{unit}: {name}: {reason}")
                continue
            prepared = _providers.prepare(name, case, inputs)
            prepared.restore()
            try:
                case.check(name, inputs, prepared.call())
            except _parity.ParityError as error:
                self._refuse(f"{unit}: {name} is wrong: {error}")
            except Exception as error:  # Whatever it is, the others go on.
                self._refuse(f"{unit}: {name} fails: {type(error).__name__}: {error}")
            else:
                passed[name] = prepared
        return passed

    def _refuse(self, text: str) -> None:
        self.refused.append(text)
        self.console.print(f"[bold red]refused[/]: {escape(text)}")


def bytes_needed(workload: Workload, dtype: torch.dtype) -> int:
    """The memory that measuring on a workload takes, roughly."""
    kept = workload.elements * _COPIES + workload.pixels * _PER_PIXEL
    return kept * dtype.itemsize


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
    parser.add_argument("--output", type=Path, help="folder; default: results/<machine>, here")
    options = parser.parse_args(argv)
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = _providers.provider_names(options.device)
    for name in options.providers or []:
        if name not in known:
            parser.error(f"on {options.device.type} the providers are {', '.join(known)}")
    quick = _QUICK if options.quick else {}
    options.left_out = []
    # What is named is measured, however long it takes.
    options.compile_all = options.providers is not None
    if options.providers is None:
        slow = ("compile", "reference") if options.quick else ()
        if options.minutes is not None and not options.quick:
            slow = ("reference",)
            options.left_out.append("reference: too slow for a run with --minutes")
        options.providers = [name for name in known if name not in slow]
    options.cases = options.cases or quick.get("cases", list(CASES))
    if options.workloads is None:
        options.workloads = quick.get("workloads", list(WORKLOADS))
        if options.device.type == "cpu":
            large = [name for name in options.workloads if WORKLOADS[name].gpu]
            options.workloads = [name for name in options.workloads if name not in large]
            reason = "too much for a CPU; measured there if --workloads names it"
            options.left_out += [f"{name}: {reason}" for name in large]
    options.dtype = options.dtype or quick.get("dtype", ["float32", "bfloat16"])
    options.seconds = options.seconds or quick.get("seconds", 10.0)
    if options.output is None:
        machine = _environment.folder_name(_environment.machine_model(options.device))
        options.output = Path(__file__).resolve().parent / "results" / machine
    return options


def write(
    session: Session,
    environment: dict[str, str],
    bystanders: _environment.Bystanders,
    output: Path,
) -> float | None:
    """Writes CSV, plots and Markdown; returns the share of the CPU that others have taken."""
    share = bystanders.share()
    if share is not None:
        environment["CPU taken by others"] = f"{share:.0%}"
    output.mkdir(parents=True, exist_ok=True)
    _report.write_csv(session.rows, output / "results.csv")
    subtitle = f"{environment['device']}; {environment['threads']} threads"
    plots = _plot.write_plots(session.rows, output, subtitle)
    text = _report.markdown(session.rows, environment, session.skipped, session.refused, plots)
    (output / "results.md").write_text(text)
    return share


def measure_all(
    session: Session, budget: _plan.Budget, options: argparse.Namespace
) -> Iterator[None]:
    """Measures what there is time for; yields after each measurement."""
    plan = _plan.units(
        [CASES[name] for name in options.cases],
        [WORKLOADS[name] for name in options.workloads],
        [getattr(torch, name) for name in options.dtype],
        options.select,
        main_first=options.minutes is not None,
    )
    session.skipped += options.left_out
    not_compiled: list[str] = []
    for unit, seconds in budget.share(plan):
        if seconds is None:
            session.skipped.append(f"{unit}: no time left")
            continue
        providers = options.providers
        if "compile" in providers and not (options.compile_all or budget.may_compile(unit)):
            providers = [name for name in providers if name != "compile"]
            if _providers.function_of("compile", unit.case) is not None:
                not_compiled.append(str(unit))
        session.measure(unit, providers, seconds)
        gc.collect()
        yield
    if not_compiled:
        session.skipped.append(
            "compile: a run with --minutes compiles the main cases only, once each, in the first "
            f"quarter of its time; it is left out of {'; '.join(not_compiled)}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit code."""
    options = parse(argv)
    budget = _plan.Budget(options.seconds, options.minutes)
    if options.device.index is not None:
        torch.cuda.set_device(options.device)
    console = Console()
    environment = _environment.describe(options.device)
    if options.device.type == "cuda":
        environment["TF32 in training steps"] = "yes" if options.tf32 else "no"
    for key, value in environment.items():
        console.print(f"[bold]{key}[/]: {escape(value)}", highlight=False, soft_wrap=True)
    bystanders = _environment.Bystanders()
    clock, copy = Clock(options.device), BigCopy(options.device)
    session = Session(options.device, options.select, options.tf32, console, clock, copy)
    written = time.monotonic()
    for _ in measure_all(session, budget, options):
        # A run that is cut short leaves its results.
        if time.monotonic() - written > _WRITE_EVERY:
            write(session, environment, bystanders, options.output)
            written = time.monotonic()
    share = write(session, environment, bystanders, options.output)
    if share is not None and share > _BUSY:
        console.print(
            f"[bold yellow]others took {share:.0%} of the CPU: these numbers are noisy[/]"
        )
    console.print(f"written to {options.output}")
    return 1 if session.refused else 0


if __name__ == "__main__":
    sys.exit(main())
