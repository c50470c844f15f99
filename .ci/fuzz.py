"""Random calls of everything public: `make fuzz MINUTES=…`, by night.

Each public function, each method's constructor and each method's sequences of calls are a target,
in a process of its own (`tests/support/fuzzing`). Failing calls are shrunk and kept in build/fuzz,
where the next run begins with them. Exit code 1 if something was found.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT / "tests" / name) for name in ("support", "kernels")]
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


def main() -> int:
    """Reads the command line and fuzzes."""
    from cuda_on_cpu.build import build_kernels
    from fuzzing import program
    from fuzzing.targets import targets

    from mmfuse import _native

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all targets together")
    parser.add_argument("--only", default="*", help="a pattern of targets' names")
    parser.add_argument("--seed", type=int, default=None, help="by default the time")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--list", action="store_true", help="the targets' names, and no more")
    options = parser.parse_args()
    found = targets()
    names = [name for name in found if fnmatch.fnmatch(name, options.only)]
    if options.list or not names:
        print("\n".join(names))
        return 0 if names else 2
    try:
        _native.load_library(build_kernels(), "cuda")
    except RuntimeError as error:
        print(f"without the CUDA kernels, whose host shim does not build: {error}")
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}")
    return program.main(found, names, options.minutes, options.output, first=seed)


if __name__ == "__main__":
    sys.exit(main())
