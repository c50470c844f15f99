"""`make gpu-library`: it builds a toy of each library, and refuses mistakes."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from cuda_on_cpu.build import CSRC

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "g++")

FACTS = ("csrc/facts/cpu.cpp", "csrc/facts/cuda.cpp", "csrc/glue/poison.h")
GLUE = """
extern "C" int aoti_torch_get_current_cuda_stream(int index, void** stream);
int probe(void** stream) { return aoti_torch_get_current_cuda_stream(0, stream); }
"""
# Says what nvcc says, and compiles a kernel without CUDA in it.
NVCC = f"""#!/bin/sh
echo "$*" >> "$0.log"
case "$*" in
  --version) echo "release 13.0, V13.0.88" ;;
  --list-gpu-arch) printf 'compute_%s\\n' 80 90 100 ;;
  *) for last in "$@"; do :; done; {COMPILER} -x c++ -fPIC -c /dev/null -o "$last" ;;
esac
"""


@pytest.fixture
def script() -> ModuleType:
    path = ROOT / ".ci" / "gpu_library.py"
    spec = importlib.util.spec_from_file_location("gpu_library", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A checkout with one line of glue and an empty kernel, and beside it a toolkit."""
    checkout = tmp_path / "checkout"
    for name in (".ci/gpu_library.py", *FACTS):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    shutil.copytree(ROOT / "build_tools", checkout / "build_tools")
    for name in ("cpu/simd", "cuda"):
        (checkout / "csrc" / name).mkdir(parents=True)
    for name in ("simd.h", "simd.cpp"):
        shutil.copy(CSRC / "cpu" / "simd" / name, checkout / "csrc" / "cpu" / "simd")
    (checkout / "csrc" / "cuda" / "empty_kernel.cu").touch()
    (checkout / "csrc" / "cuda" / "glue.cpp").write_text(GLUE)
    toolkit = tmp_path / "toolkit"
    for name in ("bin", "include", "lib64"):
        (toolkit / name).mkdir(parents=True)
    (toolkit / "bin" / "nvcc").write_text(NVCC)
    (toolkit / "bin" / "nvcc").chmod(0o755)
    (toolkit / "include" / "cuda_runtime_api.h").write_text("#define CUDART_VERSION 13000\n")
    subprocess.run(["ar", "rc", toolkit / "lib64" / "libcudart_static.a"], check=True)
    return checkout


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("MMFUSE_", "TORCH_CUDA"))}
    keep["CUDA_HOME"] = str(checkout.parent / "toolkit")
    return subprocess.run(
        [sys.executable, ".ci/gpu_library.py"],
        cwd=checkout,
        env=keep | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_both_libraries_are_built(toy: Path, script: ModuleType) -> None:
    done = build(toy)
    assert done.returncode == 0, done.stderr
    output = toy / "build" / "gpu_library"
    assert sorted(p.name for p in output.iterdir()) == ["libmmfuse_cpu.so", "libmmfuse_cuda.so"]
    for line, backend in zip(done.stdout.splitlines(), ("cpu", "cuda"), strict=False):
        assert line.startswith(f"{output / f'libmmfuse_{backend}.so'}: 0.0 MB, glibc 2.")
    assert "built for 9.0 in " in done.stdout.splitlines()[2]
    entries = "\n".join(script.lines("readelf", "-d", output / "libmmfuse_cuda.so"))
    assert "[libtorch_cuda.so]" in entries
    stub = toy / "build" / "gpu_library_objects" / "libtorch_cuda.so"
    assert "SONAME" in "\n".join(script.lines("readelf", "-d", stub))
    assert "RPATH" not in entries and "RUNPATH" not in entries
    entries = "\n".join(script.lines("readelf", "-d", output / "libmmfuse_cpu.so"))
    assert "libtorch_cuda" not in entries
    facts = ctypes.CDLL(str(output / "libmmfuse_cpu.so")).mmfuse_cpu_facts
    facts.restype = ctypes.c_char_p
    assert facts().startswith(b"simd_built generic")
    assert b"cuda_architectures 9.0\n" in (output / "libmmfuse_cuda.so").read_bytes()


def test_for_the_architectures_that_are_listed(toy: Path) -> None:
    done = build(toy, TORCH_CUDA_ARCH_LIST="8.0;10.0+PTX")
    assert done.returncode == 0, done.stderr
    assert "built for 8.0;10.0+PTX in " in done.stdout
    (command,) = [
        line
        for line in (toy.parent / "toolkit" / "bin" / "nvcc.log").read_text().splitlines()
        if "empty_kernel.cu" in line
    ]
    assert [word for word in command.split() if "gencode" in word] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    done = build(toy, TORCH_CUDA_ARCH_LIST="7.0")
    assert done.returncode == 1
    assert "TORCH_CUDA_ARCH_LIST names 7.0, which" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_undefined_symbol_is_found_here(toy: Path) -> None:
    """The link on this machine finds it, not the GPU machine."""
    (toy / "csrc" / "cuda" / "glue.cpp").write_text("void nowhere();\nvoid f() { nowhere(); }\n")
    done = build(toy)
    assert done.returncode == 1
    assert "undefined reference to `nowhere()'" in done.stderr
    assert not (toy / "build" / "gpu_library" / "libmmfuse_cuda.so").exists()


def test_without_nvcc_it_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "find_nvcc", lambda: None)
    assert script.main([]) == 2
    assert capsys.readouterr().err == "make gpu-library needs nvcc, which was not found\n"
    monkeypatch.setattr(script, "find_compiler", lambda: None)
    assert script.main([]) == 2
    assert "needs a C++ compiler and nvcc, which" in capsys.readouterr().err


def library(tmp_path: Path, text: str, *options: str) -> Path:
    source = tmp_path / "source.c"
    source.write_text(text)
    path = tmp_path / "libmmfuse_cuda.so"
    command = [COMPILER, "-shared", "-fPIC", "-x", "c", source, *options, "-o", path]
    subprocess.run([str(word) for word in command], check=True)
    return path


def test_what_would_not_load_elsewhere(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = library(tmp_path, "#include <string.h>\nint f(char* s) { return (int)strlen(s); }\n")
    assert script.faults(plain, "cpu") == []
    assert script.faults(plain, "cuda") == [
        "libmmfuse_cuda.so does not name libtorch_cuda.so, which must be loaded before it"
    ]
    monkeypatch.setattr(script, "NEWEST_GLIBC", (2, 0))
    (fault,) = script.faults(plain, "cpu")
    assert "libmmfuse_cuda.so needs glibc 2." in fault
    monkeypatch.undo()
    python = library(
        tmp_path, "long PyLong_AsLong(void*);\nlong f(void* x) { return PyLong_AsLong(x); }\n"
    )
    assert script.faults(python, "cpu") == ["libmmfuse_cuda.so needs Python's PyLong_AsLong"]


def test_the_newest_glibc_is_the_highest_number(script: ModuleType) -> None:
    symbols = ["U a@GLIBC_2.2.5", "U b@GLIBC_2.34", "U c@GLIBC_2.4", "U d@GLIBCXX_3.4.30", "U e"]
    assert script.newest_glibc(symbols) == (2, 34)
    assert script.newest_glibc(["U e"]) == ()
