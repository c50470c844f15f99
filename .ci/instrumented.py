"""A copy of the checkout whose libraries are compiled in another way, for sanitizers.

The CUDA kernels in the host shim, and the C++ kernels where they have checks of their own: then the
package in the copy has their library, and else none. Files that have not changed are kept.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkout import copy_checkout

from build_tools.compiling import build_all
from build_tools.finding import find_compiler, find_torch
from build_tools.recipe import Recipe


def runtimes(compiler: Sequence[str], names: Sequence[str]) -> list[str]:
    """The libraries of these names that have to be loaded first, as far as GCC has them."""
    answers = []
    for name in names:
        command = [*compiler, f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        answers.append(done.stdout.strip())
    # Without such a file the answer is the name alone; Clang's runtimes have others.
    return [path for path in answers if Path(path).is_absolute() and Path(path).exists()]


@dataclass(frozen=True)
class Build:
    """The copy, and how its libraries are compiled.

    Attributes:
        output: The folder of the copy and of what is built.
        shim: Flags of all that the shim is made of.
        kernels: Flags of the CUDA kernels alone.
        checks: Flags of the C++ kernels' compiler and linker; none: they are not built,
        flags: and of their compiler alone.
    """

    output: Path
    shim: str
    kernels: str = ""
    checks: str = ""
    flags: str = ""

    @property
    def copy(self) -> Path:
        """The copy of the checkout."""
        return self.output / "checkout"

    @property
    def environment(self) -> dict[str, str]:
        """Tells tests/kernels/cuda_on_cpu how its libraries were built."""
        return {"MMFUSE_SHIM_FLAGS": self.shim, "MMFUSE_KERNEL_FLAGS": self.kernels}

    def all(self, compiler: Sequence[str]) -> str:
        """Builds everything, on all cores, and returns the path of the shim's self-check."""
        stamp = self.output / "flags.txt"
        command_of = shlex.join(compiler)
        said = f"{command_of} {self.checks} {self.flags} {self.shim} {self.kernels}"
        if not stamp.exists() or stamp.read_text() != said:
            shutil.rmtree(self.output, ignore_errors=True)
        self._copy_checkout()
        stamp.write_text(said)
        program = "import cuda_on_cpu.build as b; b.build_kernels(); print(b.build_self_check())"
        (folder,) = self.copy.glob("tests/**/cuda_on_cpu")
        environment = {"PYTHONPATH": str(folder.parent), "CXX": command_of, **self.environment}
        command = [sys.executable, "-c", program]
        shim = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        )
        if self.checks:
            self._build_cpu(compiler)
        printed = shim.communicate()[0]
        if shim.returncode:
            raise SystemExit(f"{Path(sys.argv[0]).name}: the host shim does not build")
        return printed.strip()

    def _copy_checkout(self) -> None:
        """Copies the checkout beside what is built there; what has left it goes."""
        for entry in self.copy.iterdir() if self.copy.exists() else ():
            if entry.is_dir() and entry.name != "build":
                shutil.rmtree(entry)
        copy_checkout(self.copy)

    def _build_cpu(self, compiler: Sequence[str]) -> None:
        """libmmfuse_cpu.so, with setup.py's recipe; what has not changed is kept."""
        os.environ["CXXFLAGS"] = f"{self.flags} {self.checks}"
        recipe = Recipe([*compiler, self.checks], find_torch(), self.output, self.output)
        library = recipe.cpu()
        build_all([library], set(), self.output, recipe.tools())
        shutil.copy2(library.path, self.copy / "mmfuse")


def begin(build: Build, names: Sequence[str], needs: str) -> tuple[str, str] | None:
    """Builds everything, and says how long it took; None, and a sentence, without what it needs.

    Args:
        build: The copy, and how it is compiled.
        names: The libraries to be loaded first.
        needs: Of the sentence: "make races needs git, and …".

    Returns:
        The path of the shim's self-check, and the value of LD_PRELOAD.
    """
    began = time.monotonic()
    # So that the processes of a run that is cut off end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    compiler = find_compiler()
    preloaded = runtimes(compiler, names) if compiler and shutil.which("git") else []
    if compiler is None or len(preloaded) < len(names):
        print(needs, file=sys.stderr)
        return None
    self_check = build.all(compiler)
    print(f"built in {time.monotonic() - began:.0f} s", flush=True)
    return self_check, " ".join(preloaded)
