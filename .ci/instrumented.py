"""A copy of the checkout whose libraries are compiled in another way, for sanitizers.

The CUDA kernels in the host shim, and the C++ kernels where they have checks of their own: then the
package in the copy has their library, and else none. What has not changed is kept.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from build_tools.compiling import build_all
from build_tools.finding import find_torch
from build_tools.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]


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
        """What tells tests/kernels/cuda_on_cpu how its libraries were built."""
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
        """Copies what git tracks or would track, with its times, beside what is built there."""
        for entry in self.copy.iterdir() if self.copy.exists() else ():
            if entry.is_dir() and entry.name != "build":
                shutil.rmtree(entry)
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.copy / name)

    def _build_cpu(self, compiler: Sequence[str]) -> None:
        """libmmfuse_cpu.so, with setup.py's recipe; what has not changed is kept."""
        os.environ["CXXFLAGS"] = f"{self.flags} {self.checks}"
        recipe = Recipe([*compiler, self.checks], find_torch(), self.output, self.output)
        library = recipe.cpu()
        build_all([library], set(), self.output, recipe.tools())
        shutil.copy2(library.path, self.copy / "mmfuse")
