"""Facts that the numbers depend on: machine, versions, build, commit."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

import mmfuse
from mmfuse import _native

# The folder of the package that is measured, which need not be this checkout's.
_ROOT = Path(mmfuse.__file__).resolve().parents[1]
#: The fact that says how much of the CPU other processes took.
LOAD = "CPU taken by others"
SAME_SOURCES = "the checkout's sources"


def machine_model(device: torch.device) -> str:
    """Marketing name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def folder_name(model: str) -> str:
    """The model as a folder name: lower case, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-") or "unknown"


def available_bytes(device: torch.device) -> float:
    """Memory that is free for the benchmark; infinite where the system does not say."""
    if device.type == "cuda":
        # Memory that PyTorch's allocator holds unused is free as well.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else float("inf")


class Bystanders:
    """How much of the CPU other processes have taken since this object was made.

    If they take any, PyTorch's OpenMP threads wait for a thread that does not run, and times are
    milliseconds off per operator; a reader must know.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """Between 0 and 1; None where the system does not say."""
        if self._start is None:
            return None
        busy, own, wall = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return min(1.0, max(0.0, busy - own) / (wall * (os.cpu_count() or 1)))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of all processes on all cores, of this one and its children, and of the clock."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]), time.monotonic()


def describe(device: torch.device) -> dict[str, str]:
    """One line for everything that the numbers depend on."""
    lines = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{device.type}: {machine_model(device)}",
        "CPU": f"{machine_model(torch.device('cpu'))}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "PyTorch": torch.__version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "mmfuse": f"{mmfuse.__version__}, {_described()}",
    }
    info = _native.build_info()
    if info is None:
        lines["compiled library"] = "none"
    else:
        lines["compiled library"] = f"{info['compiler']} {info['flags']}"
        lines["library built from"] = str(built_from())
        lines["SIMD level"] = f"{info['simd']} of {', '.join(info['simd_built'])}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        lines["CUDA"] = f"{torch.version.cuda}, sm_{major}{minor}"
    return lines


def digest(folder: Path) -> str:
    """The digest of sources, by this checkout's build tools: the package may be an older one's."""
    path = Path(__file__).resolve().parents[2] / "build_tools" / "sources.py"
    spec = importlib.util.spec_from_file_location("build_tools_sources", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.digest(folder))


def built_from() -> str | None:
    """The sources that the compiled library was built from, in a few words; None without one."""
    if _native.build_info() is None:
        return None
    try:
        notes = json.loads((_ROOT / "mmfuse" / "_build.json").read_text(encoding="utf-8"))
        found = notes["sources"]
    except (OSError, ValueError, KeyError):
        return "sources that it does not name"
    if (_ROOT / "csrc").is_dir() and digest(_ROOT / "csrc") == found:
        return SAME_SOURCES
    return f"other sources ({found})"


def commit() -> str | None:
    """The first ten digits of the package's commit; None outside of a git checkout."""
    return _git("rev-parse", "--short=10", "HEAD") or None


def changed_files() -> list[str]:
    """Files of the package's checkout that differ from its commit, but results."""
    listed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return [line[3:] for line in (listed or "").splitlines()]


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip()


def _described() -> str:
    """Commit of the checkout, marked when files differ from it."""
    found = commit()
    if found is None:
        return "not in a git checkout"
    return f"commit {found}{'-dirty' if changed_files() else ''}"
