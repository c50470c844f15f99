"""The tools of a build for aarch64 elsewhere: a compiler, and stubs of PyTorch's libraries.

The kernels' libraries name PyTorch's, and take from them only what is looked up when they are
loaded; an empty library of the same name is enough to link against.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

TRIPLE = "aarch64-linux-gnu"
COMPILER = f"{TRIPLE}-g++"
STUBS = ("libtorch_cpu.so", "libc10.so")


def stub(compiler: str, folder: Path, name: str) -> list[str]:
    """The command that makes an empty library of a name."""
    options = ["-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{name}", "-x", "c", "/dev/null"]
    return [compiler, *options, "-o", str(folder / name)]


def cross_environment(folder: Path, run: Callable[[list[str]], None]) -> dict[str, str]:
    """Makes the stubs, and returns the variables of a build for aarch64."""
    if shutil.which(COMPILER) is None:
        print(f"a wheel for aarch64 needs {COMPILER}, which was not found", file=sys.stderr)
        raise SystemExit(2)
    folder.mkdir(parents=True, exist_ok=True)
    for name in STUBS:
        run(stub(COMPILER, folder, name))
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    return {
        # The linker passes over libraries of another processor. Without a symbol to take from the
        # stubs it would leave their names out.
        "CXX": shlex.join([COMPILER, f"-L{folder}", "-Wl,--no-as-needed"]),
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "SETUPTOOLS_EXT_SUFFIX": re.sub(r"-\w+-linux-gnu", f"-{TRIPLE}", suffix),
        "MMFUSE_CUDA": "0",
    }
