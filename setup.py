"""Builds what this machine can build; metadata and options live in pyproject.toml.

Each backend is a library of its own without Python in it, mmfuse/libmmfuse_<backend>.so; mmfuse._C
only says how they were built. PyTorch's headers are found on disk and never imported, so that a
build in isolation works against the PyTorch that is installed. Environment: MMFUSE_CUDA=auto|0|1,
CXX, CXXFLAGS, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: nothing newer of the stable ABI is used
DEFAULT_ARCHS = ("8.0", "9.0", "10.0")  # those that nvcc knows, and PTX of the highest
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class BuildError(SystemExit):
    """One sentence, without a traceback; `reason` is what `python -m mmfuse` shows later."""

    def __init__(self, sentence: str, reason: str | None = None) -> None:
        super().__init__(f"mmfuse: {sentence}")
        self.reason = reason or sentence


Commands = list[list[str]]


@dataclass
class Library:
    """The commands that compile the objects of a backend or of _C, and the one that links them."""

    name: str
    compile: Commands
    link: list[str]


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


def torch_cuda(torch: Path) -> str | None:
    """The CUDA version that this PyTorch was built for, from its version file; None on the CPU."""
    version = (torch / "version.py").read_text()
    found = re.search(r"^cuda\s*(?::[^=]*)?=\s*['\"]([\d.]+)", version, re.MULTILINE)
    return found[1] if found else None


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
    elif torch_cuda(torch) is None:
        reason = "the PyTorch at build time was a CPU build"
    else:
        try:
            same_cuda(nvcc, str(torch_cuda(torch)))
            architectures(nvcc)
        except BuildError as error:
            reason = error.reason
    if reason and mode == "1":
        raise BuildError(f"MMFUSE_CUDA=1, but {reason}.")
    return not reason, reason


def nvcc_says(nvcc: str, option: str, pattern: str) -> list[str]:
    """What a pattern finds in nvcc's answer to an option; nothing where it does not know it."""
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


def jobs() -> int:
    """MAX_JOBS, or one per core but no more than memory allows (about 2 GiB a compiler)."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if os.name == "posix" else 0
    return max(1, min(os.cpu_count() or 1, memory // 2**31 or 1))


@dataclass
class Recipe:
    """How each library is compiled and linked.

    Attributes:
        compiler: The C++ compiler's command.
        torch: PyTorch's folder.
        objects: The folder of the object files.
        output: The folder of the libraries.
    """

    compiler: str
    torch: Path
    objects: Path
    output: Path

    def cpu(self) -> Library:
        """libmmfuse_cpu.so."""
        sources = [*sorted((CSRC / "cpu").rglob("*.cpp")), CSRC / "facts" / "cpu.cpp"]
        return self._torch_library("cpu", sources, [], [], [])

    def cuda(self, nvcc: str) -> Library:
        """libmmfuse_cuda.so; the CUDA runtime is linked statically."""
        home = Path(nvcc).resolve().parent.parent
        archs = architectures(nvcc)
        command = [nvcc, *NVCC_FLAGS, *gencode_flags(archs), f"-I{CSRC}"]
        kernels = self._compile("cuda", command, sorted((CSRC / "cuda").glob("*.cu")))
        glue = [*sorted((CSRC / "cuda").glob("*.cpp")), CSRC / "facts" / "cuda.cpp"]
        options = ["-DUSE_CUDA", f'-DMMFUSE_CUDA_ARCHS="{archs}"', f"-isystem{home / 'include'}"]
        runtime = [f"-L{home / 'lib64'}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        return self._torch_library("cuda", glue, options, kernels, ["-ltorch_cuda", *runtime])

    def facts(self, output: Path) -> Library:
        """mmfuse._C: pybind11 and nothing of PyTorch, whose copy of its headers is used."""
        package = importlib.util.find_spec("pybind11")
        folders = [Path(package.origin).parent / "include"] if package and package.origin else []
        folders += [self.torch / "include", Path(sysconfig.get_path("include"))]
        flags = self._flags()
        described = [*flags, f"-DMMFUSE_FLAGS={json.dumps(' '.join(flags))}"]
        headers = [f"-I{CSRC}", *(f"-isystem{folder}" for folder in folders)]
        command = [*shlex.split(self.compiler), *described, *headers]
        compile_ = self._compile("_C", command, [CSRC / "facts" / "module.cpp"])
        return Library("_C", compile_, self._link(compile_, [], output))

    def _torch_library(
        self, name: str, sources: list[Path], options: list[str], kernels: Commands, link: list[str]
    ) -> Library:
        target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
        headers = [target, f"-I{CSRC}", f"-isystem{self.torch / 'include'}", *options]
        command = [*shlex.split(self.compiler), *self._flags(), *headers]
        compile_ = [*kernels, *self._compile(name, command, sources)]
        link = [f"-L{self.torch / 'lib'}", "-ltorch_cpu", "-lc10", *link]
        return Library(
            name, compile_, self._link(compile_, link, self.output / f"libmmfuse_{name}.so")
        )

    def _flags(self) -> list[str]:
        return [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]

    def _compile(self, name: str, command: list[str], sources: list[Path]) -> Commands:
        objects = [str(self.objects / f"{name}_{source.name}.o") for source in sources]
        pairs = zip(sources, objects, strict=True)
        return [[*command, "-c", str(source), "-o", o] for source, o in pairs]

    def _link(self, compiled: Commands, link: list[str], output: Path) -> list[str]:
        if sys.platform == "darwin":
            link = [*link, "-undefined", "dynamic_lookup"]
        objects = [command[-1] for command in compiled]
        return [*shlex.split(self.compiler), "-shared", *objects, *link, "-o", str(output)]


def build_all(libraries: list[Library], optional: set[str]) -> dict[str, str]:
    """Compiles side by side, links each library, and returns why an optional one did not build.

    Raises:
        BuildError: a library that is not optional failed.
    """
    notes = {}
    with ThreadPoolExecutor(jobs()) as pool:
        started = [[pool.submit(run_compiler, c) for c in library.compile] for library in libraries]
        for library, objects in zip(libraries, started, strict=True):
            try:
                for one in objects:
                    one.result()
                run_compiler(library.link)
            except BuildError as error:
                if library.name not in optional:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                for one in objects:
                    one.cancel()
                print(error, file=sys.stderr)
                notes[library.name] = f"it did not build: {error.reason}"
    return notes


def run_compiler(command: list[str]) -> None:
    """Runs one compiler; what it prints is what the user needs when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).splitlines()
        first = next((line for line in said if "error" in line.lower()), "".join(said[:1]))
        raise BuildError(f"this command failed:\n{shlex.join(command)}\n{done.stderr}", first)
    if done.stderr:
        print(done.stderr, file=sys.stderr)


