"""Builds csrc/cuda, and the self-check of the shim, as plain C++ that runs on the CPU.

`python tests/kernels/cuda_on_cpu/build.py` prints the library; a test calls `build_kernels()`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
OUTPUT = ROOT / "build" / "cuda_on_cpu"

FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    # Its check of longjmp takes a jump to another stack for an error.
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DMMFUSE_CUDA_ON_CPU",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    # Into a folder of their own only: what is there counts as built with the flags of now.
    *shlex.split(os.environ.get("MMFUSE_SHIM_FLAGS", "")),
)
# Flags of the kernels, but not of what runs them: a sanitizer of threads looks at these alone.
KERNEL_FLAGS = shlex.split(os.environ.get("MMFUSE_KERNEL_FLAGS", ""))
RUNTIME = [HERE / "runtime.cpp"]
if "-DMMFUSE_RACES" in FLAGS:
    RUNTIME.append(HERE / "ordering.cpp")


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    sys.stderr.write(result.stderr)


def _made_from(target: Path) -> Path:
    """The file beside a target that lists its inputs."""
    return target.with_name(f"{target.name}.inputs")


def _listed(inputs: list[Path]) -> str:
    # Relative, so that a copied tree is as it was.
    return "".join(f"{os.path.relpath(path, ROOT)}\n" for path in sorted(inputs))


def _is_current(target: Path, inputs: list[Path]) -> bool:
    # A file that was removed leaves no time behind, but the list is another one.
    made_from = _made_from(target)
    if not (target.exists() and made_from.exists() and made_from.read_text() == _listed(inputs)):
        return False
    return target.stat().st_mtime > max(p.stat().st_mtime for p in inputs)


def _finish(partial: Path, target: Path, inputs: list[Path]) -> None:
    """Puts a complete file in place; two processes may build at once."""
    partial.replace(target)
    partial.write_text(_listed(inputs))
    partial.replace(_made_from(target))


def _compile(source: Path, headers: list[Path]) -> Path:
    target, inputs = OUTPUT / f"{source.name}.o", [source, *headers]
    if _is_current(target, inputs):
        return target
    # The shim's folder comes first, so that its cuda_runtime.h is the one that is found.
    include = [f"-I{folder}" for folder in (HERE, CSRC)]
    for folder in cpp_extension.include_paths():
        include += ["-isystem", folder]
    partial = target.with_suffix(f".{os.getpid()}")
    compiler = os.environ.get("CXX", "g++")
    flags = [*FLAGS, *(KERNEL_FLAGS if source.suffix == ".cu" else ())]
    _run([compiler, *flags, *include, "-x", "c++", "-c", str(source), "-o", str(partial)])
    _finish(partial, target, inputs)
    return target


def _build(name: str, sources: list[Path]) -> Path:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    headers = [*HERE.glob("*.h"), *CSRC.rglob("*.h")]
    headers.append(Path(__file__))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, headers), sources))
    library = OUTPUT / name
    if not _is_current(library, objects):
        partial = library.with_suffix(f".{os.getpid()}")
        folder = Path(torch.__file__).parent / "lib"
        link = ["-shared", f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch_cpu", "-lc10"]
        compiler = [os.environ.get("CXX", "g++"), *FLAGS]
        _run([*compiler, *map(str, objects), *link, "-o", str(partial)])
        _finish(partial, library, objects)
    return library


def build_kernels() -> Path:
    """Returns the library that registers every op's `cuda` overload for CPU tensors."""
    cuda = CSRC / "cuda"
    sources = [*cuda.glob("*.cu"), *cuda.glob("*.cpp"), *RUNTIME]
    return _build("libmmfuse_cuda_on_cpu.so", sorted(sources))


def build_self_check() -> Path:
    """Returns the library with the shim's own kernels, see test_shim.py."""
    return _build("libshim_self_check.so", [HERE / "self_check.cu", *RUNTIME])


def build_all_words() -> Path:
    """Returns the library that all_words.py looks at the noise with."""
    return _build("liball_words.so", [HERE.parent / "all_words.cu", *RUNTIME])


if __name__ == "__main__":
    print(build_kernels())
