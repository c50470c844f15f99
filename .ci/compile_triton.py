"""Compiles every Triton kernel for the GPUs that mmfuse supports; needs no GPU.

Prints a line per kernel variant and target, and fails if a kernel does not compile or is in no
AOT_SPECS. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
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
from triton.compiler import ASTSource

# The checkout, whether or not mmfuse is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mmfuse.triton
from mmfuse.triton._aot import COMPILE_OPTIONS, AotSpec

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


def source(spec: AotSpec) -> ASTSource:
    """Translates a spec into what Triton's launcher would hand to its compiler."""
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def plain(kind: Any, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return tuple(plain(part, (*path, i)) for i, part in enumerate(kind))
        if kind.endswith("!"):
            attributes[path] = [["tt.divisibility", 16]]
        return kind.rstrip("!")

    for i, name in enumerate(spec.kernel.arg_names):
        signature[name] = "constexpr" if name in spec.constants else plain(spec.types[name], (i,))
    return ASTSource(spec.kernel, signature, spec.constants, attributes)


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


def compile_spec(spec: AotSpec, capability: int) -> str:
    """Compiles one variant for one target and describes the result."""
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": spec.num_warps, **COMPILE_OPTIONS}
    compiled = triton.compile(source(spec), target=target, options=options)
    shared = f"{compiled.metadata.shared:5d} B shared"
    return f"{spec.num_warps} warps, {shared}, {resources(compiled.asm['cubin'])}"


def main() -> int:
    """Returns the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="part of a kernel's name")
    pattern = parser.parse_args().pattern
    if mmfuse.triton.INTERPRETED:
        print("unset TRITON_INTERPRET: the interpreter replaces the compiler")
        return 1
    failures = 0
    count = 0
    for module in modules():
        specs = getattr(module, "AOT_SPECS", [])
        for missing in set(kernels(module)) - {spec.kernel for spec in specs}:
            print(f"FAILED {module.__name__}: {missing.__name__} is in no AOT_SPECS")
            failures += 1
        for spec in specs:
            if pattern not in spec.kernel.__name__:
                continue
            for capability in CAPABILITIES:
                title = f"{spec.kernel.__name__} [{spec.label}] sm_{capability}"
                count += 1
                try:
                    print(f"{title}: {compile_spec(spec, capability)}", flush=True)
                except Exception as error:  # every compiler stage raises something else
                    print(f"FAILED {title}: {error}", flush=True)
                    failures += 1
    print(f"{count - failures} passed, {failures} failed")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
