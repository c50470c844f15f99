"""Runs the cases of every_kernel.py in the build that looks for races; .ci/races.py starts it.

    python tests/kernels/race_cases.py check --output build/races/logs
    python tests/kernels/race_cases.py mutants --output build/races/logs

It runs under ThreadSanitizer, and forks for each case, so that PyTorch is imported once. `check`
fails on every report, and leaves in reached.json how long a case took and which orderings it has
reached: barriers, atomic additions and relaxed stores, as the sources in csrc/cuda have them. One
that no case reaches fails too. `mutants` leaves out one ordering after another, see
cuda_on_cpu/ordering.h, and runs the cases that reach it, the shortest first, until one reports a
race. If none does, the ordering is either not needed or not tested. If it is not needed against
races, a comment says so, on its line or the one above: `race-mutants: why`.

Before all cases, `check` updates one gradient twice in a call, which has to be reported.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# ThreadSanitizer's exit code after a report.
REPORTED = 66
REPORT = re.compile(r"^WARNING: ThreadSanitizer: .*(?:\n(?!=====).*)*", re.MULTILINE)
ORDERING = re.compile(r"\b(__syncthreads\w*|atomic[A-Z]\w*|store_relaxed|add_in_order|__syncwarp)\s*\(")
EXCUSE = re.compile(r"//.*\brace-mutants: (\S.*)")
KINDS = {
    "__syncthreads": "barrier",
    "atomicAdd": "atomic addition",
    "store_relaxed": "store",
    "add_in_order": "ordering addition",
}
# The case that has to be reported.
MISUSE = "one gradient twice"
# One more than every_kernel.py has.
SPOILED = "not finite"
LIMIT_S = 200
WORKERS = 2


class Place(NamedTuple):
    """A call by which a kernel orders its memory.

    Attributes:
        name: "csrc/cuda/device/reduce.h:36".
        function: The function that is called there.
        excuse: Why nobody would notice if it were not; empty without one.
    """

    name: str
    function: str
    excuse: str = ""


class Result(NamedTuple):
    """The end of one case in a process of its own.

    Attributes:
        case: Its name.
        code: The process's exit code; negative for a signal.
        seconds: How long it took.
        reports: The sanitizer's reports.
        text: All that the process has written.
        reached: The orderings that were reached, by their names.
    """

    case: str
    code: int
    seconds: float
    reports: list[str]
    text: str
    reached: list[str]

    @property
    def clean(self) -> bool:
        return self.code == 0 and not self.reports


def places_of(sources: Iterable[Path], root: Path = ROOT) -> list[Place]:
    """Every call that orders memory, in the sources' order.

    Raises:
        ValueError: two in one line, which could not be told apart; or one that is not modelled.
    """
    places = []
    for source in sources:
        lines = source.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            found = ORDERING.findall(re.sub(r"//.*", "", line))
            if not found:
                continue
            name = f"{source.relative_to(root)}:{number}"
            if len(found) > 1 or found[0] not in KINDS:
                raise ValueError(f"{name}: cannot leave out {' or '.join(found)}")
            beside = EXCUSE.search(line) or (number > 1 and EXCUSE.search(lines[number - 2]))
            places.append(Place(name, found[0], beside.group(1) if beside else ""))
    return places


def kernel_places() -> list[Place]:
    """Those of the CUDA kernels."""
    folder = ROOT / "csrc" / "cuda"
    return places_of(sorted([*folder.rglob("*.cu"), *folder.rglob("*.h")]))


def sample_of(places: Sequence[Place]) -> list[Place]:
    """The first of each kind in each file."""
    first: dict[tuple[str, str], Place] = {}
    for place in places:
        first.setdefault((place.name.partition(":")[0], place.function), place)
    return list(first.values())


def misuse() -> None:
    """Gives one gradient twice: two blocks update it. The public op would refuse it."""
    import torch

    from mmfuse.ops.update_grads import update_checked_

    grad, finite = torch.ones(4000), torch.ones((), dtype=torch.bool)
    scale = torch.tensor([2.0, 3.0])
    update_checked_("cuda", grad.device, [grad, grad], scale, finite, None)


def spoil() -> None:
    """Has what no case of every_kernel.py has: results that are not finite, shares of many bits."""
    import torch

    from mmfuse import ops
    from mmfuse.ops._registry import OPS

    grads = [torch.full((9000,), torch.inf), torch.full((37,), torch.inf)]
    finite = torch.ones((), dtype=torch.bool)
    ops.update_grads_(grads, torch.tensor([0.5, 0.5]), finite=finite, backend="cuda")
    assert not finite
    # Several blocks share a problem, and several threads of each find a NaN.
    x, y = torch.rand(2, 1, 2 * 4096 + 37, dtype=torch.float64, generator=torch.Generator())
    ends = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    forward = OPS["soft_histogram"].overloads["cuda"]
    assert forward(x, y, ends, ends, 5).isfinite().all()
    x[:, ::100] = torch.nan
    assert forward(x, y, ends, ends, 5).isnan().all()


def threads() -> int:
    """How many threads this process has, the sanitizer's own among them."""
    return len(os.listdir("/proc/self/task"))


