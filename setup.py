"""Builds what this machine can build; metadata and options live in pyproject.toml.

Each backend is a library of its own without Python in it, mmfuse/libmmfuse_<backend>.so; mmfuse._C
only says how they were built. PyTorch's headers are found on disk and never imported, so that a
build in isolation works against the PyTorch that is installed. build_tools/ has how. Environment:
MMFUSE_NATIVE=auto|0|1, MMFUSE_CUDA=auto|0|1, CXX, CXXFLAGS, TORCH_CUDA_ARCH_LIST, MAX_JOBS, and for
wheels that others get MMFUSE_PORTABLE=1, MMFUSE_PYTHONS (CONTRIBUTING.md, "Distributions").
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
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
from build_tools.pythons import interpreters
from build_tools.readme import for_index
from build_tools.recipe import CSRC, ROOT, Library, Recipe
from build_tools.sources import digest
from build_tools.version import version

# Setuptools' own folder is another one for each `pip install -e`, and ninja's must stay.
KEPT = ROOT / "build" / "native"


class Build(build):
    """Asks for the kernels where there are none, too: the notes say so."""

    sub_commands: ClassVar = [("build_py", None), ("build_ext", None)]


class Wheel(bdist_wheel):
    """A wheel for every Python 3: the libraries hold none, and mmfuse._C is optional."""

    def get_tag(self) -> tuple[str, str, str]:
        """A tag such as py3-none-linux_x86_64; py3-none-any with MMFUSE_NATIVE=0."""
        return "py3", "none", super().get_tag()[2]


class BuildKernels(build_ext):
    """Compiles csrc/, and notes the version, the sources, and why a backend was left out."""

    def run(self) -> None:
        """Builds in place for `pip install -e`, into the wheel otherwise."""
        module = Path(self.get_ext_fullpath("mmfuse._C"))
        folder = module.parent
        folder.mkdir(parents=True, exist_ok=True)
        libraries, notes = self._build(module.name)
        built = {library.path.name: library.path for library in libraries}
        # In the checkout _C of several Pythons take turns; a wheel has those of this build.
        modules = [module] if self.inplace else [*folder.glob("_C.*")]
        for stale in (*modules, *folder.glob("libmmfuse_*.so")):
            if stale.name not in built:
                stale.unlink(missing_ok=True)
        for name, path in built.items():
            # A process that has the old file open keeps it.
            partial = folder / f"{name}.{os.getpid()}"
            shutil.copy2(path, partial)
            partial.replace(folder / name)
        written = {
            "version": self.distribution.get_version(),
            "missing": notes,
            # The benchmark holds the sources against it.
            "sources": digest(CSRC),
        }
        (folder / "_build.json").write_text(json.dumps(written, indent=2) + "\n")
        for name, reason in notes.items():
            what = "the facts of the build" if name == "_C" else f"the {name} backend"
            print(f"mmfuse: WARNING: without {what}: {reason}", file=sys.stderr)
        if any("did not build" in reason for reason in notes.values()):
            print(f"mmfuse: {WAY_OUT}", file=sys.stderr)

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
        own, *others = interpreters()
        libraries = [recipe.cpu(), recipe.facts(module, own.include)]
        for other in others:
            name = f"_C{other.suffix}"
            libraries.append(recipe.facts(name, other.include, name))
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
    setup(
        version=version(),
        long_description=for_index(),
        long_description_content_type="text/markdown",
        ext_modules=[] if mode("MMFUSE_NATIVE") == "0" else [Extension("mmfuse._C", [])],
        cmdclass={"build": Build, "build_ext": BuildKernels, "bdist_wheel": Wheel},
    )
