"""make memcheck counts memcheck's reports about our libraries; CI runs the rest of it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "memcheck.py"

# One report of each kind: in our library, in a callee of it, and in PyTorch, called by ours.
LOG = """\
==7== Memcheck, a memory error detector
==7== Conditional jump or move depends on uninitialised value(s)
==7==    at 0x2F: at::native::to(at::Tensor const&) (in /torch/lib/libtorch_cpu.so)
==7==    by 0x3A: mmfuse::cpu::grad_stats() (in /mmfuse/libmmfuse_cpu.so)
==7==
**7** section first
==7== Use of uninitialised value of size 8
==7==    at 0x2F4C: mmfuse::cpu::generic::ScoreRow::grads() (in /mmfuse/libmmfuse_cpu.so)
==7==    by 0x2F4E: at::native::to(at::Tensor const&) (in /torch/lib/libtorch_cpu.so)
==7==
==7== Conditional jump or move depends on uninitialised value(s)
==7==    at 0x4E: exp (in /usr/lib/x86_64-linux-gnu/libm.so.6)
==7==    by 0x2F: mmfuse::cpu::soft_histogram() (kernel.cpp:12)
**7** section second
==7== Invalid read of size 8
==7==    at 0x4023: memcpy@GLIBC_2.14 (vg_replace_strmem.c:1)
==7==    by 0x2A: at::native::copy_() (in /torch/lib/libtorch_cpu.so)
==7==    by 0x2F: mmfuse::cpu::soft_histogram() (in /mmfuse/libmmfuse_cpu.so)
==7== Invalid read of size 8
==7==    at 0x4023: memcpy@GLIBC_2.14 (vg_replace_strmem.c:1)
==7==    by 0x2F: mmfuse::cpu::info_nce() (in /mmfuse/libmmfuse_cpu.so)
==7==  Address 0x1 is 0 bytes after a block of size 16 alloc'd
==7==    at 0x48: malloc (vg_replace_malloc.c:381)
"""


@pytest.fixture(scope="module")
def memcheck() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memcheck", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reports_are_those_of_our_libraries(memcheck: ModuleType) -> None:
    found = [(r.section, r.text.splitlines()[0]) for r in memcheck.reports(LOG)]
    assert found == [
        ("first", "Use of uninitialised value of size 8"),
        ("first", "Conditional jump or move depends on uninitialised value(s)"),
        ("second", "Invalid read of size 8"),
    ]
    assert "info_nce" in list(memcheck.reports(LOG))[-1].text


def test_faults(memcheck: ModuleType) -> None:
    printed = "control result: byte 0 of result 0, float32 [1], is not defined\nall cases ran\n"
    log = LOG.replace("section first", "section control library")
    silent, said = memcheck.faults(printed, log)
    assert silent == ["heap", "stack", "beyond"]
    assert [text.splitlines()[0] for text in said] == ["second: Invalid read of size 8"]
    silent, said = memcheck.faults(printed.replace("control result", "info_nce"), "")
    assert silent == list(memcheck.CONTROLS)
    assert said == ["info_nce: byte 0 of result 0, float32 [1], is not defined"]


def test_without_valgrind_there_is_one_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "make memcheck needs Valgrind with its headers, and a compiler\n"
