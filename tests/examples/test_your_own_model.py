"""The second tutorial runs, and logs what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import your_own_model as example


def test_it_learns_from_both_and_logs(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--epochs", "2"]) == 0
    before, logged, after = capsys.readouterr().out.splitlines()
    assert "coefficients/text" in logged and "scores/sensor" in logged
    numbers = [eval(line.split(": ", 1)[1]) for line in (before, after)]
    assert set(numbers[0]) == {"joint", "sensor", "text"}
    # Four classes: from a guess to most of them.
    assert numbers[0]["joint"] < 0.45 and numbers[1]["joint"] > 0.6


def test_the_data_are_the_same_each_time() -> None:
    one, two = example.MyData(20, seed=3), example.MyData(20, seed=3)
    assert (one.text == two.text).all() and (one.sensor == two.sensor).all()
    assert len(example.MyData(20, seed=3)) == 20 and one[4]["text"].shape == (12,)