class BuildKernels(build_ext):
    """Compiles csrc/, and notes why a backend was left out."""

    def run(self) -> None:
        """Builds in place for `pip install -e`, into the wheel otherwise."""
        module = Path(self.get_ext_fullpath("mmfuse._C"))
        module.parent.mkdir(parents=True, exist_ok=True)
        for stale in (module, *module.parent.glob("libmmfuse_*.so")):
            stale.unlink(missing_ok=True)
        notes = self._build(module)
        (module.parent / "_build.json").write_text(json.dumps(notes, indent=2) + "\n")
        for name, reason in notes.items():
            what = "the facts of the build" if name == "_C" else f"the {name} backend"
            print(f"mmfuse: WARNING: without {what}: {reason}", file=sys.stderr)

    def get_source_files(self) -> list[str]:
        """What a source distribution must hold."""
        return [str(p.relative_to(ROOT)) for p in sorted(CSRC.rglob("*.*"))]

    def _build(self, module: Path) -> dict[str, str]:
        if os.environ.get("MMFUSE_NATIVE", "1") == "0":
            return dict.fromkeys(("cpu", "cuda"), "switched off at build time by MMFUSE_NATIVE=0")
        demanded = os.environ.get("MMFUSE_CUDA") == "1"
        compiler = find_compiler()
        if compiler is None:
            reason = "no C++ compiler was found at build time (looked for CXX, c++, g++, clang++)"
            if demanded:
                raise BuildError(f"MMFUSE_CUDA=1, but {reason}.")
            return dict.fromkeys(("cpu", "cuda"), reason)
        torch, nvcc = find_torch(), find_nvcc()
        recipe = Recipe(compiler, torch, Path(self.build_temp), module.parent)
        recipe.objects.mkdir(parents=True, exist_ok=True)
        libraries = [recipe.cpu(), recipe.facts(module)]
        cuda, reason = wants_cuda(torch, nvcc)
        if cuda:
            libraries.append(recipe.cuda(str(nvcc)))
        notes = build_all(libraries, optional={"_C"} if demanded else {"_C", "cuda"})
        return notes if cuda else notes | {"cuda": reason}


if __name__ == "__main__":
    setup(ext_modules=[Extension("mmfuse._C", [])], cmdclass={"build_ext": BuildKernels})
