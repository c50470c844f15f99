"""Loads each backend's library, on its own, and remembers why one is missing."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_LIBRARIES = ("cpu", "cuda")

#: Native backends whose kernels are registered in this process, and what their libraries say.
_loaded: dict[str, dict[str, str]] = {}
_load_errors: dict[str, str] = {}


def _build_notes() -> dict[str, str]:
    """The note that setup.py wrote about kernels that it could not build."""
    try:
        notes = json.loads((_FOLDER / "_build.json").read_text(encoding="utf-8"))
        missing: dict[str, str] = notes["missing"]
    except (OSError, ValueError, KeyError):
        return {}
    return missing


def _facts(path: Path, backend: str) -> dict[str, str]:
    """The facts that a library exports about itself; none if setup.py did not make it."""
    function = getattr(ctypes.CDLL(str(path)), f"mmfuse_{backend}_facts", None)
    if function is None:
        return {}
    function.restype = ctypes.c_char_p
    lines = function().decode().splitlines()
    return {key: value for key, _, value in (line.partition(" ") for line in lines)}


def load_library(path: str | Path, backend: str) -> None:
    """Loads kernels built outside the package, for `backend`, into this process.

    Raises:
        OSError: there is no such library, or it cannot be loaded.
    """
    path = Path(path).resolve()
    torch.ops.load_library(str(path))
    _loaded[backend] = _loaded.get(backend, {}) | _facts(path, backend)


def _why_stale(backend: str) -> str | None:
    """Returns why a loaded library does not fit the checkout around it; None without a checkout."""
    built, tool = _loaded[backend].get("sources"), _FOLDER.parent / "build_tools" / "sources.py"
    spec = importlib.util.spec_from_file_location("mmfuse_sources", tool)
    if built is None or spec is None or spec.loader is None or not tool.is_file():
        return None
    sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sources)
    if not sources.CSRC.is_dir() or sources.library_digest(backend) == built:
        return None
    return (
        f"it was built from other sources than those in {sources.CSRC}: run `pip install -e .` "
        "(or `make build`) there again"
    )


def _load() -> None:
    for backend in _LIBRARIES:
        path = _FOLDER / f"libmmfuse_{backend}.so"
        if not path.exists():
            continue
        try:
            load_library(path, backend)
        except OSError as error:
            # PyTorch's own sentence leaves out what the loader said.
            _load_errors[backend] = str(error.__cause__ or error)
            continue
        stale = _why_stale(backend)
        if stale is not None:
            _load_errors[backend] = stale
            del _loaded[backend]


def _load_module() -> tuple[Any, str]:
    """mmfuse._C, or None and why; it is for one version of Python."""
    try:
        # Only the one beside these libraries: an editable install may offer another's.
        spec = PathFinder.find_spec("mmfuse._C", [str(_FOLDER)])
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module, ""
    except ImportError as error:
        return None, str(error)
    return None, "mmfuse._C, which knows it and the flags, was not built for this Python"


def _compiler_facts() -> dict[str, str]:
    """Compiler and flags, which `mmfuse._C` knows."""
    if _module is not None:
        return dict(_module.build_info())
    return {"compiler": f"unknown: {_build_notes().get('_C', _why_no_module)}", "flags": ""}


def build_info() -> dict[str, Any] | None:
    """Returns compiler, flags, CUDA version and SIMD level of what is loaded, or None without it.

    Libraries that were built on another machine are described too; their compiler is not known.
    """
    if not _loaded:
        return None
    cpu, cuda = (_loaded.get(backend, {}) for backend in _LIBRARIES)
    return {
        **_compiler_facts(),
        "has_cpu": "cpu" in _loaded,
        "simd": cpu.get("simd"),
        "simd_built": cpu.get("simd_built", "").split(),
        "has_cuda": "cuda" in _loaded,
        "cuda_version": cuda.get("cuda_version"),
        "cuda_architectures": cuda.get("cuda_architectures"),
    }


def why_missing(backend: str) -> str | None:
    """Returns why the native backend cannot run here, or None when it can."""
    if backend in _loaded:
        return None
    if backend in _load_errors:
        return f"libmmfuse_{backend}.so could not be loaded: {_load_errors[backend]}"
    sentence = f"there is no libmmfuse_{backend}.so in {_FOLDER}: it was not built"
    hidden = why_hidden()
    return _build_notes().get(backend, f"{sentence}; {hidden}" if hidden else sentence)


def why_hidden() -> str | None:
    """Returns which installed mmfuse this folder hides, and what to do; None where it hides none.

    In a checkout the folder mmfuse/ comes before the installed package, and has no libraries
    unless they were built in place.
    """
    for folder in sys.path:
        package = (Path(folder) / "mmfuse").resolve()
        if package != _FOLDER.resolve() and (package / "_native.py").is_file():
            return (
                f"{_FOLDER} hides the mmfuse that is installed in {package}: run Python from "
                f"another folder, or install with `pip install -e {_FOLDER.parent}`"
            )
    return None


def why_not_on(capability: tuple[int, int]) -> str | None:
    """Returns why the CUDA kernels cannot run on a GPU of this compute capability, or None."""
    built = _loaded.get("cuda", {}).get("cuda_architectures")
    if built is None or any(_runs_on(arch, capability) for arch in built.split(";")):
        return None
    return (
        f"the cuda backend was built for {built}, which does not include this GPU's compute "
        f"capability {capability[0]}.{capability[1]} (set TORCH_CUDA_ARCH_LIST and build again)"
    )


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """True if code for "8.0", "9.0a" or "10.0+PTX" runs on a GPU."""
    number = arch.removesuffix("+PTX")
    major, minor = (int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):
        return capability == (major, minor)
    if arch.endswith("+PTX") and not number.endswith("f"):
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor


_load()
_module, _why_no_module = _load_module()
#: Reads the gradients of a list of parameters, and makes a table of them, with the parameters and
#: their anchors if those are given; see csrc/python. None where `mmfuse._C` was not built, or
#: PyTorch cannot be read that way.
read_gradients: Callable[..., Any] | None = None
#: The same of lists of gradients, parameters and anchors: whether one is float64, and the table.
read_list: Callable[..., Any] | None = None
#: Likewise, but None where a gradient shares memory with another tensor of the lists.
read_apart: Callable[..., Any] | None = None
try:
    if _module is not None and _module.find_tensors(torch.Tensor, torch.nn.Parameter):
        _module.read_list([], None, None)  # once it took one list
        read_apart = _module.read_apart
        read_gradients, read_list = _module.read_gradients, _module.read_list
# Of other sources: a checkout that was updated, and not built again.
except (TypeError, AttributeError):
    warnings.warn(
        "mmfuse._C was built from other sources; build again (pip install -e . or make build)",
        RuntimeWarning,
        stacklevel=2,
    )
