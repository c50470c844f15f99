"""The gate's windows: all of them in a few launches, with the reference's noise."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine import gate, windows
from engine.gate import ParityError

from mmfuse.reference import noise as reference_noise

# Places in several tensors, at the start of a block and within one, and beyond 2³² blocks.
PLACES = [(0, 0, 7), (3, 5, 6), (3, 1021, 1300), (1, 4, 8), (2, 2**34 + 3, 2**34 + 14)]


@pytest.mark.parametrize("state", [(5, 0), (2**40 + 9, 7), (-3, 2**33 + 1)])
def test_the_noise_of_all_windows_is_the_references_of_each(state: tuple[int, int]) -> None:
    seed_and_step = torch.tensor(state)
    found = windows.standard_normals(seed_and_step, PLACES)
    for z, (t, start, end) in zip(found, PLACES, strict=True):
        want = reference_noise.standard_normal(seed_and_step, end - start, t, start)
        assert torch.equal(z, want)


@pytest.mark.parametrize("damage", [3e-4, float("nan"), float("inf")])
@pytest.mark.parametrize("window", [0, 2])
def test_a_wrong_element_is_found_in_a_window_of_its_own_size(damage: float, window: int) -> None:
    places = [(0, 0, 50), (4, 10, 30), (9, 7, 17)]
    scales = (1.0, 1e3, 1.0)
    want = [
        s * torch.randn(b - a, dtype=torch.float64)
        for s, (_, a, b) in zip(scales, places, strict=True)
    ]
    got = [w + 1e-5 for w in want]
    gate.check_windows(places, got, want, 5e-5)
    got[window][4] += damage
    t, start, end = places[window]
    with pytest.raises(ParityError, match=f"gradient {t}, elements {start} to {end}"):
        gate.check_windows(places, got, want, 5e-5)
