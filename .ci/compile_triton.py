"""Compiles every Triton kernel for the GPUs that mmfuse supports; needs no GPU.

It compiles the kernels that the ops' samples launch, see tests/kernels/triton_variants.py. Prints a
line per variant and target, and fails if a kernel does not compile or is launched by no samples.
Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

# The checkout, whether or not mmfuse is installed, and what the tests share.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))

from triton_variants import Variant, variants

import mmfuse.triton

CAPABILITIES = (80, 90, 100)


def modules() -> Iterator[ModuleType]:
    """Yields every module of mmfuse.triton."""
    for info in pkgutil.iter_modules(mmfuse.triton.__path__, "mmfuse.triton."):
        yield importlib.import_module(info.name)


def kernels(module: ModuleType) -> Iterator[Any]:
    """Yields the kernels that a module defines; device functions have other names."""
    for name, value in vars(module).items():
        if name.endswith("_kernel") and isinstance(value, triton.runtime.KernelInterface):
            yield value


def resources(cubin: bytes) -> str:
    """Registers and local memory of a compiled kernel, as far as cuobjdump can tell."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=False
        )
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", done.stdout)
    if found is None:
        return "registers unknown"
    registers, stack, local = map(int, found.groups())
    return f"{registers:3d} registers, {stack + local} B spilled"


def compiled(variant: Variant, capability: int) -> str:
    """Compiles a variant for one target and describes the result."""
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(variant.source(), target=target, options=dict(variant.options))
    shared = f"{made.metadata.shared:5d} B shared"
    return f"{made.metadata.num_warps} warps, {shared}, {resources(made.asm['cubin'])}"


# Forked processes read this list: a variant holds functions, which cannot be sent to them.
_planned: list[tuple[Variant, int]] = []


def attempt(index: int) -> tuple[bool, str]:
    """Compiles a planned variant for its target; returns its success, and a line about it."""
    variant, capability = _planned[index]
    title = f"{variant.kernel.__name__} [{variant.label}] sm_{capability}"
    try:
        return True, f"{title}: {compiled(variant, capability)}"
    except Exception as error:  # every compiler stage raises something else
        return False, f"FAILED {title}: {error}"


def main() -> int:
    """Returns the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="part of an op's or a kernel's name")
    pattern = parser.parse_args().pattern
    if mmfuse.triton.INTERPRETED:
        print("unset TRITON_INTERPRET: the interpreter replaces the compiler")
        return 1
    found = variants()
    never = {k for m in modules() for k in kernels(m)} - {v.kernel for v in found}
    for kernel in sorted(never, key=lambda kernel: kernel.__name__):
        # Flushed, so that no forked process inherits it and prints it once more.
        print(f"FAILED {kernel.__name__}: no op's samples launch it", flush=True)
    _planned[:] = [
        (variant, capability)
        for variant in found
        if pattern in f"{variant.kernel.__name__} [{variant.label}]" or pattern in variant.op
        for capability in CAPABILITIES
    ]
    passed = 0
    with multiprocessing.get_context("fork").Pool() as pool:
        for fine, line in pool.imap(attempt, range(len(_planned))):
            print(line, flush=True)
            passed += fine
    failed = len(never) + len(_planned) - passed
    print(f"{passed} passed, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
