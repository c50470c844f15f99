"""Commands with a time limit, whose processes all end with it and whose logs stay small.

A test runner, a sanitizer or a profiler starts processes of its own. If only the command itself
were killed, these would live on, disturb whatever is measured next, and keep what they had found.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Exit code of a command that has nothing to do its work with.
SKIPPED = 77
# How long an interrupted command may take to say what it has found.
GRACE_S = 10.0
# The part of each log that is kept: a flood of output fills neither the disk nor an archive.
HEAD_BYTES = 2**18
TAIL_BYTES = 2**20

_groups: set[int] = set()
_ending = threading.Event()
_numbers = itertools.count()


class Log:
    """The beginning and the end of an output.

    Args:
        path: Of the file that `write` writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0
        self._lock = threading.Lock()
        self._changed = True

    def add(self, data: bytes) -> None:
        """Appends to the output."""
        with self._lock:
            room = HEAD_BYTES - len(self._head)
            self._head += data[:room]
            self._tail += data[room:] if room > 0 else data
            # Cut seldom, so that a flood is not copied again with each piece.
            if len(self._tail) > 2 * TAIL_BYTES:
                self._cut()
            self._changed = True

    def _cut(self) -> None:
        excess = len(self._tail) - TAIL_BYTES
        if excess > 0:
            self._dropped += excess
            del self._tail[:excess]

    def text(self) -> str:
        """The output, or its ends with a line between them that says how much is missing."""
        with self._lock:
            self._cut()
            between = b""
            if self._dropped:
                between = f"\n[... {self._dropped} bytes left out ...]\n".encode()
            return bytes(self._head + between + self._tail).decode(errors="replace")

    def write(self) -> None:
        """Writes the file, if there is something new."""
        if self._changed:
            self._changed = False
            self.path.write_text(self.text())


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code; negative for a signal; None if its time was over.
        seconds: How long it took.
    """

    code: int | None
    seconds: float


def run(
    command: Sequence[str],
    log: Path,
    seconds: float,
    *,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    tick: Callable[[], None] = lambda: None,
    tick_s: float = 1.0,
) -> Ended:
    """Runs a command in a session of its own, with all it prints in the log.

    After `seconds` its process group is interrupted, so that it can still report, and killed
    `GRACE_S` later. No process that it has started outlives the call: those that are in groups of
    their own, as this function's are, have a variable of the environment that names the call.

    Args:
        command: Words.
        log: The file for its output; it holds what has come so far at every tick.
        seconds: The limit.
        environment: Added to this process's.
        cwd: The folder it runs in.
        tick: Called about every `tick_s` seconds while the command runs.
        tick_s: See there.
    """
    output = Log(log)
    output.write()
    began = time.monotonic()
    if _ending.is_set():
        return Ended(None, 0.0)
    mark = f"MMFUSE_CALL_{os.getpid()}_{next(_numbers)}"
    try:
        process = subprocess.Popen(
            list(command),
            cwd=cwd,
            env={**os.environ, **(environment or {}), mark: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        output.add(f"{command[0]}: {error.strerror}\n".encode())
        output.write()
        return Ended(127, 0.0)
    _groups.add(process.pid)
    if _ending.is_set():  # since the question above, and `end_all` has not seen this group
        _signal(process.pid, signal.SIGKILL)
    reader = threading.Thread(target=_read, args=(process, output), daemon=True)
    reader.start()
    try:
        code = _wait(process, began + seconds, output, tick, tick_s)
        if code is None:
            _signal(process.pid, signal.SIGINT)
            _wait(process, time.monotonic() + GRACE_S, output, tick, tick_s)
    finally:
        _signal(process.pid, signal.SIGKILL)
        process.wait()
        _kill_marked(mark)
        _groups.discard(process.pid)
        # A process that has left the group may hold the pipe open for ever.
        reader.join(timeout=2.0)
        output.write()
    return Ended(code, time.monotonic() - began)


def cuda_tool(name: str) -> str | None:
    """The path of a program from PATH or the CUDA toolkit's folder."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which(name) or shutil.which(name, path=toolkit)


def importing_checkout() -> dict[str, str]:
    """The environment in which Python imports this checkout's package first."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def end_all() -> None:
    """Kills every group that `run` has started here, and lets it start no further one."""
    _ending.set()
    for group in list(_groups):
        _signal(group, signal.SIGKILL)


def _wait(
    process: subprocess.Popen[bytes],
    end: float,
    output: Log,
    tick: Callable[[], None],
    tick_s: float,
) -> int | None:
    """The exit code, or None if there is none at the end."""
    while True:
        left = end - time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(max(0.0, min(tick_s, left)))
        if left <= tick_s:
            return None
        output.write()
        tick()


def _read(process: subprocess.Popen[bytes], output: Log) -> None:
    assert process.stdout is not None
    with process.stdout:
        while data := os.read(process.stdout.fileno(), 2**16):
            output.add(data)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _kill_marked(mark: str) -> None:
    """Kills all processes whose environment has the variable, until there is none."""
    end = time.monotonic() + GRACE_S  # a process that waits for a device may not end at all
    while (found := _marked(mark)) and time.monotonic() < end:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _marked(mark: str) -> list[int]:
    """A process that has ended has no environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # Other users' processes cannot be read, and any may end in between.
        with contextlib.suppress(OSError):
            if f"\0{mark}=".encode() in b"\0" + (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def is_alive(pid: int) -> bool:
    """A process that has ended and was not waited for is none."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def has_ended(pid: int) -> bool:
    end = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_alive(pid)
