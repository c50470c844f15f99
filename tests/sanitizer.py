"""Runs every_kernel.py under the four tools of NVIDIA's compute-sanitizer, on a machine with a GPU.

    python tests/every_kernel.py --sanitizer --output build/sanitizer

Each tool's run leaves <tool>.log. Before memcheck and initcheck are believed, each has to report a
kernel that is misused on purpose (control-<tool>.log): a filter that fits no kernel, or memory that
PyTorch's allocator hands out again, would find nothing either. The other two have no such control.

- Only kernels with "mmfuse" in their names are looked at; PyTorch's own are slow to check and not
  ours. Triton's kernels have no such name, so that its run looks at all.
- initcheck has to see all kernels, because what an unseen one writes counts as uninitialised. Of
  its reports only those about our kernels fail the run.
- PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives each tensor memory of its own; in a cached block an access
  beyond a tensor's end is an access to the block. --padding keeps these apart.
- No --leak-check: PyTorch keeps its context and its handles until the process ends.
- In soft_histogram_kernel several threads may store one value, true, in `broken`. For racecheck a
  hazard of this kind is information, not an error.
- Built with NVCC_APPEND_FLAGS=-lineinfo, the logs name lines.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).with_name("every_kernel.py")
TIMEOUT_S = 3600


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


TOOLS = {
    "memcheck": Tool(("--error-exitcode", "1", "--padding", "512"), control=True),
    "racecheck": Tool(),
    "synccheck": Tool(),
    "initcheck": Tool(("--print-limit", "100000"), all_kernels=True, control=True),
}
FILTERS = {"cuda": ("--kernel-name", "kernel_substring=mmfuse"), "triton": ()}

# How a log calls our kernels.
OURS = {"cuda": re.compile(r"mmfuse"), "triton": re.compile(r"\b_\w+_kernel\b")}


class Outcome(NamedTuple):
    """What came of one run.

    Attributes:
        errors: What the tool has counted; None if its log has no summary.
        status: The exit status; None if the run took too long.
    """

    errors: int | None
    status: int | None

    @property
    def clean(self) -> bool:
        return self.errors == 0 and self.status == 0

    @property
    def reported(self) -> bool:
        return self.errors is not None and self.errors > 0

    def __str__(self) -> str:
        if self.status is None:
            return f"not finished after {TIMEOUT_S} s"
        errors = "no summary" if self.errors is None else f"{self.errors} errors"
        return f"{errors}, exit status {self.status}"


def find_sanitizer() -> str:
    """The path of compute-sanitizer.

    Raises:
        FileNotFoundError: it is neither on PATH nor in the CUDA toolkit's folder.
    """
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)
    if found is None:
        raise FileNotFoundError(
            f"compute-sanitizer is neither on PATH nor in {toolkit}; it comes with the CUDA "
            "toolkit, whose folder CUDA_HOME names"
        )
    return found


def command_of(sanitizer: str, tool: str, backend: str) -> list[str]:
    """The command line of one tool's run."""
    python = [sys.executable, str(SCRIPT), "--device", "cuda", "--backend", backend]
    kernels = () if TOOLS[tool].all_kernels else FILTERS[backend]
    return [sanitizer, "--tool", tool, *TOOLS[tool].options, *kernels, *python]


def errors_in(log: str) -> int | None:
    """The errors, and racecheck's warnings, of all summaries; None if there is no summary."""
    counts = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", log)]
    pattern = r"RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\)"
    counts += [int(e) + int(w) for e, w in re.findall(pattern, log)]
    return sum(counts) if counts else None


def reads_of_ours(log: str, backend: str) -> int | None:
    """The reports of initcheck about our kernels; None if there is no summary."""
    if errors_in(log) is None:
        return None
    reports = log.split("Uninitialized __global__ memory read")[1:]
    frames = [re.findall(r"^=+ +(?:at|Device Frame:) ?(.*)", r, re.MULTILINE) for r in reports]
    return sum(any(OURS[backend].search(frame) for frame in found) for found in frames)


def run_tool(command: list[str], tool: str, backend: str, log: Path) -> Outcome:
    """Runs a command line with all it prints in the log."""
    environment = dict(os.environ)
    if tool in ("memcheck", "initcheck"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    status: int | None
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
                timeout=TIMEOUT_S,
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    text = log.read_text(errors="replace")
    errors = reads_of_ours(text, backend) if tool == "initcheck" else errors_in(text)
    return Outcome(errors, status)


def main(output: Path, backend: str) -> int:
    """Runs all tools, prints a table, and returns the exit status: 0 if nothing was found."""
    try:
        sanitizer = find_sanitizer()
    except FileNotFoundError as error:
        print(f"sanitizer: {error}", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    failed = False
    for tool, use in TOOLS.items():
        command = command_of(sanitizer, tool, backend)
        control = "none"
        if use.control:
            log = output / f"control-{tool}.log"
            provoked = run_tool([*command, "--control", tool], tool, backend, log)
            control = "reported" if provoked.reported else f"NOT REPORTED ({provoked})"
            failed = failed or not provoked.reported
        outcome = run_tool(command, tool, backend, output / f"{tool}.log")
        failed = failed or not outcome.clean
        verdict = "clean" if outcome.clean else "FAILED"
        print(f"{tool:10} {verdict:7} {outcome}; control: {control}", flush=True)
    print(f"sanitizer: {'FAILED' if failed else 'nothing was found'}; the logs are in {output}")
    return 1 if failed else 0
