"""Runs every_kernel.py under the four tools of NVIDIA's compute-sanitizer, on a machine with a GPU.

    python tests/kernels/every_kernel.py --sanitizer --output build/sanitizer

Each tool looks at each case in a process of its own, several side by side: what takes long is the
tools' work on the host. Each leaves <tool>-<case>.log, and `failed.json` names what to run again.
Races and wrong addresses come first, in case the time does not last. Before memcheck and initcheck
are believed, each has to report a kernel that is misused on purpose (control-<tool>.log): a filter
that fits nothing, or memory that PyTorch's allocator hands out again, would find nothing either.
The other two have no such control.

- Only kernels with "mmfuse" in their names are looked at; PyTorch's own are slow to check and not
  ours. Triton's kernels have no such name, so that its run looks at all.
- initcheck has to see all kernels, because what an unseen one writes counts as uninitialised. Of
  its reports only those about our kernels fail the run, and reports that it did not print.
- PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives each tensor memory of its own; in a cached block an access
  beyond a tensor's end is an access to the block. --padding keeps these apart.
- No --leak-check: PyTorch keeps its context and its handles until the process ends.
- In soft_histogram_kernel several threads may store one value, true, in `broken`. For racecheck a
  hazard of this kind is information, not an error.
- Built with NVCC_APPEND_FLAGS=-lineinfo, the logs name lines.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from case_processes import Failed, Job, case_command, describe, last_lines, run_jobs
from processes import SKIPPED, Ended, cuda_tool


class Tool(NamedTuple):
    """How one of the tools is used.

    Attributes:
        options: Its command line.
        all_kernels: It has to see PyTorch's kernels too.
        control: every_kernel.py can provoke an error that it has to report.
    """

    options: tuple[str, ...] = ("--error-exitcode", "1")
    all_kernels: bool = False
    control: bool = False


# The tools in the order in which they run.
TOOLS = {
    "racecheck": Tool(),
    "memcheck": Tool(("--error-exitcode", "1", "--padding", "512"), control=True),
    "synccheck": Tool(),
    "initcheck": Tool(("--print-limit", "200"), all_kernels=True, control=True),
}
FILTERS = {"cuda": ("--kernel-name", "kernel_substring=mmfuse"), "triton": ()}

# How a log calls our kernels.
OURS = {"cuda": re.compile(r"mmfuse"), "triton": re.compile(r"\b_\w+_kernel\b")}


class Outcome(NamedTuple):
    """The end of one tool's run on one case.

    Attributes:
        errors: The tool's count; None if its log has no summary.
        ended: How it ended.
    """

    errors: int | None
    ended: Ended

    @property
    def clean(self) -> bool:
        return self.errors == 0 and self.ended.code == 0

    @property
    def reported(self) -> bool:
        return self.errors is not None and self.errors > 0

    def __str__(self) -> str:
        errors = "no summary" if self.errors is None else f"{self.errors} errors"
        return f"{errors}, {describe(self.ended)}"


def jobs_of(sanitizer: str, backend: str, cases: Sequence[str]) -> list[Job]:
    """The controls, then tool by tool; names are <tool>-<case> and control-<tool>."""
    controls, jobs = [], []
    for name, tool in TOOLS.items():
        kernels = () if tool.all_kernels else FILTERS[backend]
        start = [sanitizer, "--tool", name, *tool.options, *kernels]
        own_memory = name in ("memcheck", "initcheck")
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if own_memory else {}
        if tool.control:
            command = case_command("cuda", backend, cases[0], "--control", name)
            controls.append(Job(f"control-{name}", [*start, *command], environment))
        for case in cases:
            command = [*start, *case_command("cuda", backend, case)]
            jobs.append(Job(f"{name}-{case}", command, environment))
    return [*controls, *jobs]


def errors_in(log: str) -> int | None:
    """The errors, and racecheck's warnings, of all summaries; None if there is no summary."""
    counts = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", log)]
    pattern = r"RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\)"
    counts += [int(e) + int(w) for e, w in re.findall(pattern, log)]
    return sum(counts) if counts else None


