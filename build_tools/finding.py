"""Finds what a build needs: PyTorch, a C++ compiler, ninja. Nothing of PyTorch is imported."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OLDEST_TORCH = (2, 11)
COMPILERS = ("c++", "g++", "clang++")
SWITCHED_OFF = "switched off at build time by MMFUSE_NATIVE=0"
WAY_OUT = (
    "MMFUSE_CUDA=0 leaves the CUDA kernels out, MMFUSE_NATIVE=0 builds no kernels at all, "
    "MMFUSE_NATIVE=1 makes a failure an error."
)
# Shows a compiler without its standard library as broken, too.
_PROGRAM = "#include <vector>\nint main() { return static_cast<int>(std::vector<int>().size()); }\n"


class BuildError(SystemExit):
    """One sentence, without a traceback; `reason` is what `python -m mmfuse` shows later."""

    def __init__(self, sentence: str, reason: str | None = None) -> None:
        super().__init__(f"mmfuse: {sentence}")
        self.reason = reason or sentence


def mode(name: str) -> str:
    """MMFUSE_NATIVE or MMFUSE_CUDA: auto, 0 or 1."""
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise BuildError(f"{name} must be auto, 0 or 1, got {value!r}.")
    return value


def is_portable() -> bool:
    """True where MMFUSE_PORTABLE=1 asks for a wheel that others get."""
    value = os.environ.get("MMFUSE_PORTABLE") or "0"
    if value not in ("0", "1"):
        raise BuildError(f"MMFUSE_PORTABLE must be 0 or 1, got {value!r}.")
    return value == "1"


def jobs() -> int:
    """MAX_JOBS, or one per core but no more than memory allows (about 2 GiB a compiler)."""
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        try:
            return max(1, int(wanted))
        except ValueError:
            sentence = f"MAX_JOBS must be a number of compilers, such as 4, got {wanted!r}."
            raise BuildError(sentence) from None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if os.name == "posix" else 0
    return max(1, min(os.cpu_count() or 1, memory // 2**31 or 1))


def words(name: str) -> list[str]:
    """The words of CXX or CXXFLAGS; a path with spaces that is there is one word."""
    value = os.environ.get(name, "")
    if shutil.which(value):
        return [value]
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{name} cannot be read ({error}): {value!r}.") from None


def site_folders() -> Iterator[Path]:
    """Folders that this environment installs into or sees, also from a build in isolation."""
    yield from (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    settings = Path(sys.prefix) / "pyvenv.cfg"
    shared = r"^\s*include-system-site-packages\s*=\s*true\s*$"
    if not settings.is_file() or re.search(shared, settings.read_text(), re.M | re.I):
        # A container's PyTorch; Debian has several such folders.
        yield from map(Path, site.getsitepackages([sys.base_prefix, sys.base_exec_prefix]))
        yield Path(site.getusersitepackages())
    # The build's own environment.
    yield from (Path(folder or ".") for folder in sys.path)


def torch_version(torch: Path) -> str:
    """PyTorch's version, from its version file; empty where it does not say."""
    version = torch / "version.py"
    found = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", version.read_text(), re.M)
    return found[1] if found else ""


def find_torch() -> Path:
    """PyTorch's folder in the environment that is installed into, or in the build's own.

    Raises:
        BuildError: there is none that is new enough.
    """
    searched: dict[str, None] = {}
    for folder in site_folders():
        torch = folder / "torch"
        searched[str(folder)] = None
        if not (torch / "version.py").is_file():
            continue
        numbers = re.match(r"(\d+)\.(\d+)", torch_version(torch))
        if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
            searched[f"{folder}, which has {torch_version(torch)}"] = searched.pop(str(folder))
        elif (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return torch
    raise BuildError(
        f"PyTorch {'.'.join(map(str, OLDEST_TORCH))} or newer was not found (looked in "
        f"{'; '.join(searched)}); install torch first and then mmfuse, or set MMFUSE_NATIVE=0 to "
        "install without compiled kernels."
    )


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: CXX if set, else the first that exists; None without any.

    Raises:
        BuildError: CXX is set and there is no such program.
    """
    command = words("CXX")
    if command and shutil.which(command[0]) is None:
        raise BuildError(
            f"CXX={os.environ['CXX']}, but there is no program {command[0]!r}; set CXX to a C++ "
            f"compiler that exists, or unset it to look for {', '.join(COMPILERS)}."
        )
    return command or next(([name] for name in COMPILERS if shutil.which(name)), None)


def why_broken(compiler: list[str]) -> str | None:
    """Why a compiler, with CXXFLAGS, cannot compile a program of one line; None where it can.

    Raises:
        BuildError: it was set by CXX, or CXXFLAGS break it, which must not be ignored.
    """

    def first_error(flags: list[str]) -> str | None:
        command = [*compiler, "-std=c++17", *flags, "-fsyntax-only", "-x", "c++", "-"]
        try:
            done = subprocess.run(
                command, input=_PROGRAM, capture_output=True, text=True, check=False
            )
        except OSError as error:
            return str(error)
        if done.returncode == 0:
            return None
        said = [*done.stderr.splitlines(), f"it ended with {done.returncode}"]
        return next((line for line in said if "error" in line.lower()), said[0])

    reason = first_error(words("CXXFLAGS"))
    if reason is None:
        return None
    if words("CXXFLAGS") and first_error([]) is None:
        raise BuildError(
            f"CXXFLAGS={os.environ['CXXFLAGS']}, with which {shlex.join(compiler)} cannot compile "
            f"a program of one line: {reason}; set others, or unset it."
        )
    sentence = f"{shlex.join(compiler)} cannot compile a program of one line in C++17: {reason}"
    if words("CXX"):
        raise BuildError(
            f"CXX={os.environ['CXX']}, but {sentence}; set CXX to a C++ compiler that works, or "
            "unset it."
        )
    return sentence


def find_nvcc() -> str | None:
    """Nvcc from CUDA_HOME, the PATH or the usual place; torch's own search needs a CUDA torch."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        if (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def find_ninja() -> str | None:
    """A ninja that runs: from the PATH, beside this Python, or of the package of that name."""
    package = importlib.util.find_spec("ninja")
    folders = [Path(sysconfig.get_path("scripts")), Path(sys.executable).parent]
    if package is not None and package.origin is not None:
        folders.append(Path(package.origin).parent / "data" / "bin")
    named = [shutil.which("ninja"), shutil.which("ninja-build")]
    for path in [*named, *(shutil.which("ninja", path=str(folder)) for folder in folders)]:
        # The launcher of another environment is found on the PATH, but cannot run in isolation.
        if path and first_line([path, "--version"]):
            return path
    return None


def first_line(command: list[str]) -> str:
    """The first line that a program prints; empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0] if done.returncode == 0 else ""
