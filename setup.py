"""Builds what this machine can build; metadata and options live in pyproject.toml.

Each backend is a library of its own without Python in it, mmfuse/libmmfuse_<backend>.so; mmfuse._C
only says how they were built. PyTorch's headers are found on disk and never imported, so that a
build in isolation works against the PyTorch that is installed. build_tools/ has how. Environment:
MMFUSE_NATIVE=auto|0|1, MMFUSE_CUDA=auto|0|1, CXX, CXXFLAGS, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Setuptools leaves this folder out of the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_tools.compiling import build_all
from build_tools.cuda import wants_cuda
from build_tools.finding import (
    COMPILERS,
    SWITCHED_OFF,
    WAY_OUT,
    BuildError,
    find_compiler,
    find_nvcc,
    find_torch,
    mode,
    why_broken,
)
from build_tools.recipe import ROOT, Library, Recipe

# Setuptools' own folder is another one for each `pip install -e`, and ninja's must stay.
KEPT = ROOT / "build" / "native"


class BuildKernels(build_ext):
    """Compiles csrc/, and notes why a backend was left out."""

    def run(self) -> None:
        """Builds in place for `pip install -e`, into the wheel otherwise."""
        module = Path(self.get_ext_fullpath("mmfuse._C"))
        module.parent.mkdir(parents=True, exist_ok=True)
        libraries, notes = self._build(module.name)
        built = {library.path.name: library.path for library in libraries}
        for stale in (module, *module.parent.glob("libmmfuse_*.so")):
            if stale.name not in built:
                stale.unlink(missing_ok=True)
        for name, path in built.items():
            # A process that has the old file open keeps it.
            partial = module.parent / f"{name}.{os.getpid()}"
            shutil.copy2(path, partial)
            partial.replace(module.parent / name)
        (module.parent / "_build.json").write_text(json.dumps(notes, indent=2) + "\n")
        for name, reason in notes.items():
            what = "the facts of the build" if name == "_C" else f"the {name} backend"
            print(f"mmfuse: WARNING: without {what}: {reason}", file=sys.stderr)
        if any("did not build" in reason for reason in notes.values()):
            print(f"mmfuse: {WAY_OUT}", file=sys.stderr)

    def get_source_files(self) -> list[str]:
        """What a source distribution must hold."""
        files = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "build_tools").glob("*.py")]
        return [str(path.relative_to(ROOT)) for path in sorted(files)]

    def _build(self, module: str) -> tuple[list[Library], dict[str, str]]:
        """The libraries that were built, and for each backend without one the reason."""
        wanted, cuda_wanted = mode("MMFUSE_NATIVE"), mode("MMFUSE_CUDA")
        if wanted == "0":
            return [], dict.fromkeys(("cpu", "cuda"), SWITCHED_OFF)
        compiler = find_compiler()
        if compiler is None:
            reason = f"no C++ compiler was found at build time (looked for {', '.join(COMPILERS)})"
        else:
            reason = why_broken(compiler) or ""
        if compiler is None or reason:
            for name, value in (("CUDA", cuda_wanted), ("NATIVE", wanted)):
                if value == "1":
                    raise BuildError(f"MMFUSE_{name}=1, but {reason}; CXX chooses a compiler.")
            return [], dict.fromkeys(("cpu", "cuda"), reason)
        torch, nvcc = find_torch(), find_nvcc()
        recipe = Recipe(compiler, torch, KEPT, KEPT)
        recipe.objects.mkdir(parents=True, exist_ok=True)
        libraries = [recipe.cpu(), recipe.facts(module)]
        cuda, reason = wants_cuda(torch, nvcc)
        if cuda:
            libraries.append(recipe.cuda(str(nvcc)))
        optional = {"_C"}
        if cuda_wanted != "1":
            optional |= {"cuda"} if wanted == "1" else {"cuda", "cpu"}
        tools = recipe.tools(nvcc if cuda else None)
        notes = build_all(libraries, optional, recipe.objects, tools)
        built = [library for library in libraries if library.name not in notes]
        return built, notes if cuda else notes | {"cuda": reason}


if __name__ == "__main__":
    setup(ext_modules=[Extension("mmfuse._C", [])], cmdclass={"build_ext": BuildKernels})