class Kernels:
    """The CUDA kernels in the host shim, in the build that looks for races."""

    def __init__(self) -> None:
        before = threads()
        import every_kernel
        from cuda_on_cpu.build import build_kernels

        self.cases = [*every_kernel.CASES, SPOILED]
        self._every_kernel = every_kernel
        every_kernel.load_shim()
        self._shim = ctypes.CDLL(str(build_kernels()))
        # The sanitizer cannot fork beside others, and a pool's threads take a moment to end.
        end = time.monotonic() + 10
        while threads() > before and time.monotonic() < end:
            time.sleep(0.01)

    def run(self, case: str, leave_out: str) -> int:
        """Runs a case, without one of the orderings; returns the process's exit code."""
        self._shim.shim_leave_out(leave_out.encode())
        try:
            if case == MISUSE:
                misuse()
            elif case == SPOILED:
                spoil()
            else:
                self._every_kernel.run("cpu", "cuda", [case])
        except Exception:
            traceback.print_exc()
            return 1
        return 0

    def reached(self) -> bytes:
        """The orderings that have been reached, a line each."""
        text = ctypes.create_string_buffer(2**16)
        used = self._shim.shim_reached(text, ctypes.c_size_t(len(text)))
        assert used < len(text)
        return text.value


class Forks:
    """Runs cases in processes that are forked, some side by side.

    Args:
        kernels: The kernels that run.
        output: Folder for what the processes write.
    """

    def __init__(self, kernels: Kernels, output: Path) -> None:
        self.kernels = kernels
        self._output = output
        self._running: dict[int, tuple[str, Path, float, Callable[[Result], None]]] = {}

    def start(self, case: str, done: Callable[[Result], None], leave_out: str = "") -> None:
        """Starts a case; `done` gets what came of it, in `wait`."""
        while len(self._running) >= WORKERS:
            self.wait()
        words = re.sub(r"\W+", "-", f"{leave_out} {case}".strip())
        path = self._output / f"{words}.log"
        path.with_suffix(".reached").unlink(missing_ok=True)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT_S)
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = self.kernels.run(case, leave_out)
            path.with_suffix(".reached").write_bytes(self.kernels.reached())
            sys.stdout.flush()
            os._exit(code)
        self._running[child] = (case, path, time.monotonic(), done)

    def wait(self) -> None:
        """Waits for one process."""
        child, status = os.wait()
        case, path, began, done = self._running.pop(child)
        text = path.read_text(errors="replace")
        listed = path.with_suffix(".reached")
        lines = listed.read_text().split() if listed.exists() else []
        reached = [line[line.index("csrc/cuda/") :] for line in lines if "csrc/cuda/" in line]
        code = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        done(Result(case, code, seconds, REPORT.findall(text), text, reached))

    def wait_for_all(self) -> None:
        """Waits until no process runs any more."""
        while self._running:
            self.wait()


