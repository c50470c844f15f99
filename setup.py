"""Builds what this machine can build; metadata and options live in pyproject.toml.

PyTorch's headers are found on disk and never imported, so that a build in isolation works against
the PyTorch that is installed. Environment: MMFUSE_CUDA=auto|0|1, CXX, TORCH_CUDA_ARCH_LIST,
MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: nothing newer of the stable ABI is used
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]

NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class BuildError(SystemExit):
    """One sentence, without a traceback."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"mmfuse: {sentence}")


def find_torch() -> Path:
    """PyTorch's folder in the environment that is installed into, or in the build's own."""
    candidates = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    for folder in candidates:
        torch = Path(folder or ".") / "torch"
        if (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return torch
    raise BuildError(
        "PyTorch 2.11 or newer was not found in this environment; install torch first and then "
        "mmfuse, or set MMFUSE_NATIVE=0 to install without compiled kernels."
    )


def torch_is_cuda_build(torch: Path) -> bool:
    """Whether this PyTorch can run CUDA kernels; read from its version file."""
    version = (torch / "version.py").read_text()
    return bool(re.search(r"^cuda\s*(:[^=]*)?=\s*['\"]", version, re.MULTILINE))


def find_compiler() -> str | None:
    """The C++ compiler: CXX if set, else the first that exists."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(shlex.split(name)[0])), None)


def find_nvcc() -> str | None:
    """Nvcc from CUDA_HOME, the PATH or the usual place; torch's own search needs a CUDA torch."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        if (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def wants_cuda(torch: Path, nvcc: str | None) -> tuple[bool, str]:
    """Whether to build CUDA kernels, and why not."""
    mode = os.environ.get("MMFUSE_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise BuildError(f"MMFUSE_CUDA must be auto, 0 or 1, got {mode!r}.")
    reason = ""
    if mode == "0":
        reason = "switched off at build time by MMFUSE_CUDA=0"
    elif nvcc is None:
        reason = "nvcc was not found at build time (looked at CUDA_HOME, CUDA_PATH and PATH)"
    elif not torch_is_cuda_build(torch):
        reason = "the PyTorch at build time was a CPU build"
    if reason and mode == "1":
        raise BuildError(f"MMFUSE_CUDA=1, but {reason}.")
    return not reason, reason


def gencode_flags() -> tuple[list[str], str]:
    """Nvcc's flags for TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0+PTX"."""
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS).replace(" ", ";")
    flags = []
    for arch in filter(None, archs.split(";")):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags, archs


def jobs() -> int:
    """MAX_JOBS, or one per core but no more than memory allows (about 2 GiB a compiler)."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if os.name == "posix" else 0
    return max(1, min(os.cpu_count() or 1, memory // 2**31 or 1))


class BuildKernels(build_ext):
    """Compiles csrc/ into mmfuse._C, and notes why a backend was left out."""

    def run(self) -> None:
        """Builds in place for `pip install -e`, into the wheel otherwise."""
        notes: dict[str, str] = {}
        compiler = find_compiler()
        if os.environ.get("MMFUSE_NATIVE", "1") == "0":
            notes = dict.fromkeys(("cpu", "cuda"), "switched off at build time by MMFUSE_NATIVE=0")
        elif compiler is None:
            reason = "no C++ compiler was found at build time (looked for CXX, c++, g++, clang++)"
            if os.environ.get("MMFUSE_CUDA") == "1":
                raise BuildError(f"MMFUSE_CUDA=1, but {reason}.")
            notes = dict.fromkeys(("cpu", "cuda"), reason)
        else:
            notes = self._compile(compiler)
        target = Path(self.get_ext_fullpath("mmfuse._C")).parent
        target.mkdir(parents=True, exist_ok=True)
        (target / "_build.json").write_text(json.dumps(notes, indent=2) + "\n")
        for backend, reason in notes.items():
            print(f"mmfuse: without the {backend} backend: {reason}", file=sys.stderr)

    def get_source_files(self) -> list[str]:
        """What a source distribution must hold."""
        return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.*"))]

    def _compile(self, compiler: str) -> dict[str, str]:
        torch = find_torch()
        nvcc = find_nvcc()
        cuda, reason = wants_cuda(torch, nvcc)
        build = Path(self.build_temp)
        include = [
            f"-I{ROOT / 'csrc'}",
            f"-isystem{torch / 'include'}",
            f"-isystem{sysconfig.get_path('include')}",
        ]
        defines = []
        flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        module = ROOT / "csrc" / "module.cpp"
        sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), module]
        link = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        commands = []
        described = " ".join(flags)
        if cuda:
            assert nvcc is not None
            home = Path(nvcc).resolve().parent.parent
            gencode, archs = gencode_flags()
            include.append(f"-isystem{home / 'include'}")
            defines += ["-DUSE_CUDA", "-DMMFUSE_WITH_CUDA", f'-DMMFUSE_CUDA_ARCHS="{archs}"']
            sources += sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
            link += ["-ltorch_cuda", f"-L{home / 'lib64'}", "-lcudart_static", "-lrt", "-ldl"]
            link += ["-lpthread"]
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
                nvcc_flags = [*NVCC_FLAGS, *gencode]
                output = build / f"{source.stem}.cu.o"
                commands.append([nvcc, *nvcc_flags, include[0], "-c", str(source), "-o", output])
        defines.append(f'-DMMFUSE_FLAGS="{described}"')
        for source in sources:
            output = build / f"{source.parent.name}_{source.stem}.o"
            # PyTorch 2.11's pybind11 is an error where this is defined.
            target = [] if source == module else [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
            command = [*shlex.split(compiler), *flags, *defines, *target, *include]
            commands.append([*command, "-c", str(source), "-o", output])
        build.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(jobs()) as pool:
            list(pool.map(run_compiler, commands))
        library = Path(self.get_ext_fullpath("mmfuse._C"))
        library.parent.mkdir(parents=True, exist_ok=True)
        objects = [str(command[-1]) for command in commands]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        run_compiler([*shlex.split(compiler), "-shared", *objects, *link, "-o", str(library)])
        return {} if cuda else {"cuda": reason}


def run_compiler(command: list[object]) -> None:
    """Runs one compiler; what it prints is what the user needs when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"this command failed:\n{shlex.join(words)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


if __name__ == "__main__":
    setup(ext_modules=[Extension("mmfuse._C", [])], cmdclass={"build_ext": BuildKernels})
