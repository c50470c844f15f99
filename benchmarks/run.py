"""Benchmarks of mmfuse: `python benchmarks/run.py`, or with `--quick` for half a minute.

`--minutes` limits the whole run: the main cases come first, every case gets fewer samples, and the
report lists what there was no time for. `--plan gpu` measures what the targets for a GPU are about,
in the order of their worth; `--plan gpu-training` whole training steps. With `--shrink 4096` both
are rehearsed in seconds on a CPU.

Every provider's result is compared with the reference before it is timed; on a GPU also that of its
call recorded in a CUDA graph. One that is wrong is refused, and the run then ends with exit code 1.
The results are written after every measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import _environment
import _parity
import _plan
import _providers
import _replay
import _report
import torch
from _cases import CASES
from _inputs import Inputs
from _measure import (
    MAX_SAMPLES,
    BigCopy,
    Clock,
    Cost,
    Prepared,
    convolutions,
    cost_of,
    interleaved,
)
from _workloads import WORKLOADS, Workload, shrunk
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
# For the samples of one measurement of a plan, which mostly are fewer than it takes.
_PLANNED_SECONDS = 10.0


@dataclass
class Session:
    """The options of a run, and what it has found out so far."""

    device: torch.device
    select: str
    tf32: bool
    console: Console
    clock: Clock
    copy: BigCopy
    record: _replay.Recorder | None = None
    samples: int = MAX_SAMPLES
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
        try:
            with convolutions(tf32=self.tf32) if training else contextlib.nullcontext():
                self._measure(unit, providers, seconds)
        except Exception as error:  # Whatever it is, the other measurements go on.
            self._refuse(f"{unit} fails: {_first_line(error)}")

    def _measure(self, unit: _plan.Unit, providers: Sequence[str], seconds: float) -> None:
        case, workload = unit.case, unit.workload
        if "compile" in providers:  # Else its seconds of imports would be for nothing.
            torch.compiler.reset()
        options = {"select": self.select} if case.kind == "gradients" else {}
        inputs = case.make(workload, unit.dtype, self.device, **options)
        with torch.set_grad_enabled(case.autograd):
            passed = self._gate(unit, inputs, providers)
            costs = {}
            for name, prepared in passed.items():
                inputs.restore()
                costs[name] = cost_of(prepared, self.device)
            replays = self._replays(unit, inputs, passed, costs)
            # Small calls wait for launches, not for memory.
            large = case.floor_bytes(inputs) >= _report.LATENCY_BYTES
            timed = {**passed, **replays}
            if large:
                timed["copy"] = self.copy.prepared
            # In a row, an update in place would go on shrinking the same gradient.
            in_rows = not large and case.kind not in ("gradients", "training")
            samples = interleaved(
                timed, self.clock, seconds, cold=large, in_rows=in_rows, most=self.samples
            )
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
                self._refuse(f"{unit}: {name} fails: {_first_line(error)}")
            else:
                passed[name] = prepared
        return passed

    def _replays(
        self,
        unit: _plan.Unit,
        inputs: Inputs,
        passed: Mapping[str, Prepared],
        costs: Mapping[str, Cost],
    ) -> dict[str, Prepared]:
        """The calls that can be recorded and whose replays give the reference's result."""
        if self.record is None:
            return {}
        case, found = unit.case, {}
        for name, prepared in passed.items():
            reason = _replay.why_not(name, case, costs[name])
            if reason is None:
                try:
                    found[_replay.name_of(name)] = _replay.checked_replay(
                        name, case, inputs, prepared, self.record
                    )
                except _parity.ParityError as error:
                    self._refuse(f"{unit}: {name}'s replay is wrong: {error}")
                except Exception as error:  # PyTorch has many for what cannot be recorded.
                    reason = _first_line(error)
            if reason is not None:
                self.skipped.append(f"{unit}: {name} is not replayed: {reason}")
        # To record, PyTorch gives unused memory back: the calls have to find theirs again.
        for prepared in passed.values() if found else ():
            prepared.restore()
            prepared.call()
        return found

    def _refuse(self, text: str) -> None:
        self.refused.append(text)
        self.console.print(f"[bold red]refused[/]: {escape(text)}")


