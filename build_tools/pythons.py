"""The Pythons that a wheel has mmfuse._C for: its own, and those of MMFUSE_PYTHONS.

The kernels' libraries hold no Python, so that one wheel serves all of them. mmfuse._C is for one
version each: the file's name says for which, and Python looks for its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

from .finding import BuildError, words

_ASK = (
    "import json, sysconfig; print(json.dumps("
    "[sysconfig.get_config_var('EXT_SUFFIX'), sysconfig.get_path('include')]))"
)


class Interpreter(NamedTuple):
    """How mmfuse._C is called for a Python, and where its headers are."""

    suffix: str
    include: Path


def own() -> Interpreter:
    """This Python."""
    suffix = os.environ.get("SETUPTOOLS_EXT_SUFFIX") or sysconfig.get_config_var("EXT_SUFFIX")
    return Interpreter(str(suffix), Path(sysconfig.get_path("include")))


def of_program(program: str) -> Interpreter:
    """The Python that a command starts.

    Raises:
        BuildError: there is no such program, or it is no Python.
    """
    try:
        done = subprocess.run([program, "-c", _ASK], capture_output=True, text=True, check=True)
        suffix, include = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"MMFUSE_PYTHONS names {program}, which does not work as a Python ({error}); it takes "
            "programs, such as MMFUSE_PYTHONS='python3.10 python3.12'."
        ) from None
    return Interpreter(for_target(suffix), Path(include))


def for_target(suffix: str) -> str:
    """The suffix where another processor is compiled for, which _PYTHON_HOST_PLATFORM names."""
    target = os.environ.get("_PYTHON_HOST_PLATFORM", "").rpartition("-")[2]
    return re.sub(r"-\w+-linux-", f"-{target}-linux-", suffix) if target else suffix


def interpreters() -> list[Interpreter]:
    """This Python, and the further ones of MMFUSE_PYTHONS, each once."""
    found = [own(), *(of_program(program) for program in words("MMFUSE_PYTHONS"))]
    return list({one.suffix: one for one in found}.values())
