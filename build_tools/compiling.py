"""Runs a recipe: by ninja, which compiles only what has changed, or all of it where there is none.

The folder of the objects stays from build to build. In it lie ninja's file, what each object is
made of (its command, source and all headers, those of the system too), and the tools' versions.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .finding import WAY_OUT, BuildError, find_ninja, jobs
from .recipe import Library

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_RULES = """\
rule compile
  command = $line
  depfile = $out.d
  deps = gcc
  description = $what
rule link
  command = $line
  description = $what
"""


def build_all(
    libraries: list[Library], optional: set[str], folder: Path, tools: str = ""
) -> dict[str, str]:
    """Compiles and links, and returns why an optional library did not build.

    Args:
        libraries: Those to build.
        optional: The names of those that may fail.
        folder: The folder of the objects, in which ninja keeps what it knows.
        tools: The versions of compilers and PyTorch; all is compiled anew where they change.

    Raises:
        BuildError: a library that is not optional failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    notes: dict[str, str] = {}
    with alone(folder):
        if ninja is None:
            print("mmfuse: without ninja all files are compiled each time", file=sys.stderr)
            return build_without_ninja(libraries, optional)
        write_if_new(folder / "tools.txt", tools)
        write_if_new(folder / "build.ninja", ninja_file(libraries, folder))
        command = [ninja, "-f", str(folder / "build.ninja"), "-j", str(jobs())]
        while left := [library for library in libraries if library.name not in notes]:
            failed = run_ninja([*command, *(str(library.path) for library in left)])
            if failed is None:
                break
            target, error = failed
            guilty = next((one for one in left if target in targets(one)), None)
            if guilty is None or guilty.name not in optional:
                raise error
            notes[guilty.name] = f"it did not build: {error.reason}"
    return notes


def targets(library: Library) -> set[str]:
    """The files that ninja makes for a library."""
    return {str(library.path), *(str(one.object) for one in library.compile)}


def ninja_file(libraries: list[Library], folder: Path) -> str:
    """The text of build.ninja."""
    lines = ["ninja_required_version = 1.5", f"builddir = {escaped(folder)}", _RULES]

    def add(rule: str, made: Path, of: Iterable[Path], command: list[str], what: str) -> None:
        inputs = " ".join(escaped(path) for path in of)
        lines.append(f"build {escaped(made)}: {rule} {inputs} | {escaped(folder / 'tools.txt')}")
        lines.append(f"  line = {shlex.join(command).replace('$', '$$')}")
        lines.append(f"  what = {what}")

    for library in libraries:
        for one in library.compile:
            what = f"{library.name}: {one.source.name}"
            add("compile", one.object, [one.source], one.command, what)
        objects = [one.object for one in library.compile]
        add("link", library.path, objects, library.link, f"{library.name}: {library.path.name}")
    return "\n".join(lines) + "\n"


def escaped(path: Path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def write_if_new(path: Path, text: str) -> None:
    """Leaves the file's time as it is where the text is the same."""
    # Paths need not be text in any encoding.
    data = os.fsencode(text)
    if not path.exists() or path.read_bytes() != data:
        path.write_bytes(data)


def run_ninja(command: list[str]) -> tuple[str, BuildError] | None:
    """Shows what ninja prints; returns the first target that failed, and the error."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True, file=sys.stderr)
        said.append(line.rstrip("\n"))
    if process.wait() == 0:
        return None
    for number, line in enumerate(said):
        found = re.match(r"FAILED: (?:\[code=\d+\] )?(.*\S)", line)
        if found:
            # The command follows, and then all that it printed, until ninja speaks again.
            printed = []
            for later in said[number + 2 :]:
                if re.match(r"\[\d+/\d+\] |FAILED: |ninja: build stopped", later):
                    break
                printed.append(later)
            return found[1], compiler_error(printed)
    return "", BuildError(f"ninja failed: {said[-1] if said else shlex.join(command)}")


def compiler_error(printed: list[str]) -> BuildError:
    """The error of a command, which has been shown with all that it printed, and the way out."""
    first = next((line for line in printed if "error" in line.lower()), "".join(printed[:1]))
    return BuildError(f"the command above failed: {first}; {WAY_OUT}", first)


def build_without_ninja(libraries: list[Library], optional: set[str]) -> dict[str, str]:
    """The same as `build_all`, and everything is compiled."""
    notes = {}
    with ThreadPoolExecutor(jobs()) as pool:
        started = [
            [pool.submit(run_compiler, one.command) for one in library.compile]
            for library in libraries
        ]
        for library, objects in zip(libraries, started, strict=True):
            try:
                for one in objects:
                    one.result()
                run_compiler(library.link)
            except BuildError as error:
                if library.name not in optional:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                for one in objects:
                    one.cancel()
                notes[library.name] = f"it did not build: {error.reason}"
    return notes


def run_compiler(command: list[str]) -> None:
    """Runs one compiler; what it prints is what the user needs when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        printed = done.stderr or done.stdout
        print(f"FAILED: {shlex.join(command)}\n{printed}", file=sys.stderr)
        raise compiler_error(printed.splitlines())
    if done.stderr:
        print(done.stderr, file=sys.stderr)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits while another build has the folder."""
    with (folder / "lock").open("w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"mmfuse: another build uses {folder}; waiting for it", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks
        yield
