"""Integers that a user passes in may be NumPy's; other numbers are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mmfuse
from mmfuse._numbers import finite, real, whole

X, Y = torch.arange(24.0).view(2, 1, 12).sin()
Z, Y9 = torch.randn(4, 9), torch.tensor([7, 8, 8, 1])


def encoders() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"audio": nn.Linear(3, 2), "visual": nn.Linear(3, 2)}


def of_epoch(n: Any) -> int:
    method = mmfuse.OGM(encoders(), stream=mmfuse.NoiseStream(0))
    method.set_epoch(n)
    return method.epoch


def order_of_epoch(n: Any) -> list[int]:
    sampler = mmfuse.ContributionSampler(torch.rand(3, 1).fill_(0.5), seed=0)
    sampler.set_epoch(n)
    return list(sampler)


#: Functions that take an integer, by the argument's name in its error: a call, and its result.
TAKES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "NoiseStream": ("seed", lambda n: mmfuse.NoiseStream(n).state.tolist()),
    "OGM.set_epoch": ("epoch", of_epoch),
    "starts": ("starts", lambda n: mmfuse.OGM(encoders(), starts=n).starts),
    "ends": ("ends", lambda n: mmfuse.MLB(encoders(), ends=n).ends),
    "RedReg.window": ("window", lambda n: list(mmfuse.RedReg(encoders(), window=n)._state)),
    "RedReg.epochs": ("epochs", lambda n: mmfuse.RedReg(encoders(), epochs=n).rule.epochs),
    "RedReg.monitor_every": (
        "monitor_every",
        lambda n: mmfuse.RedReg(encoders(), monitor_every=n).rule.monitor_every,
    ),
    "joint_entropies": (
        "bins",
        lambda n: mmfuse.ops.joint_entropies([X, Y], [(0, 1)], n).counts.tolist(),
    ),
    "shared_information": (
        "bins",
        lambda n: mmfuse.ops.shared_information([X], Y, n, 2).nmi.tolist(),
    ),
    "mutual_information": ("bins", lambda n: mmfuse.ops.mutual_information(X, Y, n)[0].tolist()),
    "mutual_information, soft": (
        "bins",
        lambda n: mmfuse.ops.mutual_information(X, Y, n, estimator="soft")[0].tolist(),
    ),
    "modality_scores": (
        "ignore_index",
        lambda n: mmfuse.ops.modality_scores([Z, Z], Y9, ignore_index=n).count.tolist(),
    ),
    "sample_scores": (
        "ignore_index",
        lambda n: mmfuse.ops.sample_scores([Z], Y9, ignore_index=n).weight.tolist(),
    ),
    "ScalarLog": ("every", lambda n: mmfuse.ScalarLog(print, every=n).every),
    "ContributionSampler.copies": (
        r"copies\[1\]",
        lambda n: mmfuse.ContributionSampler(torch.full((2,), 0.7), copies=(1, n, 1)).indices,
    ),
    "ContributionSampler.seed": (
        "seed",
        lambda n: list(mmfuse.ContributionSampler(torch.full((5,), 0.7), seed=n)),
    ),
    "ContributionSampler.set_epoch": ("epoch", order_of_epoch),
}


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
@pytest.mark.parametrize("what", TAKES)
def test_numpys_integers_are_integers(what: str, kind: Callable[[int], Any]) -> None:
    _, call = TAKES[what]
    assert call(kind(7)) == call(7)
    assert call(7) != call(8) or what in ("RedReg.window",), "the number counts"


@pytest.mark.parametrize(
    "wrong", [5.0, True, "5", torch.tensor(5), np.float64(5), np.ones(2, int), None], ids=repr
)
@pytest.mark.parametrize("what", TAKES)
def test_what_is_no_integer_is_refused(what: str, wrong: object) -> None:
    name, call = TAKES[what]
    if wrong is None and name in ("seed", "ends"):
        pytest.skip("None has a meaning here")
    with pytest.raises(TypeError, match=f"{name} must be an integer, got {type(wrong).__name__}"):
        call(wrong)


FLAGS: dict[str, Callable[[Any], object]] = {
    "multilabel": lambda f: mmfuse.ops.modality_scores([Z], Y9, multilabel=f),
    "statistics": lambda f: mmfuse.ops.sample_scores([Z], Y9, statistics=f),
    "per_row": lambda f: mmfuse.ops.logit_divergence([Z], [Z], per_row=f),
    "noise": lambda f: mmfuse.OGM(encoders(), noise=f),
    "theta_gradient": lambda f: mmfuse.OPM.official(theta_gradient=f),
    "shuffle": lambda f: mmfuse.ContributionSampler(torch.full((2,), 0.7), shuffle=f),
    "differentiable": lambda f: mmfuse.unimodal_outputs(
        lambda a: a, {"a": torch.ones(2)}, differentiable=f
    ),
}


@pytest.mark.parametrize("wrong", ["no", 2, torch.ones(2), np.ones(2), []], ids=repr)
@pytest.mark.parametrize("name", FLAGS)
def test_what_is_neither_true_nor_false_is_refused(name: str, wrong: object) -> None:
    with pytest.raises(
        TypeError, match=f"{name} must be True or False, got {type(wrong).__name__}"
    ):
        FLAGS[name](wrong)
    if name != "multilabel":  # whose labels are others
        FLAGS[name](np.bool_(True))


@pytest.mark.parametrize(
    ("keyword", "wrong", "message"),
    [
        ("select", [], "select must be one of"),
        ("shared", np.ones(()), "shared must be a module"),
        ("stream", torch.ones(2), "stream must be a mmfuse.NoiseStream, got Tensor"),
        ("anchor_dtype", torch.ones(()), "anchor_dtype must be a floating dtype"),
        ("input_dropout", torch.ones(3), "input_dropout must be a list of numbers, got Tensor"),
        ("input_dropout", "abc", "input_dropout must be a list of numbers, got str"),
        ("input_dropout", (0.1, "b", 1), r"input_dropout\[1\] must be a number, got str"),
        ("input_dropout", (0.1, 0.2), "input_dropout must hold three numbers"),
    ],
)
def test_what_only_looks_right_is_refused(keyword: str, wrong: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        mmfuse.RedReg(encoders(), **{keyword: wrong})


@pytest.mark.parametrize(
    "function", [partial(mmfuse.ogm_coefficients, alpha=0.8), mmfuse.drop_probabilities]
)
def test_ratios_that_no_kernel_takes_are_named(function: Callable[..., object]) -> None:
    for wrong in (torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.float8_e4m3fn), [1.0]):
        with pytest.raises(TypeError, match="ratios"):
            function(wrong)
    with pytest.raises(ValueError, match="alpha must be a finite number of torch"):
        mmfuse.ogm_coefficients(torch.ones(2), 1e300)


def test_a_loss_without_a_gradient_is_refused_before_anything() -> None:
    nets = encoders()
    given = {name: torch.randn(9, 3) for name in nets}
    for loss in (torch.ones(()), torch.ones((), dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="loss does not require grad"):
            mmfuse.ogm_backward(loss, nets, given, Y9)
    with pytest.raises(ValueError, match="loss is on the meta device"):
        mmfuse.ogm_backward(torch.ones((), device="meta", requires_grad=True), nets, given, Y9)


def test_numbers_without_arithmetic_and_devices_without_a_name_are_refused() -> None:
    with pytest.raises(TypeError, match=r"rate must be a number, got torch\.float8_e4m3fn"):
        mmfuse.LFM(rate=torch.ones((), dtype=torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="device must name a device"):
        mmfuse.NoiseStream(1, device=2**70)
    with pytest.raises(ValueError, match="window must be at most 1,000,000"):
        mmfuse.LearningRates(encoders(), window=2**40)
    with pytest.raises(ValueError, match=r"copies\[0\] must be at most 1,000"):
        mmfuse.ContributionSampler(torch.full((2,), 0.7), copies=(2**31, 2, 1))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, np.uint8])
@pytest.mark.parametrize("what", ["scores", "ratios", "coefficients"])
def test_numbers_of_ones_own_may_be_numpys(what: str, kind: Callable[[float], Any]) -> None:
    found = []
    for number in (kind, float):
        nets = encoders()
        method = mmfuse.MLB(nets)
        sum(net(torch.ones(2, 3)).sum() for net in nets.values()).backward()
        given = {"audio": number(2), "visual": number(3)}
        found.append(method.step(**{what: given}, count=number(4)).coefficients.tolist())
    assert found[0] == found[1]
    with pytest.raises(TypeError, match="must be a number or a tensor of one, got bool"):
        method.step(**{what: dict.fromkeys(given, np.bool_(True))})


def test_the_least_number_is_named() -> None:
    assert whole("n", np.int16(-3)) == -3
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        whole("n", 0, least=1)


def test_the_largest_number_is_named() -> None:
    assert whole("n", 1024, most=1024) == 1024
    with pytest.raises(ValueError, match="n must be at most 1,024, got 1025"):
        whole("n", 1025, most=1024)
    for number in (2**31, 2**70):
        with pytest.raises(ValueError, match="num_modalities must be at most 1,024"):
            mmfuse.AGM(num_modalities=number)


def test_ids_of_numpy() -> None:
    stream = mmfuse.NoiseStream(1)
    placed = stream.place(np.arange(3), np.array([4, 0, 8]))
    assert placed.ids == (0, 1, 2) and placed.offsets == (4, 0, 8)
    grads = [torch.zeros(5) for _ in range(3)]
    mmfuse.ops.update_grads_(grads, torch.ones(3), noise_std=torch.ones(3), stream=placed)
    torch.testing.assert_close(grads[2], stream.normal(5, 2, 8))
    with pytest.raises(TypeError, match="float"):
        stream.place([0.5])


@pytest.mark.parametrize("value", [2, 2.5, True, np.float32(2.5), torch.tensor(2.5)], ids=repr)
def test_real_is_pythons_own(value: Any) -> None:
    found = real("alpha", value)
    assert type(found) is float and found == float(value)


@pytest.mark.parametrize(
    "value", ["2", None, [2], 1j, torch.ones(1), torch.tensor(1j), np.ones(2), float], ids=str
)
def test_real_refuses_the_rest_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match="alpha must be a number, got "):
        real("alpha", value)


def test_real_refuses_a_sparse_number_which_cannot_be_compared() -> None:
    sparse = torch.tensor(2.5).to_sparse()
    with pytest.raises(TypeError, match="alpha must be a number, got a tensor of layout"):
        real("alpha", sparse)
    with pytest.raises(TypeError, match="gamma must be a number"):
        mmfuse.ARL(gamma=sparse)


def test_an_integer_beyond_all_floats() -> None:
    with pytest.raises(ValueError, match="alpha must be a finite number, got 1000"):
        real("alpha", 10**400)


def test_finite() -> None:
    assert finite("alpha", 3) and not finite("alpha", float("inf"))
    assert not finite("alpha", float("nan"))
    with pytest.raises(TypeError, match="alpha must be a number"):
        finite("alpha", "3")
