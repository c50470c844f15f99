"""Runs the C++ kernels under Valgrind's memcheck, which knows of each bit whether it was written.

`make memcheck`. All of every_kernel.py runs with the library as it is installed, on one thread, at
the generic level of instructions: Valgrind knows no AVX-512, and AVX2 (--level) takes it long. Of
memcheck's reports those count whose access or branch is in a library of ours: a branch, an address
or a conversion that depends on what nobody has written, on the heap or on the stack, and an access
to memory that is not there. A client request finds numbers in the results that a kernel computed
from such memory without a branch. First, functions that are wrong on purpose have to be reported,
and what mmfuse's own library makes of tensors that nobody has filled. Exit code 1 if something was
found, 2 without Valgrind, its headers or a compiler. With --origins a report says where the memory
came from, in twice the time.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from case_processes import Job, describe, run_jobs
from processes import Ended

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "memcheck"
#: The first is what `make memcheck` looks at.
LEVELS = ("generic", "avx2")
SECONDS = 1200.0
SHOWN = 8
SOURCE = """
#include <valgrind/memcheck.h>
#include <cstdlib>
volatile int sink;
extern "C" void announce(const char* name) { VALGRIND_PRINTF("section %s\\n", name); }
extern "C" long first_undefined(const char* begin, size_t bytes) {
  const size_t at = VALGRIND_CHECK_MEM_IS_DEFINED(begin, bytes);
  return at == 0 ? -1 : static_cast<long>(at - reinterpret_cast<size_t>(begin));
}
extern "C" void mmfuse_control_heap() {
  volatile int* const memory = static_cast<int*>(std::malloc(4 * sizeof(int)));
  if (memory[2] > 3) sink = 1;
  std::free(const_cast<int*>(memory));
}
extern "C" void mmfuse_control_stack() {
  volatile int few[4];
  few[0] = 1;
  if (few[2] > 3) sink = 1;
}
extern "C" void mmfuse_control_beyond() {
  volatile int* const memory = static_cast<int*>(std::malloc(4 * sizeof(int)));
  sink = memory[4];
  std::free(const_cast<int*>(memory));
}
"""
# Each must be reported as this.
CONTROLS = {
    "heap": "Conditional jump",
    "stack": "Conditional jump",
    "beyond": "Invalid read",
    "library": "Conditional jump",
    "result": "is not defined",
}

_SECTION = re.compile(r"^\*\*\d+\*\* section (.*)$")
_REPORT = re.compile(
    r"^(?:Conditional jump|Use of uninit|Invalid|Jump to the invalid|Process terminating|"
    r"Syscall param|Source and destination|Mismatched|Unaddressable|vex amd64)"
)
_FRAME = re.compile(r"^\s+(?:at|by) 0x[0-9A-F]+: (.*)$")
# Functions that work for their callers.
_LENT = re.compile(r"/(?:libc|libm|ld-linux\S*|vgpreload\S*)\.so|\b(?:str|mem)[\w-]+\.S:|vg_rep")
_OURS = re.compile(r"libmmfuse|mmfuse::|mmfuse_control")


class Report(NamedTuple):
    """A report of memcheck about a library of ours.

    Attributes:
        section: The control or the case that was running.
        text: Its first line and the frames.
    """

    section: str
    text: str


def reports(log: str) -> Iterator[Report]:
    """The reports of memcheck's log whose access or branch is in a library of ours."""
    section, lines = "", [""]
    for line in [*log.splitlines(), ""]:
        text = re.sub(r"^==\d+== ?", "", line)
        if _FRAME.match(text):
            lines.append(text)
            continue
        if _REPORT.match(lines[0]):
            frames = [found[1] for found in map(_FRAME.match, lines[1:]) if found is not None]
            own = next((frame for frame in frames if not _LENT.search(frame)), "")
            if _OURS.search(own):
                yield Report(section, "\n".join(lines))
        named = _SECTION.match(line)
        section = named[1] if named is not None else section
        lines = [text]