def reads_of_ours(log: str, backend: str) -> int | None:
    """The reports of initcheck about our kernels, or not printed; None if there is no summary."""
    errors = errors_in(log)
    if errors is None:
        return None
    reports = log.split("Uninitialized __global__ memory read")[1:]
    frames = [re.findall(r"^=+ +(?:at|Device Frame:) ?(.*)", r, re.MULTILINE) for r in reports]
    ours = sum(any(OURS[backend].search(frame) for frame in found) for found in frames)
    return ours + max(0, errors - len(reports))


def outcome_of(job: Job, ended: Ended, backend: str, output: Path) -> Outcome:
    """Reads the log of a job that has run."""
    log = output / f"{job.name}.log"
    text = log.read_text(errors="replace") if log.is_file() else ""
    initcheck = "initcheck" in job.name
    return Outcome(reads_of_ours(text, backend) if initcheck else errors_in(text), ended)


def verdict(tool: str, outcomes: dict[str, Outcome]) -> tuple[bool, str]:
    """True if all is well with one tool, and a line of the table."""
    mine = {name: o for name, o in outcomes.items() if name.startswith(f"{tool}-")}
    bad = {name: o for name, o in mine.items() if not o.clean}
    control = outcomes.get(f"control-{tool}")
    found = f"{len(mine) - len(bad)} of {len(mine)} cases clean"
    well = not bad
    if control is not None:
        well = well and control.reported
        told = "reported" if control.reported else f"NOT REPORTED ({control})"
        found += f"; control: {told}"
    words = [f"{name.partition('-')[2]} ({o})" for name, o in bad.items()]
    line = f"{tool:10} {'clean' if not bad else 'FAILED':7} {found}"
    return well, "; ".join([line, *words])


def main(
    output: Path,
    backend: str,
    cases: Sequence[str],
    *,
    workers: int,
    seconds: float,
    limit_s: float,
    again: Path | None = None,
) -> int:
    """Runs all tools and prints a table.

    Args:
        output: Folder for the logs.
        backend: Whose kernels are looked at.
        cases: Names of cases of every_kernel.py.
        workers: How many processes run side by side.
        seconds: For all of them.
        limit_s: For one of them.
        again: `failed.json` of a run before, whose jobs alone run, with their controls.

    Returns:
        0 if nothing was found, 1 if something was or a tool did not come to its end, 77 without
        compute-sanitizer.
    """
    sanitizer = cuda_tool("compute-sanitizer")
    if sanitizer is None:
        print(
            "sanitizer: skipped, because compute-sanitizer is neither on PATH nor in the CUDA "
            "toolkit that CUDA_HOME names"
        )
        return SKIPPED
    jobs = jobs_of(sanitizer, backend, cases)
    if again is not None:
        wanted = json.loads(again.read_text())
        jobs = [job for job in jobs if job.name in wanted or job.name.startswith("control-")]
    outcomes: dict[str, Outcome] = {}
    failed = Failed(output)

    def done(job: Job, ended: Ended) -> None:
        found = outcomes[job.name] = outcome_of(job, ended, backend, output)
        control = job.name.startswith("control-")
        if not (found.reported if control else found.clean):
            lines = last_lines(output / f"{job.name}.log")
            print("\n".join([f"{job.name}: {found}", *lines]), flush=True)
            if not control:
                failed.add(job.name)

    end = time.monotonic() + seconds
    run_jobs(jobs, output, workers=workers, end=end, limit_s=limit_s, done=done)
    verdicts = [verdict(tool, outcomes) for tool in TOOLS]
    well = all(good for good, _ in verdicts)
    print("\n".join(line for _, line in verdicts))
    print(f"sanitizer: {'nothing was found' if well else 'FAILED'}; the logs are in {output}")
    return 0 if well else 1
