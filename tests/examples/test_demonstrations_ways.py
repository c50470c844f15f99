"""Every way to train, on a stand-in data set: what it computes, and that a seed repeats it."""

from __future__ import annotations

import pytest
import torch
from demonstrated import CLASSES, TASK, VIEWS
from demonstrations.baselines import Plan
from demonstrations.measures import measure, noisy, probe
from demonstrations.networks import Patches
from demonstrations.training import Run
from demonstrations.ways import (
    JOINT,
    OWN_LOSSES,
    at_rate,
    at_rates,
    baseline_of,
    build_of,
    method_of,
    ways,
)

import mmfuse

# Without the compiled library the examples run on the reference, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:mmfuse uses its:RuntimeWarning")


def trained(way: str, seed: int = 0, **options: object) -> Run:
    plan = Plan(lr=0.05, epochs=2, batch_size=32, seed=seed, options=options)
    run = Run(ways(VIEWS)[way], TASK.split(None, seed), plan, len(CLASSES))
    run.history = run.train()
    return run


@pytest.mark.parametrize("way", ways(VIEWS))
def test_a_seed_repeats_every_number(way: str) -> None:
    runs = []
    for unrelated_seed in (1, 2):
        torch.manual_seed(unrelated_seed)
        runs.append(trained(way))
    first, second = runs
    for a, b in zip(first.history, second.history, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
    assert first.history.scores.shape == first.history.coefficients.shape == (2, 2)
    found = measure(first)
    assert found == measure(second)
    assert all(0 <= value <= 1 for value in found.values())
    first.select()
    measure(first)


def test_two_methods_of_one_step_draw_different_numbers() -> None:
    """OGM-GE and its control draw the same numbers, and OPM beside OGM-GE others."""
    opm = trained("OPM + OGM-GE").method
    gradients, control = (trained(way).method.method.stream for way in ("OGM-GE", "NoiseOnly"))
    keys = [stream.state_dict()["state"][0].item() for stream in (gradients, control)]
    assert keys[0] == keys[1] == opm.then.stream.state_dict()["state"][0].item()
    assert keys[0] != opm.method.noise_state[0].item()


@pytest.mark.parametrize("size", [1, 3, 32])
def test_relearning_never_trains_on_what_tells_the_gap(size: int) -> None:
    run = Run(
        ways(VIEWS)["ReLearning"],
        TASK.split(None, 0),
        Plan(epochs=4, batch_size=size),
        len(CLASSES),
    )
    held = {tuple(row) for row in run.method.held.views["weak"].tolist()}
    assert len(held) == len(run.split.train.labels) // 4
    seen = set()
    for _ in range(20):  # each leaves out what is left after the last whole batch
        for views, _ in run.batches():
            seen |= {tuple(row) for row in views["weak"].tolist()}
    assert not seen & held and len(seen) + len(held) == len(run.split.train.labels)
    run.train()
    assert run.method.weights.abs().sum() > 0, "it has been reset"


def test_a_baseline_at_the_rate_of_a_method() -> None:
    tuned = {way: {"lr": 0.1} for way in ways(VIEWS)} | {"OGM": {"lr": 0.02}, "MLB": {"lr": 0.03}}
    assert at_rate("OGM", tuned) == "joint, learning rate 0.02"
    assert at_rate("MLB", tuned) == "unimodal losses, learning rate 0.03"
    assert at_rate("OPM", tuned) == JOINT, "its own rate is the tuned one"
    assert (
        at_rate(JOINT, tuned) is at_rate("ensemble", tuned) is at_rate("only weak", tuned) is None
    )
    assert at_rate("OGM", {}) is None
    found = at_rates(["OGM", "MLB", "OPM"], tuned)
    assert found == {at_rate("OGM", tuned): {"lr": 0.02}, at_rate("MLB", tuned): {"lr": 0.03}}
    assert (
        build_of("unimodal losses, own heads", VIEWS) is ways(VIEWS)["unimodal losses, own heads"]
    )
    assert build_of("joint, learning rate 0.02", VIEWS) is ways(VIEWS)[JOINT]


def test_every_method_of_the_catalogue_is_a_way_to_train() -> None:
    known = {method_of(way) for way in ways(VIEWS)} - {None}
    assert known == set(mmfuse.METHODS)


def test_a_method_is_compared_with_the_losses_that_it_is_for() -> None:
    for name, made in mmfuse.METHODS.items():
        card = made.card
        own = card.own_losses or "unimodal_losses" in card.needs or card.acts == "head"
        assert baseline_of(name) == (OWN_LOSSES if own else JOINT), name
    assert baseline_of(JOINT) is None
    assert baseline_of(OWN_LOSSES) == baseline_of("ensemble") == baseline_of("OGM-GE") == JOINT


def test_a_factor_of_one_is_the_baseline() -> None:
    """MLB with α 0 scales nothing, and is left with the unimodal losses."""
    plain, mlb = (
        measure(trained(way, **more)) for way, more in ((OWN_LOSSES, {}), ("MLB", {"alpha": 0.0}))
    )
    assert plain == mlb
    assert plain != measure(trained(JOINT))


def test_the_ensemble_is_its_members() -> None:
    """Every member has its own learning rate, and its own weights as if trained alone."""
    rates = {"strong": 0.1, "weak": 0.02}
    together = trained("ensemble", rates=rates)
    for view, rate in rates.items():
        alone = trained(f"only {view}", rates={view: rate})
        features = alone.model.features(alone.split.test.views)
        ours = alone.method.alone(features)[view]
        theirs = together.method.alone(together.model.features(alone.split.test.views))[view]
        # The heads are drawn one after the other, so that only the first one's weights are equal.
        assert torch.equal(ours, theirs) == (view == "strong")
        other = next(v for v in VIEWS if v != view)
        assert (alone.method.alone(features)[other] == 0).all()


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_not_trained_on_makes_no_difference(view: str) -> None:
    run = trained(f"only {view}")
    found = measure(run)
    other = next(v for v in VIEWS if v != view)
    assert {found[f"noise {s:g} {other}"] for s in (0.5, 4.0)} == {found["accuracy"]}


def test_the_best_epoch_is_what_validation_says() -> None:
    plan = Plan(lr=0.3, epochs=8, batch_size=32)
    for seed in range(20):
        run = Run(ways(VIEWS)[JOINT], TASK.split(None, seed), plan, len(CLASSES))
        history = run.train()
        if history.accuracy[-1] < history.accuracy.max():
            break
    assert run.validate()[0] == pytest.approx(history.accuracy[-1].item())
    assert history.accuracy[-1] < history.accuracy.max()
    run.select()
    right, _ = run.validate()
    assert right == pytest.approx(history.accuracy.max().item())


def test_the_noise_is_of_one_modality_and_the_same_for_everyone() -> None:
    part = TASK.split(None, 0).test
    one, again = (noisy(part, "weak", 2.0, seed=5) for _ in range(2))
    assert torch.equal(one.views["strong"], part.views["strong"])
    assert torch.equal(one.views["weak"], again.views["weak"])
    added = one.views["weak"] - part.views["weak"]
    # 360 numbers: three standard errors of a deviation of 2 are 2 * 3 / sqrt(720).
    assert abs(added.std().item() - 2.0) < 0.23


def test_the_probe_finds_what_a_linear_classifier_can_find() -> None:
    labels = torch.arange(10).repeat(20)
    separable = torch.nn.functional.one_hot(labels, 10).float()
    assert probe(separable, separable, labels, labels, 10) == 1.0
    assert probe(torch.zeros(200, 3), torch.zeros(200, 3), labels, labels, 10) == 0.1


@pytest.mark.parametrize(("shape", "size", "stride"), [((3, 100), 10, 5), ((2, 28, 40), 6, 3)])
def test_a_linear_layer_on_patches_is_a_convolution(
    shape: tuple[int, ...], size: int, stride: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator)
    weight = torch.randn(4, shape[0] * size ** (len(shape) - 1), generator=generator)
    ours = (Patches(size, stride)(x) @ weight.T).transpose(1, 2)
    convolve = torch.nn.functional.conv1d if len(shape) == 2 else torch.nn.functional.conv2d
    theirs = convolve(x, weight.view(4, shape[0], *[size] * (len(shape) - 1)), stride=stride)
    torch.testing.assert_close(ours, theirs.flatten(2))


@pytest.mark.parametrize(
    ("way", "what"),
    [
        ("OGM", "factor of the gradient"),
        ("InfoReg", "factor of the displacement"),
        ("ARM", "factor of the feature"),
        ("MMPareto", "weight of the joint gradient"),
    ],
)
def test_the_plot_says_what_coefficients_are(way: str, what: str) -> None:
    run = Run(ways(VIEWS)[way], TASK.split(None, 0), Plan(epochs=1), len(CLASSES))
    assert run.method.coefficients == what
