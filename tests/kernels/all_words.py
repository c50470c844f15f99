"""All 2³² random words through the CUDA noise's fast functions, against the noise contract.

    python tests/kernels/all_words.py --output build/all_words

Needs nvcc and a GPU; `--device cpu` takes the host shim, whose versions of the hardware's functions
are as wrong as NVIDIA's guide allows, and a `--stride`. Exit code 1 if a deviate is outside the
contract, 77 if nvcc is not there.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

from processes import SKIPPED, cuda_tool

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_suffix(".cu")
WORDS = 2**32


class Found(NamedTuple):
    """The largest errors over all words.

    Attributes:
        words: How many were looked at.
        contract: |Δz| over 1e-5 (1 + |z|), of each word with the largest radius and with another.
        any_partner: A bound of the same for any two words; the error is |cos·Δr| + r·max|Δcos|.
        angle: max|Δcos|, max|Δsin|.
        radius: max|Δr|.
    """

    words: float
    contract: float
    any_partner: float
    angle: float
    radius: float

    def __str__(self) -> str:
        return (
            f"{self.words:.0f} words: at most {self.contract:.1%} of what the contract allows, "
            f"{self.any_partner:.1%} with any partner (angle {self.angle:.2e}, "
            f"radius {self.radius:.2e})"
        )

    def good(self, stride: int) -> bool:
        """True if all words were looked at, and every deviate is within the contract."""
        worst = max(self.contract, self.any_partner)
        return self.words == -(-WORDS // stride) and worst <= 1.0


def on_gpu(output: Path, stride: int) -> Found | None:
    """Builds the program with nvcc and runs it; None without nvcc."""
    nvcc = cuda_tool("nvcc")
    if nvcc is None:
        return None
    output.mkdir(parents=True, exist_ok=True)
    program = output / "all_words"
    include = f"-I{ROOT / 'csrc'}"
    build = [nvcc, "-O3", "-std=c++17", "-arch=native", include, str(SOURCE), "-o", str(program)]
    subprocess.run(build, check=True)
    done = subprocess.run([program, str(stride)], check=True, stdout=subprocess.PIPE, text=True)
    return Found(*map(float, done.stdout.split()))


def in_shim(stride: int) -> Found:
    """The same arithmetic on the CPU."""
    from cuda_on_cpu.build import build_all_words

    library = ctypes.CDLL(str(build_all_words()))
    out = (ctypes.c_double * 5)()
    library.run_all_words(ctypes.c_uint64(0), ctypes.c_uint64(stride), 2, out)
    return Found(*out)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stride", type=int, default=1, help="look at every n-th word only")
    parser.add_argument("--output", type=Path, default=Path("build/all_words"))
    options = parser.parse_args(argv)
    if options.device == "cpu":
        found = in_shim(options.stride)
    else:
        on_device = on_gpu(options.output, options.stride)
        if on_device is None:
            print("all_words: skipped, because nvcc was not found")
            return SKIPPED
        found = on_device
    print(f"all_words: {found}")
    return 0 if found.good(options.stride) else 1


if __name__ == "__main__":
    sys.exit(main())
