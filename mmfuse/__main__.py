"""`python -m mmfuse`: what is installed, how it was built, and which cells of the grid run."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, _native
from ._check import Checked, check
from ._devices import has_float64
from .ops._registry import BACKENDS, OPS, grid


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _is_here(device_type: str) -> bool:
    if device_type == "cpu":
        return True
    module = getattr(torch.backends if device_type == "mps" else torch, device_type, None)
    return module is not None and bool(module.is_available())


def _devices() -> dict[str, dict[str, Any] | None]:
    """Each type of device: whether it has float64, and which backends serve all ops there."""
    own = torch.accelerator.current_accelerator(check_available=True)
    types = list(dict.fromkeys(["cpu", "cuda", "xpu", "mps", *([own.type] if own else [])]))
    found: dict[str, dict[str, Any] | None] = {}
    for device_type in types:
        if not _is_here(device_type) and (own is None or own.type != device_type):
            found[device_type] = None
            continue
        serving = [
            backend
            for backend in BACKENDS
            if all(op.why_missing(backend, device_type) is None for op in OPS.values())
        ]
        found[device_type] = {"float64": has_float64(device_type), "backends": serving}
    return found


def _commit() -> str | None:
    """The commit of the checkout that was imported, which may be newer than what was built."""
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    # No tag matches, so that the commit alone is described.
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=9"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _gpus() -> list[dict[str, Any]]:
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        name, why_not = torch.cuda.get_device_name(i), _native.why_not_on((major, minor))
        found.append({"name": name, "capability": f"sm_{major}{minor}", "why_not": why_not})
    return found


def facts() -> dict[str, Any]:
    """All that `python -m mmfuse` shows, for `--json`."""
    return {
        "mmfuse": __version__,
        "folder": str(Path(__file__).parent),
        "commit": _commit(),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "libraries": _native.build_info(),
        "why_no_libraries": _native.why_missing("cpu"),
        "devices": _devices(),
        "ops": dict(grid()),
    }


def report(found: dict[str, Any] | None = None) -> str:
    """The text that `python -m mmfuse` prints."""
    found = facts() if found is None else found
    lines = [f"mmfuse   {found['mmfuse']} in {found['folder']}"]
    if found["commit"] is not None:
        lines.append(f"commit   {found['commit']}")
    lines += [f"{key:<9}{found[key]}" for key in ("python", "torch", "triton", "threads")]
    for i, gpu in enumerate(found["gpus"]):
        lines.append(f"cuda:{i}   {gpu['name']} ({gpu['capability']})")
        if gpu["why_not"] is not None:
            lines.append(f"         {gpu['why_not']}")
    if not found["gpus"]:
        lines.append("cuda     no device")
    lines += ["", "compiled libraries"]
    if found["libraries"] is None:
        lines.append(f"  none: {found['why_no_libraries']}")
    else:
        lines += [f"  {key:<20} {value}" for key, value in found["libraries"].items()]
    lines += ["", "device".ljust(10) + "float64".ljust(10) + "backends"]
    for device_type, can in found["devices"].items():
        if can is None:
            lines.append(f"{device_type:<10}not here")
        else:
            wide = "yes" if can["float64"] else "no"
            lines.append(f"{device_type:<10}{wide:<10}{', '.join(can['backends'])}")
    lines += ["Any other type of device has the reference.", ""]
    width = max(map(len, found["ops"])) + 2
    lines.append("op".ljust(width) + "".join(b.ljust(11) for b in BACKENDS).rstrip())
    reasons: dict[str, None] = {}
    for name, cells in found["ops"].items():
        marks = "".join(("yes" if reason is None else "—").ljust(11) for reason in cells.values())
        lines.append((name.ljust(width) + marks).rstrip())
        reasons.update({f"{b}: {r}": None for b, r in cells.items() if r is not None})
    if reasons:
        lines += ["", "why a cell is off", *(f"  {reason}" for reason in reasons)]
    return "\n".join(lines)


def check_text(checked: Sequence[Checked]) -> str:
    """The text of `--check`: what is wrong, and how many are right."""
    wrong = [one for one in checked if one.problem is not None]
    lines = [f"{one.op} on {one.backend} ({one.device}): {one.problem}" for one in wrong]
    pairs = dict.fromkeys((one.backend, one.device) for one in checked)
    for backend, device in pairs:
        own = [one for one in checked if (one.backend, one.device) == (backend, device)]
        right = [one.error or 0.0 for one in own if one.problem is None]
        worst = f", largest error {max(right):.1e}" if right else ""
        lines.append(
            f"{backend} on {device}: {len(right)} of {len(own)} operators agree with the "
            f"reference{worst}"
        )
    if not checked:
        lines.append("no backend but the reference runs here: there is nothing to compare")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; 1 if an operator is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m mmfuse",
        description="Shows the installation, its build, and which backend runs which operator.",
        epilog="For a report of a bug: python -m mmfuse --check",
    )
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.add_argument(
        "--check",
        action="store_true",
        help="also compare every operator of every backend here with the reference; seconds",
    )
    options = parser.parse_args(arguments)
    found = facts()
    checked = list(check()) if options.check else []
    if options.json:
        found |= {"checked": [one._asdict() for one in checked]} if options.check else {}
        print(json.dumps(found, indent=2))
    else:
        print(report(found))
        if options.check:
            print(f"\ncheck\n{check_text(checked)}")
    return int(any(one.problem is not None for one in checked))


if __name__ == "__main__":
    sys.exit(main())
