"""Names the faster CUDA backend of each op, from measured results: `python benchmarks/choose.py`.

Looks at every results.csv under benchmarks/results that was measured on a GPU, or at the files that
are named. Only cases count that are one op and its gradient, and no training steps.
`TRITON_FIRST` in mmfuse/ops/_preference.py must be what the last line says.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cases import CASES

RESULTS = Path(__file__).resolve().parent / "results"


def speed_of_triton(paths: Iterable[Path]) -> dict[str, float]:
    """Op → how many times faster Triton is than CUDA C++: the geometric mean over all its cases."""
    times: dict[tuple[object, ...], dict[str, float]] = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("device") == "cuda" and row["case"] in CASES:
                    key = (path, row["case"], row["workload"], row["dtype"])
                    times.setdefault(key, {})[row["provider"]] = float(row["median_ms"])
    logs: dict[str, list[float]] = {}
    for (_, case, *_), providers in times.items():
        # A gradient's op is chosen together with its forward pass.
        ops = {op.removesuffix("_backward") for op in CASES[str(case)].ops}
        # A training step is mostly the network's.
        alone = len(ops) == 1 and CASES[str(case)].kind != "training"
        if alone and {"cuda", "triton"} <= set(providers):
            ratio = providers["cuda"] / providers["triton"]
            logs.setdefault(ops.pop(), []).append(math.log(ratio))
    return {op: math.exp(sum(found) / len(found)) for op, found in sorted(logs.items())}


def triton_first(speeds: Mapping[str, float]) -> set[str]:
    """The ops that go to Triton."""
    return {op for op, speed in speeds.items() if speed > 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", help="results.csv of benchmarks/run.py")
    options = parser.parse_args(argv)
    speeds = speed_of_triton(options.results or sorted(RESULTS.glob("**/results.csv")))
    print("| op | speed of Triton over CUDA C++ |\n|---|--:|")
    for op, speed in speeds.items():
        print(f"| `{op}` | {speed:.2f}× |")
    print(f"\nTRITON_FIRST = {sorted(triton_first(speeds))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
