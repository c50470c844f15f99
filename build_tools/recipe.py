"""How each library is compiled and linked."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .cuda import architectures, gencode_flags
from .finding import first_line, is_portable, torch_version, words
from .sources import CSRC, library_digest

ROOT = Path(__file__).resolve().parents[1]
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: nothing newer of the stable ABI is used
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# A wheel that others get takes nothing newer of glibc or libstdc++ than PyTorch's own wheels need.
PORTABLE = ["-include", str(CSRC / "portable" / "manylinux.h")]


@dataclass
class Compilation:
    """A source, its object, and the command, which lists all headers in `<object>.d`."""

    source: Path
    object: Path
    command: list[str]


@dataclass
class Library:
    """A backend's library, or _C: its objects, and the command that links them."""

    name: str
    path: Path
    compile: list[Compilation]
    link: list[str]


@dataclass
class Recipe:
    """How each library is compiled and linked.

    Attributes:
        compiler: The C++ compiler's command.
        torch: PyTorch's folder.
        objects: The folder of the object files.
        output: The folder of the libraries.
    """

    compiler: list[str]
    torch: Path
    objects: Path
    output: Path

    def cpu(self) -> Library:
        """libmmfuse_cpu.so."""
        sources = sorted((CSRC / "cpu").rglob("*.cpp"))
        return self._torch_library("cpu", sources, [], [], [])

    def cuda(self, nvcc: str) -> Library:
        """libmmfuse_cuda.so; the CUDA runtime is linked statically."""
        home = Path(nvcc).resolve().parent.parent
        archs = architectures(nvcc)
        command = [nvcc, *NVCC_FLAGS, *gencode_flags(archs), f"-I{CSRC}"]
        kernels = self._compile("cuda", command, sorted((CSRC / "cuda").glob("*.cu")))
        glue = sorted((CSRC / "cuda").glob("*.cpp"))
        options = ["-DUSE_CUDA", f'-DMMFUSE_CUDA_ARCHS="{archs}"', f"-isystem{home / 'include'}"]
        runtime = [f"-L{home / 'lib64'}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        return self._torch_library("cuda", glue, options, kernels, ["-ltorch_cuda", *runtime])

    def facts(self, name: str, include: Path, library: str = "_C") -> Library:
        """mmfuse._C in a file of this name; of PyTorch it takes at most the copy of pybind11.

        Args:
            name: The file's name, which says for which Python it is.
            include: The folder of that Python's headers.
            library: The library's name in what is said of it.
        """
        folders = [*self._pybind11(), self.torch / "include", include]
        flags = self._flags()
        described = [*flags, f"-DMMFUSE_FLAGS={json.dumps(' '.join(flags))}"]
        headers = [f"-I{CSRC}", *(f"-isystem{folder}" for folder in folders)]
        command = [*self.compiler, *described, *self._elsewhere(include), *headers]
        # Its file's name says for which Python it is: several take turns in the folder.
        compile_ = self._compile(name, command, [CSRC / "facts" / "module.cpp"])
        return self._library(library, self.output / name, compile_, [])

    def tools(self, nvcc: str | None = None) -> str:
        """The versions of what compiles; where another one lies in its place all is compiled."""
        lines = [first_line([*self.compiler, "--version"]), f"PyTorch {torch_version(self.torch)}"]
        if nvcc is not None:
            lines.append(first_line([nvcc, "--version"]))
        return "\n".join(lines) + "\n"

    def _pybind11(self) -> list[Path]:
        """A copy of the package's headers, whose folder is another in each build in isolation."""
        package = importlib.util.find_spec("pybind11")
        if package is None or package.origin is None:
            return []  # PyTorch has a copy
        headers = Path(package.origin).parent / "include"
        copy, version = self.objects / "pybind11", Path("pybind11", "detail", "common.h")
        if not (headers / version).is_file():
            return []
        if not (copy / version).is_file() or not same_text(headers / version, copy / version):
            shutil.rmtree(copy, ignore_errors=True)
            # With the times of now, by which ninja sees that the headers are others.
            shutil.copytree(headers, copy, copy_function=shutil.copyfile)
        return [copy]

    def _torch_library(
        self,
        name: str,
        sources: list[Path],
        options: list[str],
        kernels: list[Compilation],
        link: list[str],
    ) -> Library:
        target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
        headers = [target, f"-I{CSRC}", f"-isystem{self.torch / 'include'}", *options]
        command = [*self.compiler, *self._flags(), *self._elsewhere(), *headers]
        # The facts alone know the sources: a change of one compiles no other.
        stamped = [*command, f'-DMMFUSE_SOURCES="{library_digest(name)}"']
        facts = self._compile(name, stamped, [CSRC / "facts" / f"{name}.cpp"])
        compile_ = [*kernels, *self._compile(name, command, sources), *facts]
        link = [f"-L{self.torch / 'lib'}", "-ltorch_cpu", "-lc10", *link]
        return self._library(name, self.output / f"libmmfuse_{name}.so", compile_, link)

    def _flags(self) -> list[str]:
        return [*CXX_FLAGS, *words("CXXFLAGS")]

    def _elsewhere(self, python: Path | None = None) -> list[str]:
        """Flags by which a library holds no path of this machine, and loads on others."""
        paths = [(ROOT, "mmfuse"), (self.torch, "torch"), (self.objects, "build")]
        paths += [(python, "python")] if python is not None else []
        # Compilers take the last that fits: the folder of the objects is mostly in the checkout.
        mapped = [f"-fmacro-prefix-map={path}={name}" for path, name in paths]
        return [*mapped, *(PORTABLE if is_portable() else [])]

    def _compile(self, name: str, command: list[str], sources: list[Path]) -> list[Compilation]:
        made = []
        for source in sources:
            object_ = self.objects / f"{name}_{source.name}.o"
            files = ["-MD", "-MF", f"{object_}.d", "-c", str(source), "-o", str(object_)]
            made.append(Compilation(source, object_, [*command, *files]))
        return made

    def _library(
        self, name: str, path: Path, compile_: list[Compilation], link: list[str]
    ) -> Library:
        if sys.platform == "darwin":
            link = [*link, "-undefined", "dynamic_lookup"]
        objects = [str(one.object) for one in compile_]
        command = [*self.compiler, "-shared", *objects, *link, "-o", str(path)]
        return Library(name, path, compile_, command)


def same_text(one: Path, other: Path) -> bool:
    """True if two files hold the same bytes."""
    return one.read_bytes() == other.read_bytes()
