"""Builds mmfuse with the oldest packages that pyproject.toml names, and runs some of its tests.

`make bounds`, before a release. For each Python it makes an environment in build/bounds, which is
kept, with PyTorch and all else at the lower bound, or at the first release that has a wheel for
this Python; installs a copy of the checkout there, as a user does; and tests the contract of each
op with the reference and the C++ kernels, the methods' states, and OGM. A plain PyTorch for Linux
takes 5 GB for each Python; PIP_INDEX_URL or PIP_FIND_LINKS can name a smaller one. Exit code 1 if
something failed, 2 without one of the Pythons.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkout import copy_checkout

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "bounds"
PYTHONS = ("python3.10", "python3.13")
# The tests below import these, beside what the package itself needs.
PACKAGES = ("hypothesis", "numpy", "pytest", "pytest-timeout", "pytest-xdist", "scipy")
# The bound itself has no wheel for so new a Python.
FIRST_FOR = {"3.13": {"numpy": "2.1.0", "scipy": "1.14.1"}}
# The host shim for CUDA kernels has nothing to do with the bounds, and takes minutes to compile.
TESTS = (
    "tests/ops/test_op_contract.py",
    "tests/loop/test_resume.py",
    "tests/methods/test_ogm.py",
    "tests/test_main.py",
)
ONLY = "not cuda and not triton"


def lower_bounds(text: str) -> dict[str, str]:
    """Each package of a pyproject.toml, and its lower bound."""
    # Python 3.10 cannot read TOML.
    return dict(re.findall(r'"([A-Za-z][\w-]*)>=([\d.]+)"', text))


def pins(python: str, bounds: dict[str, str]) -> list[str]:
    """The requirements for a version of Python such as "3.13"."""
    chosen = {name: bounds[name] for name in ("torch", "typing_extensions", *PACKAGES)}
    chosen |= FIRST_FOR.get(python, {})
    return [f"{name}=={version}" for name, version in chosen.items()]


def starts(program: str) -> bool:
    """True if this program is a Python; a manager's link may be there and lead to none."""
    try:
        return subprocess.run([program, "-c", ""], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def all_start(target: str, programs: Sequence[str]) -> bool:
    """True if all of these Pythons start; names the first one that does not."""
    for program in programs:
        if not starts(program):
            print(f"{target} needs {program}, which is no Python that starts", file=sys.stderr)
            return False
    return True


def said(command: Sequence[object], cwd: Path) -> str:
    """The output of a command."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


def try_with(program: str) -> bool:
    """True if all works with this Python."""
    began = time.monotonic()
    version = said([program, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], ROOT)
    environment, checkout = OUTPUT / version, OUTPUT / f"checkout-{version}"
    copy_checkout(checkout)
    python = environment / "bin" / "python"
    requirements = pins(version, lower_bounds((ROOT / "pyproject.toml").read_text()))
    commands: list[list[object]] = [
        [python, "-m", "pip", "install", "--quiet", *requirements],
        # With isolation, as a user does: the build has to find the PyTorch of the environment.
        [python, "-m", "pip", "install", "--verbose", "--no-deps", "--editable", "."],
        [python, "-m", "mmfuse"],
        [python, "-m", "pytest", "-q", "-n", "2", "-m", "not slow", "-k", ONLY, *TESTS],
    ]
    if not python.exists():
        commands.insert(0, [program, "-m", "venv", environment])
    variables = {
        **os.environ,
        "MMFUSE_NATIVE": "1",
        "MMFUSE_CUDA": "0",
        "MMFUSE_REQUIRE_BACKENDS": "reference,cpu",
    }
    for command in commands:
        words = [str(word) for word in command]
        print(f"{version}: {' '.join(words[:6])} …", flush=True)
        if "pytest" in words:
            # The host shim for CUDA kernels would take minutes, and is left out by its tests.
            variables["CXX"] = "false"
        done = subprocess.run(words, cwd=checkout, env=variables, check=False)
        if done.returncode:
            print(f"bounds: Python {version}: failed: {' '.join(words)}", file=sys.stderr)
            return False
    seconds = time.monotonic() - began
    print(f"bounds: Python {version}: passed with {', '.join(requirements)} in {seconds:.0f} s")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Tries each Python, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", default=PYTHONS, help="programs, or their paths")
    pythons = parser.parse_args(argv).pythons
    if not all_start("make bounds", pythons):
        return 2
    OUTPUT.mkdir(parents=True, exist_ok=True)
    results = [try_with(program) for program in pythons]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
