"""The second tutorial runs, and logs what it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import your_own_model as example


def test_it_learns_from_both_and_logs(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--epochs", "2"]) == 0
    before, logged, after, alone = capsys.readouterr().out.splitlines()
    assert "coefficients/text" in logged and "scores/sensor" in logged
    numbers = [eval(line.split(": ", 1)[1]) for line in (before, after, alone)]
    assert set(numbers[0]) == {"joint", "sensor", "text"}
    # Four classes: from a guess to most of them.
    assert numbers[0]["joint"] < 0.45 and numbers[1]["joint"] > 0.6
    assert set(numbers[2]) == {"sensor", "text"}


def test_the_data_are_the_same_each_time() -> None:
    one, two = example.MyData(20, seed=3), example.MyData(20, seed=3)
    assert (one.text == two.text).all() and (one.sensor == two.sensor).all()
    assert len(example.MyData(20, seed=3)) == 20 and one[4]["text"].shape == (12,)


PAGE = (Path(__file__).parents[2] / "docs" / "tutorials" / "your_own_model.md").read_text()


def test_the_text_tells_more_than_the_sensor() -> None:
    """The best possible classifiers: the nearest centre, and the class with the most own words."""
    test = example.MyData(1000, seed=2)
    centres = torch.randn(example.CLASSES, 16, generator=torch.Generator().manual_seed(7))
    words = torch.nn.functional.one_hot(test.text // 50, example.CLASSES).sum(1)
    best = {"text": words.argmax(1), "sensor": torch.cdist(test.sensor, centres).argmin(1)}
    right = {name: (y == test.labels).double().mean().item() for name, y in best.items()}
    assert right["text"] > right["sensor"]
    for name, value in right.items():
        assert re.search(rf"{value:.3f} (of the test samples )?by the {name} alone", PAGE)


@pytest.mark.slow
def test_the_page_says_what_an_encoder_reaches_alone() -> None:
    train, test = example.MyData(2000, seed=1), example.MyData(1000, seed=2)
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        found.append(example.trained_alone("text", train, test, 20))
    low, high = re.search(r"\(([\d.]+) to ([\d.]+) with seeds 0 to 4\)", PAGE).groups()
    # Another processor rounds otherwise: a few of 1,000 samples may change sides.
    assert (min(found), max(found)) == pytest.approx((float(low), float(high)), abs=0.006)
