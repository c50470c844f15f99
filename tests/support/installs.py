"""Runs installs as a user does, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parents[2]


def run(command: list, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("MMFUSE_", "TORCH_CUDA"))}
    return subprocess.run(
        words, cwd=cwd, env=keep | env, capture_output=True, text=True, check=False
    )


def bare_python(tmp_path: Path) -> tuple[Path, str]:
    """A virtual environment with setuptools and nothing else, setuptools-scm neither."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    packages = tmp_path / "packages"
    packages.mkdir()
    home = Path(setuptools.__file__).parent
    for part in (*home.parent.glob("setuptools*"), home.parent / "_distutils_hack"):
        if part.name.startswith("setuptools_scm"):  # which needs more packages
            continue
        (packages / part.name).symlink_to(part)
    return tmp_path / "bare" / "bin" / "python", str(packages)
