"""The report of a `make gpu`: a summary, and one archive of all that its stages have written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from processes import SKIPPED
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = "results.tar.gz"
# A machine that is lent may give back files of a limited size only.
ARCHIVE_BYTES = 15 * 2**20
# Rewriting it costs time on the host while something is being measured.
PACK_EVERY_S = 5.0
# Caches, programs and the like help nobody.
LEFT_OUT = ("cache", "all_words")


@dataclass(frozen=True)
class Outcome:
    """How a stage ended; `code` is None where it did not end in time."""

    name: str
    code: int | None
    seconds: float
    gist: str

    @property
    def good(self) -> bool:
        """True if it passed, or there was nothing to do it with."""
        return self.code in (0, SKIPPED)

    @property
    def word(self) -> str:
        """The line for the summary."""
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s" if self.seconds else "no time left"
        words = {0: "passed", SKIPPED: "skipped"}
        return words.get(self.code, f"failed (exit code {self.code})")


def targets(scratch: Path) -> list[str]:
    """The targets and the figures reached; no line before there are results."""
    results = [scratch / name / "results.csv" for name in ("speed", "training")]
    found = [str(path) for path in results if path.is_file()]
    if not found:
        return []
    command = [sys.executable, "benchmarks/targets.py", *found]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
        )
    except subprocess.TimeoutExpired:
        return ["targets.py did not end in time."]
    return (done.stdout or done.stderr).splitlines()


class Report:
    """Writes `summary.md` and the archive again whenever there is something new.

    Args:
        output: The folder for the two.
        scratch: The folder that goes into the archive.
        environment: Of the machine, for the summary.
    """

    def __init__(self, output: Path, scratch: Path, environment: Mapping[str, str]) -> None:
        self.outcomes: list[Outcome] = []
        self._output = output
        self._scratch = scratch
        self._environment = environment
        self._began = time.monotonic()
        self._packed: dict[Path, tuple[int, int]] = {}
        self._packed_at = 0.0
        # Stages that run side by side each call `pack`.
        self._lock = threading.Lock()
        self.left_out: list[str] = []

    def write(self) -> None:
        """Both files."""
        (self._scratch / "environment.json").write_text(json.dumps(self._environment, indent=2))
        self.pack(force=True)
        (self._output / "summary.md").write_text("\n".join(self._lines()) + "\n")

    def _lines(self) -> list[str]:
        """The summary."""
        lines = ["# `make gpu`", ""]
        lines += [f"- {key}: {value}" for key, value in self._environment.items()]
        lines += ["", "| stage | outcome | seconds | |", "|---|---|--:|---|"]
        for o in self.outcomes:
            gist = o.gist.replace("|", "\\|")
            lines.append(f"| {o.name} | {o.word} | {o.seconds:.0f} | {gist} |")
        lines += ["", f"{time.monotonic() - self._began:.0f} s in all."]
        if self.left_out:
            lines += ["", f"Too large for the archive: {', '.join(self.left_out)}."]
        found = targets(self._scratch)
        return [*lines, "", *found] if found else lines

    def pack(self, *, force: bool = False) -> None:
        """Rewrites the archive if a file has changed, but not too often."""
        with self._lock:
            now = time.monotonic()
            if not force and now - self._packed_at < PACK_EVERY_S:
                return
            files = dict(self._files())
            if not force and files == self._packed:
                return
            self._packed, self._packed_at = files, now
            self._write_archive(files)

    def _write_archive(self, files: Mapping[Path, tuple[int, int]]) -> None:
        kept = sorted(files, key=files.__getitem__)
        self.left_out = []
        partial = self._output / f"{ARCHIVE}.part"
        while True:
            with tarfile.open(partial, "w:gz", compresslevel=1) as archive:
                for path in kept:
                    _add(archive, path, f"gpu/{path.relative_to(self._scratch)}")
            if partial.stat().st_size <= ARCHIVE_BYTES or not kept:
                break
            largest = kept.pop()
            self.left_out.append(str(largest.relative_to(self._scratch)))
        os.replace(partial, self._output / ARCHIVE)

    def _files(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        for folder, folders, names in os.walk(self._scratch):
            folders[:] = [name for name in folders if name not in LEFT_OUT]
            for name in names:
                if name in LEFT_OUT:
                    continue
                path = Path(folder) / name
                try:
                    found = path.stat()
                except FileNotFoundError:
                    continue  # written under another name in the meantime
                yield path, (found.st_size, found.st_mtime_ns)


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """Adds a file that may be written, or go away, at the same time."""
    with contextlib.suppress(FileNotFoundError):
        data = path.read_bytes()
        entry = tarfile.TarInfo(name)
        entry.size, entry.mtime = len(data), int(time.time())
        archive.addfile(entry, io.BytesIO(data))


def show(outcomes: Sequence[Outcome]) -> None:
    """Prints the table."""
    table = Table(box=None)
    for name in ("stage", "outcome", "seconds", ""):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for o in outcomes:
        table.add_row(o.name, o.word, f"{o.seconds:.0f}", o.gist)
    Console().print(table, markup=False)
