"""Checks and times the providers of one case after the other."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from . import environment, providers, replay, report, rows
from .cost import UNCOUNTED, Cost, cost_of
from .gate import PLAIN, ParityError
from .inputs import Inputs
from .measure import (
    MAX_SAMPLES,
    SHOWN_SAMPLES,
    BigCopy,
    Clock,
    Prepared,
    Sample,
    convolutions,
    interleaved,
)
from .neighbour import BusyNeighbour
from .plan import Unit
from .process_case import ProcessCase
from .workloads import Workload, tiny

# Columns of a terminal that shows the whole table.
_WIDE = 140
# Gradients, their restored copy, weights, anchors, and what the hungriest provider allocates.
_COPIES = 10
# Elements that a training step keeps for each pixel, between the passes and at the worst moment of
# the backward pass: autograd alone keeps 111 for the pixels of CREMA-D.
_PER_PIXEL = 200
# The share of a measurement's seconds that goes to runs beside a busy neighbour.
_BUSY_SHARE = 0.3
# Quiet seconds of a call above which it is not measured there.
_BUSY_MOST = 0.1
_HOST_SECONDS = 0.02


@dataclass
class Session:
    """The options of a run, and what it has found out so far."""

    device: torch.device
    select: str
    tf32: bool
    console: Console
    clock: Clock
    copy: BigCopy
    record: replay.Recorder | None = None
    busy: bool = False
    samples: int = MAX_SAMPLES
    shown: Collection[tuple[str, str, str]] = ()  # in the documents, as `Unit.key`
    rows: list[rows.Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def measure(self, unit: Unit, names: Sequence[str], seconds: float) -> None:
        """Checks and times the providers of one case on one workload."""
        need = bytes_needed(unit.workload, unit.dtype)
        free = environment.available_bytes(self.device)
        if need > free:
            self.skipped.append(f"{unit}: {need / 2**30:.0f} GiB wanted, {free / 2**30:.0f} free")
            return
        training = unit.case.kind == "training"
        try:
            if isinstance(unit.case, ProcessCase):
                self._measure_processes(unit, unit.case, seconds)
                return
            with convolutions(tf32=self.tf32) if training else contextlib.nullcontext():
                self._measure(unit, names, seconds)
        except Exception as error:  # Whatever it is, the other measurements go on.
            self._refuse(f"{unit} fails: {_first_line(error)}")

    def _measure(self, unit: Unit, names: Sequence[str], seconds: float) -> None:
        case, workload = unit.case, unit.workload
        if "compile" in names:  # Else its seconds of imports would be for nothing.
            torch.compiler.reset()
        inputs = self._inputs(unit, workload)
        with torch.set_grad_enabled(case.autograd):
            passed = self._gate(unit, inputs, names)
            costs = {}
            for name, prepared in passed.items():
                # Its 22,560 operators on two ResNet-18 take twelve seconds to count.
                counted = not (case.noisy and name == providers.REFERENCE)
                inputs.restore()
                costs[name] = cost_of(prepared, self.device) if counted else UNCOUNTED
            replays = self._replays(unit, inputs, passed, costs)
            # Small calls wait for launches, not for memory.
            large = case.floor_bytes(inputs) >= rows.LATENCY_BYTES
            timed = {**passed, **replays}
            if large:
                timed["copy"] = self.copy.prepared
            # Several updates in place in a row would go on shrinking the same gradient.
            in_rows = not large and case.kind not in ("gradients", "training")
            beside = self.busy and case.kind != "training"
            quiet = seconds * (1 - _BUSY_SHARE) if beside else seconds
            how: dict[str, Any] = {"cold": large, "in_rows": in_rows, "most": self.samples}
            least = dict.fromkeys(timed, SHOWN_SAMPLES) if unit.key in self.shown else {}
            least.pop(providers.REFERENCE, None)  # in no table, and the slowest
            samples = interleaved(timed, self.clock, quiet, least=least, **how)
            busy = self._beside(passed, samples, seconds * _BUSY_SHARE, how) if beside else {}
            host = self._host(unit, passed, samples)
        self._add(unit, samples, costs, case.floor_bytes(inputs), rows.Besides(host, busy))

    def _inputs(self, unit: Unit, workload: Workload) -> Inputs:
        options = {"select": self.select} if unit.case.kind == "gradients" else {}
        return unit.case.make(workload, unit.dtype, self.device, **options)

    def _measure_processes(self, unit: Unit, case: ProcessCase, seconds: float) -> None:
        found = case.measure(unit.workload, seconds)
        costs = dict.fromkeys(found.samples, UNCOUNTED)
        besides = rows.Besides(own=found.own, reduced=found.reduced)
        self._add(unit, found.samples, costs, 0, besides)

    def _add(
        self,
        unit: Unit,
        samples: Mapping[str, Sequence[Sample]],
        costs: Mapping[str, Cost],
        floor_bytes: int,
        besides: rows.Besides,
    ) -> None:
        labels = {
            **dict(zip(("case", "workload", "dtype"), unit.labels, strict=True)),
            "title": unit.case.title,
            "device": self.device.type,
        }
        made = rows.make_rows(labels, samples, costs, floor_bytes, self.copy.nbytes, besides)
        if made:
            wide = self.console.width >= _WIDE
            self.console.print(report.terminal_table(made, wide=wide))
        self.rows += made

    def _gate(self, unit: Unit, inputs: Inputs, names: Sequence[str]) -> dict[str, Prepared]:
        """The providers that give the reference's result."""
        case, passed = unit.case, {}
        for name in names:
            if name == PLAIN and case.kind != "training":
                continue
            reason = providers.why_not(name, case, unit.workload, self.device)
            if reason is not None:
                self.skipped.append(f"{unit}: {name}: {reason}")
                continue
            prepared = providers.prepare(name, case, inputs)
            prepared.restore()
            try:
                case.check(name, inputs, prepared.call())
            except ParityError as error:
                self._refuse(f"{unit}: {name} is wrong: {error}")
            except Exception as error:  # Whatever it is, the others go on.
                self._refuse(f"{unit}: {name} fails: {_first_line(error)}")
            else:
                passed[name] = prepared
        return passed

    def _beside(
        self,
        passed: Mapping[str, Prepared],
        quiet: Mapping[str, Sequence[Sample]],
        seconds: float,
        how: Mapping[str, Any],
    ) -> dict[str, list[Sample]]:
        """Samples beside a busy neighbour, of calls that are short enough."""
        medians = {name: statistics.median(s.device for s in quiet[name]) for name in passed}
        short = {name: p for name, p in passed.items() if medians[name] < _BUSY_MOST}
        with BusyNeighbour():
            least = dict.fromkeys(short, rows.LEAST_BUSY)
            return interleaved(short, self.clock, seconds, least=least, **how)

    def _host(
        self,
        unit: Unit,
        passed: Mapping[str, Prepared],
        samples: Mapping[str, Sequence[Sample]],
    ) -> dict[str, float]:
        """Seconds of the host in a call: on a GPU until it returns, else on next to no data."""
        if self.device.type != "cpu":
            return {name: statistics.median(s.host for s in samples[name]) for name in passed}
        # A call that is compiled for one shape would be compiled again, and a step is a network's.
        names = [name for name in passed if name != "compile" and unit.case.kind != "training"]
        if not names:
            return {}
        inputs = self._inputs(unit, tiny(unit.workload))
        calls = {name: providers.prepare(name, unit.case, inputs) for name in names}
        found = interleaved(calls, self.clock, _HOST_SECONDS * len(calls), cold=False, in_rows=True)
        return {name: statistics.median(s.host for s in each) for name, each in found.items()}

    def _replays(
        self,
        unit: Unit,
        inputs: Inputs,
        passed: Mapping[str, Prepared],
        costs: Mapping[str, Cost],
    ) -> dict[str, Prepared]:
        """The calls that can be recorded and whose replays give the reference's result."""
        if self.record is None:
            return {}
        case, found = unit.case, {}
        for name, prepared in passed.items():
            reason = replay.why_not(name, case, costs[name])
            if reason is None:
                try:
                    found[replay.name_of(name)] = replay.checked_replay(
                        name, case, inputs, prepared, self.record
                    )
                except ParityError as error:
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
    """The rest of CUDA's errors is advice."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def bytes_needed(workload: Workload, dtype: torch.dtype) -> int:
    """The memory that measuring on a workload takes, roughly."""
    kept = workload.elements * _COPIES + workload.pixels * _PER_PIXEL
    return kept * dtype.itemsize
