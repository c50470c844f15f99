"""Builds both libraries for a machine with a GPU, here, without a GPU or a CUDA PyTorch.

`make gpu-library`. Minutes on a GPU need not go into compiling then: the two files are copied into
mmfuse/ there. They are compiled against the PyTorch of this Python, whose stable ABI is that of a
CUDA build; in place of its libtorch_cuda.so a stub is linked, which is not used later. Compiles for
sm_90, or for TORCH_CUDA_ARCH_LIST. Exit code 1 if a library would not load there, 2 without a
compiler or nvcc.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from build_tools.compiling import build_all, run_compiler
from build_tools.finding import find_compiler, find_nvcc, find_torch
from build_tools.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "gpu_library"
# The glue takes this symbol from PyTorch: without one the linker might leave the library out.
STUB = "void aoti_torch_get_current_cuda_stream(void) {}\n"
# Every distribution since 2022 has it; Ubuntu 22.04 has 2.35.
NEWEST_GLIBC = (2, 34)


def stub_command(compiler: Sequence[str], folder: Path) -> list[str]:
    """Writes the stub's source, and returns the command that makes a libtorch_cuda.so of it."""
    source = folder / "stub.c"
    source.write_text(STUB)
    name = "libtorch_cuda.so"
    options = ["-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{name}", "-x", "c", str(source)]
    return [*compiler, *options, "-o", str(folder / name)]


def lines(*command: object) -> list[str]:
    """The lines that a program of the binutils prints."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def newest_glibc(symbols: Sequence[str]) -> tuple[int, ...]:
    """The highest version of glibc among undefined symbols."""
    found = re.findall(r"@GLIBC_([\d.]+)", "\n".join(symbols))
    return max((tuple(int(part) for part in version.split(".")) for version in found), default=())


def faults(path: Path, backend: str) -> list[str]:
    """The reasons why a library cannot be loaded on another machine, in a sentence each."""
    symbols = lines("nm", "-D", "--undefined-only", path)
    needed = re.findall(r"NEEDED.*\[(.+)\]", "\n".join(lines("readelf", "-d", path)))
    found = []
    python = [s.split()[-1] for s in symbols if re.match(r"_?Py", s.split()[-1])]
    if python:
        found.append(f"{path.name} needs Python's {python[0]}")
    if backend == "cuda" and "libtorch_cuda.so" not in needed:
        found.append(f"{path.name} does not name libtorch_cuda.so, which must be loaded before it")
    found += [
        f"{path.name} needs {name}" for name in needed if re.match("libcudart|libpython", name)
    ]
    if newest_glibc(symbols) > NEWEST_GLIBC:
        version = ".".join(map(str, newest_glibc(symbols)))
        limit = ".".join(map(str, NEWEST_GLIBC))
        found.append(f"{path.name} needs glibc {version}, and a GPU machine may have {limit}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Builds and looks at the libraries; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the two libraries")
    output = parser.parse_args(argv).output.resolve()
    began = time.monotonic()
    compiler, nvcc = find_compiler(), find_nvcc()
    missing = [name for name, found in (("a C++ compiler", compiler), ("nvcc", nvcc)) if not found]
    if compiler is None or nvcc is None:
        print(
            f"make gpu-library needs {' and '.join(missing)}, which was not found", file=sys.stderr
        )
        return 2
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    # Beside the libraries, so that their folder can be sent as it is.
    objects = output.with_name(f"{output.name}_objects")
    for folder in (objects, output):
        folder.mkdir(parents=True, exist_ok=True)
    for stale in output.glob("*.so"):
        stale.unlink()
    recipe = Recipe(compiler, find_torch(), objects, output)
    cpu, cuda = recipe.cpu(), recipe.cuda(nvcc)
    run_compiler(stub_command(compiler, objects))
    for library in (cpu, cuda):
        # A symbol that neither PyTorch nor the stub has would be missing on the GPU machine too.
        library.link += [f"-L{objects}", "-Wl,-z,defs"]
    build_all([cpu, cuda], set(), objects, recipe.tools(nvcc))
    found = []
    for backend in ("cpu", "cuda"):
        path = output / f"libmmfuse_{backend}.so"
        found += faults(path, backend)
        glibc = ".".join(map(str, newest_glibc(lines("nm", "-D", "--undefined-only", path))))
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, glibc {glibc} or newer")
    archs = os.environ["TORCH_CUDA_ARCH_LIST"]
    print(f"built for {archs} in {time.monotonic() - began:.0f} s")
    for fault in found:
        print(f"gpu-library: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