def _first_line(error: Exception) -> str:
    """What CUDA's errors say after it is advice."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


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
    plans = "; ".join(f"{name}: {plan.about}" for name, plan in _plan.PLANS.items())
    parser.add_argument("--plan", choices=_plan.PLANS, help=f"a list that is fixed. {plans}")
    parser.add_argument(
        "--shrink", type=int, default=1, metavar="N", help="divide all sizes by N: a rehearsal"
    )
    parser.add_argument(
        "--plots", action=argparse.BooleanOptionalAction, help="default: but for a --plan"
    )
    parser.add_argument("--output", type=Path, help="folder; default: results/<machine>, here")
    options = parser.parse_args(argv)
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = _providers.provider_names(options.device)
    for name in options.providers or []:
        if name not in known:
            parser.error(f"on {options.device.type} the providers are {', '.join(known)}")
    if options.plan and (options.quick or options.cases or options.workloads or options.dtype):
        parser.error("--plan names the cases, workloads and dtypes; leave them and --quick out")
    if options.shrink < 1:
        parser.error("--shrink must be at least 1")
    plan = _plan.PLANS.get(options.plan)
    quick = _QUICK if options.quick else {}
    options.left_out = []
    if options.plots is None:
        options.plots = plan is None
    if plan is not None:
        options.providers = options.providers or [n for n in known if n not in plan.without]
        options.seconds = options.seconds or _PLANNED_SECONDS
    # What is named is measured, however long it takes.
    options.compile_all = options.providers is not None
    if options.providers is None:
        slow = ("compile", "reference") if options.quick else ()
        if options.minutes is not None and not options.quick:
            slow = ("reference",)
            options.left_out.append("reference: too slow for a run with --minutes")
        options.providers = [name for name in known if name not in slow]
    options.cases = options.cases or quick.get("cases", list(CASES))
    if options.workloads is None and plan is None:
        everything = [name for name in WORKLOADS if not WORKLOADS[name].named_only]
        options.workloads = quick.get("workloads", everything)
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
    *,
    plots: bool = False,
) -> float | None:
    """Writes CSV, Markdown and plots; returns the share of the CPU that others have taken."""
    share = bystanders.share()
    if share is not None:
        environment["CPU taken by others"] = f"{share:.0%}"
    output.mkdir(parents=True, exist_ok=True)
    _report.write_csv(session.rows, output / "results.csv")
    names: list[str] = []
    if plots:
        # A second of imports, of a package that a machine with a GPU may not have.
        import _plot

        subtitle = f"{environment['device']}; {environment['threads']} threads"
        names = _plot.write_plots(session.rows, output, subtitle)
    text = _report.markdown(session.rows, environment, session.skipped, session.refused, names)
    (output / "results.md").write_text(text)
    return share


def measure_all(
    session: Session, budget: _plan.Budget, options: argparse.Namespace
) -> Iterator[None]:
    """Measures what there is time for; yields after each measurement."""
    if options.plan:
        plan = _plan.planned(_plan.PLANS[options.plan], options.shrink)
    else:
        plan = _plan.units(
            [CASES[name] for name in options.cases],
            [shrunk(WORKLOADS[name], options.shrink) for name in options.workloads],
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
    clock = Clock(options.device, options.shrink)
    copy = BigCopy(options.device, options.shrink)
    session = Session(options.device, options.select, options.tf32, console, clock, copy)
    session.record = _replay.recorder_for(options.device)
    if options.plan:
        session.samples = _plan.PLANS[options.plan].samples
    for _ in measure_all(session, budget, options):
        # A run that is cut short leaves its results.
        write(session, environment, bystanders, options.output)
    share = write(session, environment, bystanders, options.output, plots=options.plots)
    if share is not None and share > _BUSY:
        console.print(
            f"[bold yellow]others took {share:.0%} of the CPU: these numbers are noisy[/]"
        )
    console.print(f"written to {options.output}")
    return 1 if session.refused else 0


if __name__ == "__main__":
    sys.exit(main())
