"""Setuptools' build backend, which asks for PyTorch and ninja as well where there is none.

The headers of PyTorch are all that is needed of it, and one that is installed is found from a build
in isolation, too. If there is none (`uv pip install`, `python -m build`, a machine without
PyTorch) the front end has to bring it: plain `torch` is what mmfuse itself will depend on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from setuptools import build_meta

from .finding import (
    BuildError,
    find_compiler,
    find_ninja,
    find_torch,
    is_portable,
    jobs,
    mode,
)
from .pythons import interpreters
from .recipe import ROOT

TORCH = "torch>=2.11"
NINJA = "ninja>=1.11"

build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel

Settings = Mapping[str, Any] | None


def check_folder() -> None:
    """Raises BuildError where this user may not write into the folder that is built."""
    if not os.access(ROOT, os.W_OK):
        raise BuildError(
            f"a build writes into {ROOT}, which this user may not do; copy the folder and install "
            "from the copy."
        )


def missing() -> list[str]:
    """The packages that compiling needs here, beyond those of pyproject.toml.

    Raises:
        BuildError: a setting cannot be followed, said before anything is fetched.
    """
    check_folder()
    if mode("MMFUSE_NATIVE") == "0" or find_compiler() is None:
        return []
    mode("MMFUSE_CUDA")
    is_portable()
    jobs()
    interpreters()
    needed = [] if find_ninja() else [NINJA]
    try:
        find_torch()
    except BuildError:
        needed.append(TORCH)
    return needed


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Setuptools' requirements, and those of the compilation."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *missing()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """The same for `pip install -e`."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *missing()]


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Setuptools' wheel; without isolation nobody has asked for requirements before."""
    check_folder()
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """The same for `pip install -e`."""
    check_folder()
    return str(build_meta.build_editable(wheel_directory, config_settings, metadata_directory))