def check(forks: Forks, cases: Sequence[str], output: Path) -> int:
    """Runs every case as it is; returns how many things are wrong."""
    results: dict[str, Result] = {}
    controls = []
    listed: dict[str, dict[str, object]] = {}

    def done(result: Result) -> None:
        if result.case == MISUSE:
            said = "reported, as it must be" if result.reports else "NOT REPORTED"
            print(f"{MISUSE}: {said}, {result.seconds:.1f} s", flush=True)
            return controls.append(bool(result.reports))
        results[result.case] = result
        said = "no race" if result.clean else f"{len(result.reports)} reports, code {result.code}"
        print(f"{result.case}: {said}, {result.seconds:.1f} s", flush=True)
        if not result.clean:
            shown = "\n".join(result.reports[:3]) or result.text[-2000:]
            print("\n".join(f"    {line[:160]}" for line in shown.splitlines()[:60]), flush=True)
        listed[result.case] = {"seconds": result.seconds, "reached": result.reached}
        (output / "reached.json").write_text(json.dumps(listed, indent=1))
        return None

    for case in (MISUSE, *cases):
        forks.start(case, done)
    forks.wait_for_all()
    bad = sum(not result.clean for result in results.values()) + (not all(controls))
    print(f"races: {len(cases) - bad} of {len(cases)} cases have no race")
    reached = {name for result in results.values() for name in result.reached}
    names = {place.name for place in kernel_places()}
    for name in sorted(names - reached):
        print(f"{name}: no case reaches it")
    for name in sorted(reached - names):
        print(f"{name}: reached, but not found in the sources")
    return bad + len(names ^ reached)


def verdict_of(place: Place, attempts: Sequence[Result]) -> tuple[bool, str]:
    """True if all is well with a place that was left out, and what to say of it."""
    found = bool(attempts) and attempts[-1].code == REPORTED
    seconds = sum(result.seconds for result in attempts)
    tried = ", ".join(result.case for result in attempts)
    if found and place.excuse:
        return False, f"REPORTED in {attempts[-1].case}, but excused: {place.excuse}"
    if found:
        return True, f"reported in {attempts[-1].case}, {seconds:.1f} s"
    crashed = [
        f"{r.case} ended with code {r.code}" for r in attempts if r.code not in (0, REPORTED)
    ]
    if crashed:
        return False, f"NOT REPORTED: {', '.join(crashed)}"
    if place.excuse:
        return True, f"excused: {place.excuse}"
    return False, f"NOT REPORTED in {tried or 'any case'}, {seconds:.1f} s"


def mutants(forks: Forks, places: Sequence[Place], output: Path) -> int:
    """Leaves out one place after another; returns with how many something is wrong."""
    listed = json.loads((output / "reached.json").read_text())
    order = sorted(listed, key=lambda case: listed[case]["seconds"])
    wrong = []

    def attempts(place: Place) -> Iterator[str]:
        return iter([case for case in order if place.name in listed[case]["reached"]])

    def go_on(place: Place, left: Iterator[str], results: list[Result]) -> None:
        case = None if results and results[-1].code == REPORTED else next(left, None)
        if case is not None:
            later = lambda result: go_on(place, left, [*results, result])  # noqa: E731
            return forks.start(case, later, place.name)
        well, said = verdict_of(place, results)
        print(f"{place.name}: {KINDS[place.function]}, {said}", flush=True)
        if not well:
            wrong.append(place)
        return None

    for place in places:
        go_on(place, attempts(place), [])
    forks.wait_for_all()
    well = len(places) - len(wrong)
    print(f"race mutants: {well} of {len(places)} reported or excused, {len(wrong)} WRONG")
    return len(wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("check", "mutants"))
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "races" / "logs")
    parser.add_argument("--sample", action="store_true", help="one place of a kind in a file")
    parser.add_argument("--place", default="", help="only those whose names begin like this")
    parser.add_argument("--case", action="append", default=[])
    options = parser.parse_args(arguments)
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    forks = Forks(Kernels(), output)
    if options.what == "check":
        return 1 if check(forks, options.case or forks.kernels.cases, output) else 0
    places = sample_of(kernel_places()) if options.sample else kernel_places()
    wanted = [place for place in places if place.name.startswith(options.place)]
    return 1 if mutants(forks, wanted, output) else 0


if __name__ == "__main__":
    sys.exit(main())
