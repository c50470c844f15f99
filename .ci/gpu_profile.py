"""The profiling stage of `make gpu`: Nsight Compute on a few kernels, one pass of metrics.

The card's clocks are left as they are. A machine may refuse the hardware's counters: a probe of
five seconds on a tiny program says so before any time is spent. Exit code 77 then.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from processes import SKIPPED

PROBE_S = 5.0


def why_refused(profiler: str | None, probe: Path) -> str | None:
    """The reason why kernels cannot be profiled here, or None."""
    if profiler is None:
        return "ncu was not found on PATH"
    if not probe.is_file():
        return f"there is no {probe.name} to try it on"
    command = [profiler, "--clock-control", "none", "--metrics", "dram__bytes_read.sum"]
    # 65,536 words only.
    command += [str(probe), "65536"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_S, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"ncu took more than {PROBE_S:.0f} s for a tiny program"
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    errors = [line for line in lines if "ERROR" in line]
    if done.returncode != 0 or errors:
        return (errors or lines or [f"exit code {done.returncode}"])[-1]
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the profiler's exit code, or 77."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metrics", required=True)
    parser.add_argument("--probe", type=Path, required=True, help="a small program with a kernel")
    parser.add_argument("--calls", nargs="+", required=True, help="of profile_kernels.py")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    profiler = shutil.which("ncu")
    reason = why_refused(profiler, options.probe)
    if reason is not None:
        print(f"profile: skipped, because {reason}")
        return SKIPPED
    words = ["--clock-control", "none", "--csv", "--metrics", options.metrics]
    # PyTorch's own kernels are left out.
    words += ["--kernel-name-base", "demangled", "--kernel-name", "regex:mmfuse"]
    script = [sys.executable, "benchmarks/profile_kernels.py", "--device", options.device]
    command = [str(profiler), *words, *script, "--calls", *options.calls]
    code = subprocess.run(command, check=False).returncode
    print(f"profile: {'done' if code == 0 else f'exit code {code}'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
