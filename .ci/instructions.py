"""Counts what the host does for a step of each method and for each small op: a gate without noise.

    python .ci/instructions.py              says what is dearer or cheaper than it was; exit code 1
    python .ci/instructions.py OGM ops.     of the calls whose names begin so
    python .ci/instructions.py --update     writes the numbers of now; the commit says why

Of each call of tests/support/counted.py it counts instructions, under Valgrind's callgrind and in
one thread, Python frames, operators that PyTorch dispatches, and kernels that a GPU would launch.
.ci/instructions.json holds the numbers, and which interpreter, PyTorch, compiler and processor they
are of: where these are others, numbers that depend on them are not compared, and a line says so. A
lower number counts as well: beside one that is too high, the next loss would go unnoticed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

# The checkout, whether or not mmfuse is installed, and what the tests share.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))

import counted
from every_kernel import load_shim

from mmfuse import _native

NUMBERS = Path(__file__).with_name("instructions.json")
# The least of several times: some calls grow a table or find an address that hashes badly.
TIMES = 7
# A count may be off by this. The least of seven differs by up to 0.85 %; the rest is exact.
BAND = 0.02
# Each kind of number depends on these beside the code; a kind that is missing here, on nothing.
DEPENDS = {
    "instructions": ("python", "torch", "compiler", "libc", "valgrind", "processor"),
    "frames": ("python", "torch"),
    "operators": ("torch",),
    "launches": ("torch",),
}

# The interpreter is entered between the two requests, so that nothing else is counted.
REQUESTS = """
#include <valgrind/callgrind.h>
extern "C" void* PyObject_CallNoArgs(void*);
extern "C" void begin() { CALLGRIND_START_INSTRUMENTATION; }
extern "C" void end() { CALLGRIND_STOP_INSTRUMENTATION; }
extern "C" void* count(void* call, const char* name) {
  CALLGRIND_ZERO_STATS;
  void* result = PyObject_CallNoArgs(call);
  CALLGRIND_DUMP_STATS_AT(name);
  return result;
}
"""

Numbers = dict[str, dict[str, int]]


class NotCountedError(Exception):
    """One sentence: why some numbers cannot be had here."""


def environment() -> dict[str, str]:
    """Everything that instructions depend on; Valgrind's processor is one without AVX-512."""
    tool = shutil.which("valgrind")
    version = "none"
    if tool is not None:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
        version = done.stdout.strip().removeprefix("valgrind-")
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    vendor = re.search(r"^vendor_id\s*: (\w+)", described, re.MULTILINE)
    simd = " AVX2" if re.search(r"^flags\s*:.* avx2 ", described, re.MULTILINE) else ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": (_native.build_info() or {}).get("compiler") or "none",
        "libc": " ".join(platform.libc_ver()),
        "valgrind": version,
        "processor": f"{platform.machine()} {vendor[1] if vendor else ''}{simd}",
    }


def under_valgrind(library: str, names: Sequence[str]) -> None:
    """Has each call counted `TIMES` times; callgrind writes a file for each time."""
    requests = ctypes.PyDLL(library)
    requests.count.restype = ctypes.py_object
    requests.count.argtypes = [ctypes.py_object, ctypes.c_char_p]
    torch.set_num_threads(1)
    for name in names:
        call = counted.made(name)
        gc.collect()
        gc.disable()
        requests.begin()
        for time in range(-2, TIMES):  # `least` leaves out the first two, when callgrind warms up
            call.prepare()
            requests.count(call.once, f"{name}:{time}".encode())
        requests.end()
        gc.enable()
    # An interpreter that ends in peace takes long here.
    os._exit(0)


def instructions(names: Sequence[str]) -> dict[str, int]:
    """The least instructions of a call, in a process under Valgrind.

    Raises:
        NotCountedError: there is no Valgrind, or its header or the compiler is missing.
    """
    if shutil.which("valgrind") is None:
        raise NotCountedError("valgrind is not installed")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "requests.cpp"), Path(folder, "requests.so")
        source.write_text(REQUESTS)
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        command = [*compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise NotCountedError(f"{compiler[0]} does not compile valgrind/callgrind.h")
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, __file__]
        command += ["--under-valgrind", str(library), *names]
        alone = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env={**os.environ, **alone}, capture_output=True, text=True, check=False
        )
        found = least(path.read_text() for path in Path(folder).glob("out.*"))
        if done.returncode or set(found) != set(names):
            raise RuntimeError(f"under valgrind:\n{done.stderr[-3000:]}")
        return found