def under_valgrind(library: str, names: Sequence[str]) -> None:
    """Runs the controls and the cases; prints a line for each result that is not defined."""
    import torch
    from every_kernel import run
    from samples import CASES

    from mmfuse import ops

    requests = ctypes.CDLL(library)
    requests.first_undefined.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    requests.first_undefined.restype = ctypes.c_long
    torch.set_num_threads(1)

    def look(section: str, written: Sequence[torch.Tensor]) -> None:
        for i, tensor in enumerate(written):
            whole = tensor.detach().contiguous()
            at = requests.first_undefined(whole.data_ptr(), whole.nbytes)
            if at >= 0:
                dtype = str(whole.dtype).removeprefix("torch.")
                where = f"byte {at} of result {i}, {dtype} {list(whole.shape)}"
                print(f"{section}: {where}, is not defined", flush=True)

    def control(name: str) -> None:
        if name == "library":
            unknown = torch.empty((), dtype=torch.bool)
            ops.keep_state_([torch.zeros(3)], [torch.ones(3)], unknown, backend="cpu")
        elif name == "result":
            stats = ops.grad_stats([torch.empty(5)], backend="cpu")
            look("control result", [stats.mean, stats.m2])
        else:
            getattr(requests, f"mmfuse_control_{name}")()

    for name in CONTROLS:
        requests.announce(f"control {name}".encode())
        control(name)
    for name in names or CASES:
        requests.announce(name.encode())
        look(name, run("cpu", "cpu", [name])[name])
    print("all cases ran", flush=True)
    # An interpreter that ends in peace takes long here.
    os._exit(0)


def build(compiler: Sequence[str]) -> Path | None:
    """The library of the requests and the controls; None if it does not compile."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    source, library = OUTPUT / "requests.cpp", OUTPUT / "librequests.so"
    source.write_text(SOURCE)
    command = [*compiler, "-O1", "-shared", "-fPIC", "-w", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None
    return library


def faults(printed: str, log: str) -> tuple[list[str], list[str]]:
    """Controls that were not reported, and a text for each thing that was found."""
    found = list(reports(log))
    lines = [line for line in printed.splitlines() if line.endswith(" is not defined")]
    texts: dict[str, list[str]] = {f"control {name}": [] for name in CONTROLS}
    for section, text in [*found, *(line.split(": ", 1) for line in lines)]:
        texts.setdefault(section, []).append(text)
    silent = [
        name
        for name, word in CONTROLS.items()
        if not any(word in text for text in texts[f"control {name}"])
    ]
    said = [
        f"{section}: {text}"
        for section, all_texts in texts.items()
        if not section.startswith("control ")
        for text in all_texts
    ]
    return silent, said


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs memcheck at each level that is asked for, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--level", action="append", default=[], choices=LEVELS)
    parser.add_argument("--origins", action="store_true")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    # So that the processes of a run that is cut off end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    tool = shutil.which("valgrind")
    library = build(compiler) if tool and shutil.which(compiler[0]) else None
    if tool is None or library is None:
        print("make memcheck needs Valgrind with its headers, and a compiler", file=sys.stderr)
        return 2
    logs = OUTPUT / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    alone = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    jobs = []
    for level in options.level or LEVELS[:1]:
        command = [tool, "--tool=memcheck", "--error-limit=no", "--leak-check=no"]
        command += [f"--log-file={logs / level}.memcheck"]
        command += ["--track-origins=yes"] if options.origins else []
        command += [sys.executable, __file__, "--under-valgrind", str(library), *options.case]
        jobs.append(Job(level, command, {**alone, "MMFUSE_SIMD": level}))
    failed = []

    def done(job: Job, ended: Ended) -> None:
        printed = (logs / f"{job.name}.log").read_text()
        if "cannot run here" in printed:
            print(f"{job.name}: skipped: this machine has no such instructions", flush=True)
            return
        log = logs / f"{job.name}.memcheck"
        silent, said = faults(printed, log.read_text() if log.is_file() else "")
        ran = ended.code == 0 and "all cases ran" in printed
        lines = [] if ran else printed.splitlines()[-12:]
        lines += [f"control {name}: NOT REPORTED" for name in silent]
        lines += [line for text in said[:SHOWN] for line in text.splitlines()[:6]]
        print(
            f"{job.name}: {describe(ended)}, {len(said)} reports, {len(silent)} controls without, "
            f"{ended.seconds:.0f} s",
            flush=True,
        )
        if lines:
            failed.append(job.name)
            print("\n".join(f"    {line[:200]}" for line in lines), flush=True)

    run_jobs(jobs, logs, workers=2, end=began + SECONDS, limit_s=SECONDS, done=done)
    what = f"FAILED: {', '.join(failed)}; the logs are in {logs}" if failed else "nothing was found"
    print(f"memcheck: {what}, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--under-valgrind"]:
        under_valgrind(sys.argv[2], sys.argv[3:])
    sys.exit(main())
