"""The cases with an mmfuse that lacks an op, as compare.py has one of an earlier commit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = """
import sys
import mmfuse, mmfuse.reference
sys.modules["mmfuse.reference.progress_factors"] = None
vars(mmfuse.reference).pop("progress_factors", None)
{elsewhere}
from cases import CASES
print("update_scale" in CASES, "progress_factors" in CASES, "cggm_step" in CASES)
"""


def imported(elsewhere: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(elsewhere=elsewhere)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=BENCHMARKS
    )


def test_files_about_what_it_lacks_are_left_out_and_named() -> None:
    ended = imported("mmfuse.__file__ = '/elsewhere/mmfuse/__init__.py'")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "True False False\n"
    lines = [line for line in ended.stderr.splitlines() if line.startswith("cases: ")]
    assert [line.split(" is left out: ")[0] for line in lines] == [
        "cases: cggm",
        "cases: progress_factors",
    ]


def test_the_own_package_lacks_nothing() -> None:
    ended = imported("")
    assert ended.returncode == 1
    assert "mmfuse.reference.progress_factors halted" in ended.stderr.splitlines()[-1]
