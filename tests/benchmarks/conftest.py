"""Makes the benchmark importable, and the machine small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The yardstick and the cache flush without their half gigabyte each."""
    pytest.importorskip("rich")
    from benchmarked import TINY, TINY_OF
    from cases import WORKLOADS
    from engine import measure

    monkeypatch.setitem(measure.COPY_ELEMENTS, "cpu", 2**16)
    monkeypatch.setattr(measure, "_FLUSH_BYTES", 2**16)
    monkeypatch.setattr(measure, "MIN_SAMPLES", 2)
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)
    for workload in TINY_OF.values():
        monkeypatch.setitem(WORKLOADS, workload.name, workload)
