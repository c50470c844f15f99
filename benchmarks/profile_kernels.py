"""Calls mmfuse's kernels a few times and nothing else, for a profiler: see `make gpu`.

Run by itself it shows nothing: `ncu python benchmarks/profile_kernels.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import _mmfuse
import torch
from _cases import CASES
from _workloads import WORKLOADS

# What the targets are about.
CALLS = (
    ("update_scale", "single_256m"),
    ("ogm_ge", "single_256m"),
    ("inforeg", "single_256m"),
    ("redreg", "single_256m"),
    ("ogm_ge_step", "resnet18"),
    ("update_scale", "thousand"),
    ("mutual_information", "pairs_10m"),
    ("noisy_views", "images"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="only on these")
    parser.add_argument("--repeats", type=int, default=2, help="the first call warms up")
    options = parser.parse_args(argv)
    for name, workload in CALLS:
        if options.workloads and workload not in options.workloads:
            continue
        case = CASES[name]
        inputs = case.make(WORKLOADS[workload], torch.float32, options.device)
        with torch.set_grad_enabled(case.autograd):
            for _ in range(options.repeats):
                inputs.restore()
                getattr(_mmfuse, name)(inputs, options.backend)
        del inputs
    if options.device.type == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
