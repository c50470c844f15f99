"""`python -m mmfuse`: what is installed, how it was built, and which cells of the grid run."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from . import __version__, _native
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


def _devices() -> list[str]:
    """For each type of device: whether it has float64, and which backends serve all ops there."""
    own = torch.accelerator.current_accelerator()
    types = list(dict.fromkeys(["cpu", "cuda", "xpu", "mps", *([own.type] if own else [])]))
    lines = ["device".ljust(10) + "float64".ljust(10) + "backends"]
    for device_type in types:
        if not _is_here(device_type) and (own is None or own.type != device_type):
            lines.append(f"{device_type:<10}not here")
            continue
        serving = [
            backend
            for backend in BACKENDS
            if all(op.why_missing(backend, device_type) is None for op in OPS.values())
        ]
        wide = "yes" if has_float64(device_type) else "no"
        lines.append(f"{device_type:<10}{wide:<10}{', '.join(serving)}")
    return [*lines, "Any other type of device has the reference."]


def report() -> str:
    """The text that `python -m mmfuse` prints."""
    lines = [
        f"mmfuse   {__version__} in {Path(__file__).parent}",
        f"python   {platform.python_version()} on {platform.platform()}",
        f"torch    {torch.__version__}",
        f"triton   {_version('triton')}",
        f"threads  {torch.get_num_threads()}",
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append(f"cuda:{i}   {torch.cuda.get_device_name(i)} (sm_{major}{minor})")
            reason = _native.why_not_on((major, minor))
            if reason is not None:
                lines.append(f"         {reason}")
    else:
        lines.append("cuda     no device")
    lines += ["", "compiled libraries"]
    info = _native.build_info()
    if info is None:
        lines.append(f"  none: {_native.why_missing('cpu')}")
    else:
        lines += [f"  {key:<20} {value}" for key, value in info.items()]
    lines += ["", *_devices()]
    rows = list(grid())
    width = max(len(name) for name, _ in rows) + 2
    lines += ["", "op".ljust(width) + "".join(b.ljust(11) for b in BACKENDS)]
    reasons: dict[str, None] = {}
    for name, cells in rows:
        marks = "".join(("yes" if reason is None else "—").ljust(11) for reason in cells.values())
        lines.append((name.ljust(width) + marks).rstrip())
        reasons.update({f"{b}: {r}": None for b, r in cells.items() if r is not None})
    if reasons:
        lines += ["", "why a cell is off", *(f"  {reason}" for reason in reasons)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
