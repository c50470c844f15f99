"""Runs every_kernel.py under the four tools of NVIDIA's compute-sanitizer, on a machine with a GPU.

    python tests/every_kernel.py --sanitizer --output build/sanitizer

Each tool's run leaves <tool>.log. Before memcheck and initcheck are believed, each has to report a
kernel that is misused on purpose (control-<tool>.log): a filter that fits no kernel, or memory that
PyTorch's allocator hands out again, would find nothing either. The other two have no such control.

- Only kernels whose name has "mmfuse" are looked at; PyTorch's own are slow to check and not ours.
  Triton's kernels have no common name, so that its run looks at all.
- PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives each tensor memory of its own; in a cached block an access
  beyond a tensor's end is an access to the block. --padding keeps these apart.
- No --leak-check: PyTorch keeps its context and its handles until the process ends.
- A racecheck hazard in which both threads write one value is no error; soft_histogram_kernel has
  one in `broken`, and compute-sanitizer does not print it by default.
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

# Options of each tool, and whether a control provokes an error that it has to report.
TOOLS = {
    "memcheck": (["--padding", "512"], True),
    "racecheck": ([], False),
    "synccheck": ([], False),
    "initcheck": ([], True),
}
KERNELS = {"cuda": ["--kernel-name", "kernel_substring=mmfuse"], "triton": []}


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
        return self.errors is not None and self.errors > 0 and self.status not in (0, None)

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
    options = ["--tool", tool, "--error-exitcode", "1", *TOOLS[tool][0], *KERNELS[backend]]
    return [sanitizer, *options, *python]


def errors_in(log: str) -> int | None:
    """The errors, and racecheck's warnings, of all summaries; None if there is no summary."""
    counts = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", log)]
    pattern = r"RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\)"
    counts += [int(e) + int(w) for e, w in re.findall(pattern, log)]
    return sum(counts) if counts else None


def run_tool(command: list[str], tool: str, log: Path) -> Outcome:
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
    return Outcome(errors_in(log.read_text(errors="replace")), status)


def main(output: Path, backend: str) -> int:
    """Runs all tools, prints a table, and returns the exit status: 0 if nothing was found."""
    try:
        sanitizer = find_sanitizer()
    except FileNotFoundError as error:
        print(f"sanitizer: {error}", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    failed = False
    for tool, (_, has_control) in TOOLS.items():
        command = command_of(sanitizer, tool, backend)
        control = "none"
        if has_control:
            provoked = run_tool([*command, "--control"], tool, output / f"control-{tool}.log")
            control = "reported" if provoked.reported else f"NOT REPORTED ({provoked})"
            failed = failed or not provoked.reported
        outcome = run_tool(command, tool, output / f"{tool}.log")
        failed = failed or not outcome.clean
        verdict = "clean" if outcome.clean else "FAILED"
        print(f"{tool:10} {verdict:7} {outcome}; control: {control}", flush=True)
    print(f"sanitizer: {'FAILED' if failed else 'nothing was found'}; the logs are in {output}")
    return 1 if failed else 0
