"""Calls mmfuse's kernels a few times and nothing else, for a profiler: see `make gpu`.

Run by itself it shows nothing: `ncu python benchmarks/profile_kernels.py`, or with the calls that
are wanted, `--calls ogm_ge noisy_views`. Without any it is four kernels of weight: the update that
scales, the statistics and the update with noise (`ogm_ge`) on 2²⁸ elements, and the joint histogram
of 10⁷ pairs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from cases import CASES, WORKLOADS
from engine.workloads import shrunk

# The subjects of the targets: case → workload.
CALLS = {
    "update_scale": "single_256m",
    "ogm_ge": "single_256m",
    "mutual_information": "pairs_10m",
    "noisy_views": "images",
    "inforeg": "single_256m",
    "redreg": "single_256m",
    "ogm_ge_step": "resnet18",
}
DEFAULT = ("update_scale", "ogm_ge", "mutual_information")


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=DEFAULT, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=2, help="the first call warms up")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divide all sizes by N")
    options = parser.parse_args(argv)
    for name in options.calls:
        case, workload = CASES[name], shrunk(WORKLOADS[CALLS[name]], options.shrink)
        inputs = case.make(workload, torch.float32, options.device)
        with torch.set_grad_enabled(case.autograd):
            for _ in range(options.repeats):
                inputs.restore()
                case.mmfuse(inputs, options.backend)
        del inputs
    if options.device.type == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