def least(dumps: Iterable[str]) -> dict[str, int]:
    """The least total of each call, of callgrind's files."""
    found: dict[str, list[int]] = {}
    for dump in dumps:
        trigger = re.search(r"^desc: Trigger: Client Request: (.*):(\d+)$", dump, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", dump, re.MULTILINE)
        if trigger is not None and total is not None:
            found.setdefault(trigger[1], []).append(int(total[1]))
    return {name: min(totals) for name, totals in found.items()}


def launches(names: Sequence[str]) -> dict[str, int]:
    """Kernels of each call, in the host shim of the CUDA kernels.

    Raises:
        NotCountedError: it does not build, or a GPU's library is loaded in its place.
    """
    if torch.cuda.is_available():
        raise NotCountedError("the kernels run on the GPU here, not in the host shim")
    try:
        load_shim()
    except RuntimeError as error:
        raise NotCountedError("the host shim of the CUDA kernels does not build") from error
    return {name: counted.launches(name) for name in names}


# Each counts, or says why it cannot. Frames come first: PyTorch's backward pass enters more of them
# in a process that has looked at its operators.
COUNTERS: dict[str, Callable[[Sequence[str]], dict[str, int]]] = {
    "frames": lambda names: {name: counted.frames(name) for name in names},
    "operators": lambda names: {name: counted.operators(name) for name in names},
    "launches": launches,
    "instructions": instructions,
}


def measured(names: Sequence[str], kinds: Sequence[str]) -> tuple[Numbers, list[str]]:
    """The numbers of these kinds, by call, and a line for each kind that could not be counted."""
    numbers: Numbers = {name: {} for name in names}
    lines = []
    for kind in kinds:
        try:
            for name, number in COUNTERS[kind](names).items():
                numbers[name][kind] = number
        except NotCountedError as error:
            lines.append(f"{kind}: not counted, {error}")
    return numbers, lines


def comparable(kept: Mapping[str, str], here: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The kinds of numbers that can be compared, and a line for those that cannot."""
    kinds, lines = [], []
    for kind in COUNTERS:
        other = [key for key in DEPENDS[kind] if kept[key] != here[key]]
        if not other:
            kinds.append(kind)
            continue
        differs = ", ".join(f"{key} {here[key]} instead of {kept[key]}" for key in other)
        lines.append(f"{kind}: not compared, {differs}")
    return kinds, lines


def same(kind: str, kept: int, now: int) -> bool:
    """True if a number counts as the one that was kept."""
    return abs(now - kept) <= (BAND * kept if kind == "instructions" else 0)


def changes(kept: Numbers, now: Numbers) -> list[str]:
    """A line for each number that is another one, or that nobody has kept."""
    lines = []
    for name, kinds in now.items():
        for kind, number in kinds.items():
            old = kept.get(name, {}).get(kind)
            if old is None:
                lines.append(f"{name}: new, {number:,} {kind}")
            elif not same(kind, old, number):
                way = "dearer" if number > old else "cheaper"
                share = f" ({100 * (number / old - 1):+.1f} %)" if old else ""
                lines.append(f"{name}: {way}, {number:,} {kind} instead of {old:,}{share}")
    return lines


def merged(kept: Numbers, now: Numbers) -> Numbers:
    """The numbers of now; those that count as the same stay, so that a commit shows the others."""
    found: Numbers = {}
    for name, kinds in now.items():
        old = kept.get(name, {})
        found[name] = {
            kind: old[kind] if kind in old and same(kind, old[kind], number) else number
            for kind, number in kinds.items()
        }
    return found


def update(path: Path, here: Mapping[str, str]) -> int:
    """Writes all numbers of now."""
    now, missing = measured(list(counted.CALLS), list(COUNTERS))
    if missing:
        print("\n".join([*missing, "nothing was written: all numbers are of one environment"]))
        return 1
    kept = json.loads(path.read_text()) if path.exists() else {"environment": {}, "calls": {}}
    calls = merged(kept["calls"], now) if kept["environment"] == here else now
    path.write_text(json.dumps({"environment": dict(here), "calls": calls}, indent=1) + "\n")
    print("\n".join(changes(kept["calls"], calls)) or "the numbers were those of now already")
    return 0


def compare(path: Path, here: Mapping[str, str], prefixes: Sequence[str]) -> int:
    """Prints what has changed; returns the exit code."""
    kept = json.loads(path.read_text())
    chosen = tuple(prefixes) or ("",)
    names = [name for name in counted.CALLS if name.startswith(chosen)]
    kinds, skipped = comparable(kept["environment"], here)
    now, missing = measured(names, kinds)
    lines = changes(kept["calls"], now)
    gone = set(kept["calls"]) - set(counted.CALLS)
    lines += [f"{name}: nothing of this name is counted any more" for name in sorted(gone)]
    for line in (*skipped, *missing, *lines):
        print(line)
    if lines:
        print(f"{path.name} has other numbers: --update writes those of now, the commit says why")
        return 1
    count = sum(map(len, now.values()))
    print(f"instructions: {count} numbers of {len(names)} calls are what they were")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefix", nargs="*", help="of the names of calls; none are all")
    parser.add_argument("--update", action="store_true", help="write the numbers of now")
    parser.add_argument("--numbers", type=Path, default=NUMBERS, help="another file of numbers")
    options = parser.parse_args(arguments)
    if options.update and options.prefix:
        parser.error("--update takes all calls, so that all numbers are of one environment")
    if options.update:
        return update(options.numbers, environment())
    return compare(options.numbers, environment(), options.prefix)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--under-valgrind"]:
        under_valgrind(sys.argv[2], sys.argv[3:])
    sys.exit(main())
