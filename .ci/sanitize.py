"""Runs the C++ kernels, and the CUDA kernels in the host shim, under ASan and UBSan.

`make sanitize`. Both are compiled again, into build/sanitize, and run in a copy of the checkout
there, whose package has the library with the checks in place of the usual one. PyTorch asks for
exactly the bytes that a tensor has, so that the sanitizer knows where each ends; the job
`placement` makes sure. First, kernels that are misused on purpose have to be reported; then all of
every_kernel.py runs, with each instruction set and with new memory as it is and poisoned, and every
test that takes a backend, but for those of compilation and graphs. Exit code 1 if something was
found, 2 without git or GCC's sanitizers.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from case_processes import Job, describe, run_jobs
from instrumented import Build, begin
from processes import Ended

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "sanitize"
CHECKS = "-fsanitize=address,undefined"
COPY = OUTPUT / "checkout"
# -g1 has the lines, which are all that a report needs; warnings are for the usual build.
FLAGS = f"-O1 -g1 -w -fno-sanitize-recover=undefined -ffile-prefix-map={COPY}={ROOT}"
BUILD = Build(OUTPUT, shim=f"{FLAGS} {CHECKS}", checks=CHECKS, flags=FLAGS)
# The place first, and then the function, whose name may be long.
TRACE = 'stack_trace_format="    #%n %L %f"'
OPTIONS = {
    # Memory that Python and PyTorch keep until the end is no concern here. The frames that GCC 12
    # sets aside to find a use after return are not aligned for AVX-512 (its bug 110027).
    "ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:{TRACE}",
    "UBSAN_OPTIONS": f"halt_on_error=1:print_stacktrace=1:{TRACE}",
}
RUNTIMES = ("libasan.so", "libubsan.so")
LEVELS = ("generic", "avx2", "avx512")
# Compiled code and graphs reach no memory that the operator itself does not, and whole runs of
# training none that a step does not.
TESTS = "(cpu-cpu or cuda-cpu) and not (opcheck or compile or replay or released_training)"
# Of test_every_kernel.py, whose other tests run the same in other orders or without the shim.
REACHED = "every_cuda_kernel_is_launched"
SECONDS = 1500.0
REPORT = re.compile(r"(?:/\S+: runtime error: |==ERROR: AddressSanitizer).*(?:\n.+){0,12}")

PLACEMENT = """
import ctypes, torch
poisoned = ctypes.CDLL(None).__asan_address_is_poisoned
for size in [*range(1, 200), 4097, 1000003]:
    tensor = torch.empty(size, dtype=torch.uint8)
    around = [poisoned(ctypes.c_void_p(tensor.data_ptr() + i)) for i in (-1, 0, size - 1, size)]
    assert around == [1, 0, 0, 1], (size, around)
"""
SELF_CHECK = """
import ctypes, sys
getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])((ctypes.c_int * 64)(*[1] * 64))
"""
# The misuse, and the words of its report.
CONTROLS = {
    # A vector's read that begins within and ends beyond has no other name.
    "cpu-memcheck": "AddressSanitizer: (unknown-crash|heap-buffer-overflow)",
    "cuda-memcheck": "AddressSanitizer: heap-buffer-overflow",
    "cpu-alignment": "misaligned address",
    "cuda-alignment": "misaligned address",
    "run_beyond_static": "insufficient space|global-buffer-overflow",
    "run_beyond_dynamic": "heap-buffer-overflow",
    "run_beyond_local": "stack-buffer-overflow",
    "run_overflow": "signed integer overflow",
}


def jobs_of(self_check: str, environment: dict[str, str]) -> list[Job]:
    """The controls, each instruction set and the shim, and the tests."""
    files = {path.stem: str(path) for path in COPY.glob("tests/**/*.py")}
    cells = [path for path in files.values() if "cell: Cell" in Path(path).read_text()]
    kernels = [sys.executable, files["every_kernel"], "--device", "cpu"]
    commands: dict[str, list[str]] = {"placement": [sys.executable, "-c", PLACEMENT]}
    for name in CONTROLS:
        backend, _, kind = name.partition("-")
        own = [sys.executable, "-c", SELF_CHECK, self_check, name]
        commands[name] = [*kernels, "--backend", backend, "--control", kind] if kind else own
    commands["cuda"] = [*kernels, "--backend", "cuda"]
    for level in LEVELS:
        commands[level] = [*kernels, "--backend", "cpu"]
        commands[f"{level}-poison"] = [*commands[level], "--poison"]
    # Without capturing, or a report would be lost with the process that it ends.
    pytest = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    commands["cuda-reached"] = [*pytest, "-k", REACHED, files["test_every_kernel"]]
    commands["shim"] = [*pytest, files["test_shim"]]
    commands["tests"] = [*pytest, "-n", "2", "-k", TESTS, *cells]
    jobs = []
    for name, command in commands.items():
        level = name.removesuffix("-poison")
        simd = {"MMFUSE_SIMD": level} if level in LEVELS else {}
        jobs.append(Job(name, command, {**environment, **simd}))
    return jobs


def main() -> int:
    """Builds, runs, prints a line for each job, and returns the exit code."""
    began = time.monotonic()
    begun = begin(BUILD, RUNTIMES, "make sanitize needs git, and GCC with libasan and libubsan")
    if begun is None:
        return 2
    self_check, preloaded = begun
    logs = OUTPUT / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    os.chdir(COPY)
    environment = {
        **OPTIONS,
        "LD_PRELOAD": preloaded,
        **BUILD.environment,
        "MMFUSE_REQUIRE_BACKENDS": "cpu,cuda",
        "OMP_WAIT_POLICY": "passive",
    }
    failed = []

    def done(job: Job, ended: Ended) -> None:
        log = (logs / f"{job.name}.log").read_text()
        reports = REPORT.findall(log)
        if job.name in CONTROLS:
            well = bool(ended.code) and any(re.search(CONTROLS[job.name], r) for r in reports)
            said = "reported, as it must be" if well else "NOT REPORTED"
        elif "cannot run here" in log and not reports:
            well, said = True, "skipped: this machine has no such instructions"
        else:
            well = ended.code == 0 and not reports
            said = describe(ended)
        print(f"{job.name}: {said}, {ended.seconds:.0f} s", flush=True)
        if not well:
            failed.append(job.name)
            lines = [*"\n".join(reports[:3]).splitlines(), *log.splitlines()[-12:]]
            print("\n".join(f"    {line[:200]}" for line in lines), flush=True)

    end = time.monotonic() + SECONDS
    jobs = jobs_of(self_check, environment)
    run_jobs(jobs, logs, workers=2, end=end, limit_s=SECONDS, done=done)
    what = f"FAILED: {', '.join(failed)}; the logs are in {logs}" if failed else "nothing was found"
    print(f"sanitize: {what}, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
