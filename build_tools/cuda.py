"""Finds out if CUDA kernels can be built here, and for which architectures."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from .finding import BuildError, mode

DEFAULT_ARCHS = ("8.0", "9.0", "10.0")  # those that nvcc knows, and PTX of the highest


def torch_cuda(torch: Path) -> str | None:
    """The CUDA version that this PyTorch was built for, from its version file; None on the CPU."""
    version = (torch / "version.py").read_text()
    found = re.search(r"^cuda\s*(?::[^=]*)?=\s*['\"]([\d.]+)", version, re.MULTILINE)
    return found[1] if found else None


def wants_cuda(torch: Path, nvcc: str | None) -> tuple[bool, str]:
    """True to build CUDA kernels; and else why not."""
    wanted = mode("MMFUSE_CUDA")
    reason = ""
    if wanted == "0":
        reason = "switched off at build time by MMFUSE_CUDA=0"
    elif nvcc is None:
        reason = "nvcc was not found at build time (looked at CUDA_HOME, CUDA_PATH and PATH)"
    elif torch_cuda(torch) is None:
        reason = "the PyTorch at build time was a CPU build"
    else:
        try:
            same_cuda(nvcc, str(torch_cuda(torch)))
            architectures(nvcc)
        except BuildError as error:
            reason = error.reason
    if reason and wanted == "1":
        raise BuildError(f"MMFUSE_CUDA=1, but {reason}; unset it to install without these kernels.")
    return not reason, reason


def nvcc_says(nvcc: str, option: str, pattern: str) -> list[str]:
    """A pattern's matches in nvcc's answer to an option; none if it does not know it."""
    done = subprocess.run([nvcc, option], capture_output=True, text=True, check=False)
    return re.findall(pattern, done.stdout)


def same_cuda(nvcc: str, of_torch: str) -> None:
    """Raises BuildError where nvcc and PyTorch are of different major versions of CUDA."""
    for of_nvcc in nvcc_says(nvcc, "--version", r"release ([\d.]+)"):
        if of_nvcc.split(".")[0] != of_torch.split(".")[0]:
            raise BuildError(
                f"nvcc at build time was of CUDA {of_nvcc} and PyTorch of CUDA {of_torch}; their "
                "major versions must be the same (CUDA_HOME chooses another nvcc)"
            )


def architectures(nvcc: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or those of the defaults that nvcc knows: "8.0;9.0;10.0+PTX".

    Raises:
        BuildError: nvcc does not know an architecture of the list, or none of the defaults.
    """
    numbers = set(nvcc_says(nvcc, "--list-gpu-arch", r"compute_(\d+)"))
    known = sorted((f"{number[:-1]}.{number[-1]}" for number in numbers), key=float)
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    archs = [arch for arch in listed.split(";") if arch]
    for arch in archs:
        # A letter behind the number asks for what this architecture alone has: 9.0a.
        if arch.removesuffix("+PTX").rstrip("af") not in known:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST names {arch}, which {nvcc} does not know; it knows "
                f"{', '.join(known)}"
            )
    if not archs:
        archs = [arch for arch in DEFAULT_ARCHS if arch in known]
        if not archs:
            raise BuildError(f"{nvcc} knows none of {', '.join(DEFAULT_ARCHS)}")
        archs[-1] += "+PTX"
    return ";".join(archs)


def gencode_flags(archs: str) -> list[str]:
    """Nvcc's flags for architectures such as "8.0;9.0+PTX"."""
    flags = []
    for arch in archs.split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
