"""Arguments of a wrong type get an error that names them, from every op that takes such."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mmfuse
from mmfuse import NoiseStream, ops

X, Z, ZZ = torch.ones(4, 3), torch.zeros(2), torch.zeros(2, 2)
LABELS = torch.tensor([0, 1, 2, 0])
ONE = torch.ones((), dtype=torch.bool)

#: Calls of an op with a wrong value for an argument, by the argument's name.
LISTS: list[tuple[str, Callable[[Any], Any]]] = [
    ("features", lambda v: ops.co_information_gate(v, 0.5)),
    ("features", lambda v: ops.drop_modalities(v, Z, NoiseStream(1))),
    ("grads", lambda v: ops.grad_stats(v)),
    ("params", lambda v: ops.grad_stats([X], v)),
    ("anchors", lambda v: ops.grad_stats([X], [X], v)),
    ("grads", lambda v: ops.update_grads_(v, Z)),
    ("data", lambda v: ops.joint_entropies(v, [(0, 1)], 2)),
    ("tuples", lambda v: ops.joint_entropies([X, X], v, 2)),
    ("tuples[0]", lambda v: ops.joint_entropies([X, X], [v], 2)),
    ("state", lambda v: ops.keep_state_(v, [X], ONE)),
    ("values", lambda v: ops.keep_state_([X], v, ONE)),
    ("first", lambda v: ops.logit_divergence(v, [X])),
    ("second", lambda v: ops.logit_divergence([X], v)),
    ("logits", lambda v: ops.modality_accuracies(v, LABELS)),
    ("logits", lambda v: ops.modality_scores(v, LABELS)),
    ("logits", lambda v: ops.sample_scores(v, LABELS)),
    ("data", lambda v: ops.shared_information(v, X, 2, 2)),
    ("owner", lambda v: ops.modulation_factors(Z + 1, 0.8, owner=v)),
    ("owner", lambda v: ops.information_pull(Z, Z > 0, Z.long(), 0.9, owner=v)),
    ("owner", lambda v: ops.progress_factors(Z, ZZ, Z, 1.3, owner=v)),
    ("multipliers", lambda v: ops.information_pull(Z, Z > 0, Z.long(), 0.9, multipliers=v)),
    ("widths", lambda v: mmfuse.PMR(num_classes=3, widths=v)),
    ("names", lambda v: mmfuse.scalars_of(mmfuse.MLAResult(Z, Z, ONE), v)),
]
NUMBERS: list[tuple[str, Callable[[Any], Any]]] = [
    ("threshold", lambda v: ops.co_information_gate([X, X], v)),
    ("temperature", lambda v: ops.info_nce(X, X, v)),
    ("beta", lambda v: ops.information_pull(Z, Z > 0, Z.long(), v)),
    ("alpha", lambda v: ops.modulation_factors(Z + 1, v)),
    ("beta", lambda v: ops.modulation_factors(Z + 1, 0.8, "mlb", beta=v)),
    ("eps", lambda v: ops.modulation_factors(Z + 1, 0.8, eps=v)),
    ("rho", lambda v: ops.progress_factors(Z, ZZ, Z, v)),
    ("sigma", lambda v: ops.noisy_views(X, v, NoiseStream(1))),
    ("alpha", lambda v: mmfuse.ogm_coefficients(Z, v)),
    ("q_base", lambda v: mmfuse.drop_probabilities(Z, v)),
    ("lam", lambda v: mmfuse.OPM(lam=v)),
    ("strength", lambda v: mmfuse.MCR(strength=v)),
    ("temperature", lambda v: mmfuse.ARL(temperature=v)),
    ("mu", lambda v: mmfuse.PMR(mu=v)),
    ("rate", lambda v: mmfuse.LFM(rate=v)),
    ("eps", lambda v: mmfuse.scores.inverse_error({"a": X}, X, eps=v)),
]
STREAMS: list[Callable[[Any], Any]] = [
    lambda v: ops.drop_modalities([X, X], Z, v),
    lambda v: ops.noisy_views(X, 0.5, v),
    lambda v: ops.scale_grad(X, torch.ones(()), noise_std=torch.ones(()), stream=v),
    lambda v: ops.update_grads_([X.clone()], Z[:1], noise_std=Z[:1], stream=v),
]


@pytest.mark.parametrize(
    "value", [5, np.array(5), "text", {0: X}, X, iter([X])], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("case", range(len(LISTS)), ids=lambda i: f"{i}-{LISTS[i][0]}")
def test_what_is_no_list(case: int, value: Any) -> None:
    name, call = LISTS[case]
    if name == "names" and isinstance(value, dict):
        pytest.skip("its keys are the names")
    with pytest.raises(TypeError, match=rf"^{re.escape(name)} must be a list"):
        call(value)


@pytest.mark.parametrize(
    "value", ["0.5", [0.5], None, 1j, torch.ones(2), object], ids=lambda v: str(type(v))
)
@pytest.mark.parametrize("case", range(len(NUMBERS)), ids=lambda i: f"{i}-{NUMBERS[i][0]}")
def test_what_is_no_number(case: int, value: Any) -> None:
    name, call = NUMBERS[case]
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be a"):
        call(value)


@pytest.mark.parametrize("case", range(len(NUMBERS)))
def test_an_integer_is_a_number(case: int) -> None:
    NUMBERS[case][1](1)


SINGLES: list[tuple[str, Callable[[Any], Any]]] = [
    ("threshold", lambda v: ops.co_information_gate([X, X], v)),
    ("temperature", lambda v: ops.info_nce(X, X, v)),
    ("scale", lambda v: ops.drop_modalities([X, X], Z, NoiseStream(1), scale=v)),
    ("coefficient", lambda v: ops.scale_grad(X, v)),
    ("input_sq", lambda v: ops.redundancy_ratio(X, X, v)),
]


@pytest.mark.parametrize("case", range(len(SINGLES)), ids=lambda i: f"{i}-{SINGLES[i][0]}")
def test_a_single_number_that_cannot_be_read(case: int) -> None:
    name, call = SINGLES[case]
    call(torch.ones(()))
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be .*dense|layout"):
        call(torch.ones(()).to_sparse())
    with pytest.raises(ValueError, match=rf"^{name} is on (the )?meta"):
        call(torch.ones((), device="meta"))


@pytest.mark.parametrize("case", range(len(STREAMS)))
def test_what_is_no_stream(case: int) -> None:
    for value in (5, "text", torch.zeros(2, dtype=torch.int64), NoiseStream):
        with pytest.raises(TypeError, match=r"^stream must be a mmfuse\.NoiseStream, got "):
            STREAMS[case](value)
    with pytest.raises(ValueError, match="stream is on the meta device"):
        STREAMS[case](NoiseStream(1, "meta"))
    floating = NoiseStream(1)
    floating.state = floating.state.double()
    with pytest.raises(
        TypeError, match=r"stream has a state of torch\.float64 in place of torch\.in"
    ):
        STREAMS[case](floating)


@pytest.mark.parametrize("owner", [[0.5], [True], ["0"], [torch.tensor(0)], [None]], ids=repr)
def test_half_a_modality_owns_nothing(owner: Any) -> None:
    """An owner of 0.5 was cut to an integer, without a word."""
    with pytest.raises(TypeError, match=r"owner\[0\] must be an integer"):
        ops.modulation_factors(Z + 1, 0.8, owner=owner)
    with pytest.raises(TypeError, match=r"owner\[0\] must be an integer"):
        ops.information_pull(Z, Z > 0, Z.long(), 0.9, owner=owner)
    with pytest.raises(TypeError, match=r"owner\[0\] must be an integer"):
        ops.progress_factors(Z, ZZ, Z, 1.3, owner=owner)


SOFT: list[tuple[str, Callable[[], Any], str]] = [
    ("of other lengths", lambda: ops.soft_histogram(X, X[:, :2], 4), "must have one shape"),
    ("of one dimension", lambda: ops.soft_histogram(X[0], X[0], 4), r"must be \[P, N\]"),
    ("empty", lambda: ops.soft_histogram(X[:, :0], X[:, :0], 4), "is empty"),
    ("of integers", lambda: ops.soft_histogram(X.long(), X.long(), 4), "has dtype torch.int64"),
    ("a text", lambda: ops.soft_histogram("x", X, 4), "is not a tensor but str"),
    ("of one bin", lambda: ops.soft_histogram(X, X, 1), "bins must be"),
    ("of too many bins", lambda: ops.soft_histogram(X, X, 257), "bins must be"),
    ("of half a bin", lambda: ops.soft_histogram(X, X, 4.5), "bins must be an integer"),
]


@pytest.mark.parametrize(("what", "call", "message"), SOFT, ids=[s[0] for s in SOFT])
def test_a_soft_histogram_is_checked(what: str, call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("size", [1, 5])
def test_a_negated_view_is_not_updated(size: int) -> None:
    """Its memory holds the other sign; PyTorch wrote to the tensors before it, and then refused."""
    x = torch.complex(torch.zeros(size), torch.arange(size).float() + 1).conj().imag
    y = torch.ones(2)
    assert x.is_neg()
    before = x.clone()
    with pytest.raises(ValueError, match=r"grads\[1\] is a negated view"):
        ops.update_grads_([y, x], torch.full((2,), 0.5))
    assert torch.equal(x, before) and torch.equal(y, torch.ones(2))
    found = ops.grad_stats([x])
    assert float(found.mean[0]) == -(size + 1) / 2


def test_a_negated_gradient_is_not_updated() -> None:
    nets = {n: torch.nn.Linear(1, 3) for n in ("audio", "visual")}
    for net in nets.values():
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    last = nets["visual"].bias
    last.grad = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    method = mmfuse.OGM(nets)
    with pytest.raises(ValueError, match=r"encoders\['visual'\]\.bias is a negated view"):
        method.step({n: torch.randn(4, 3) for n in nets}, LABELS)
    assert all(bool((p.grad == 1).all()) for p in nets["audio"].parameters())


def test_kept_state_names_what_is_no_tensor() -> None:
    for state, values, name in (([5], [X], r"state\[0\]"), ([X], [None], r"values\[0\]")):
        with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got "):
            ops.keep_state_(state, values, ONE)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="finite must be a dense 0-d bool tensor"):
        ops.keep_state_([X], [X], True)  # type: ignore[arg-type]


def test_there_is_no_third_formula() -> None:
    """Any other name was taken for "cvpr"."""
    with pytest.raises(ValueError, match="formula must be 'tpami' or 'cvpr', got 'iccv'"):
        mmfuse.ogm_coefficients(Z + 2, 0.8, "iccv")  # type: ignore[arg-type]


def test_every_backend_takes_meta_tensors() -> None:
    """PyTorch's error was of a dispatch key that nobody had named."""
    assert ops.discrepancy_ratios(torch.ones(2, device="meta"), backend="cpu").is_meta


def test_an_epoch_beyond_int64_changes_nothing() -> None:
    method = mmfuse.OPM()
    method.set_epoch(3)
    with pytest.raises(ValueError, match="epoch must be below"):
        method.set_epoch(2**70)
    assert method.epoch == 3 and method.epoch_state.tolist()[1] == 4


def test_an_empty_batch_may_have_any_strides() -> None:
    """PyTorch calls it contiguous, so that `contiguous` left it as it was."""
    a, b = torch.ones(0, 2), torch.ones(0, 4)[:, ::2]
    assert b.stride(1) == 2
    assert ops.logit_divergence([a], [b], backend="cpu").isnan().tolist() == [True]


def _pull(**changed: torch.Tensor) -> object:
    state = {"window_open": torch.ones(2).bool(), "steps": torch.ones(2).long(), **changed}
    scores = state.pop("scores", torch.ones(2))
    return ops.information_pull(scores, beta=0.9, owner=[0, 1], **state)


SPARSE = torch.ones(2).to_sparse()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("scores", lambda: ops.discrepancy_ratios(SPARSE)),
        ("scores", lambda: ops.modulation_factors(SPARSE, 0.8, owner=[0, 1])),
        ("scores", lambda: _pull(scores=SPARSE)),
        ("window_open", lambda: _pull(window_open=SPARSE.bool())),
        ("steps", lambda: _pull(steps=SPARSE.long())),
        ("last_shares", lambda: ops.progress_factors(Z, ZZ, SPARSE, 1.3)),
        ("scale", lambda: ops.update_grads_([X, X], SPARSE)),
        ("q", lambda: ops.drop_modalities([X[None], X[None]], SPARSE, mmfuse.NoiseStream(1))),
    ],
)
def test_a_sparse_vector_is_named(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=f"{name} must be dense, got torch.sparse_coo"):
        call()


@pytest.mark.parametrize("op", [ops.modality_scores, ops.sample_scores, ops.modality_accuracies])
def test_what_scores_cannot_read_is_named(op: Callable[..., Any]) -> None:
    labels = torch.zeros(4)
    with pytest.raises(TypeError, match=r"labels must be an integer tensor .*, got torch.float8"):
        op([X], labels.to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"weight must be dense, got torch.sparse_coo"):
        op([X], labels.long(), weight=torch.ones(3).to_sparse())
    # Contiguous, since there is no number in it; its strides are those of the larger one.
    gaps = torch.empty(0, 6, 4)[:, ::2, ::2]
    assert op([gaps], torch.empty(0, 2, dtype=torch.int64))[0].numel() <= 1


def test_a_stream_without_its_two_numbers_and_q_on_meta_are_named() -> None:
    stream = mmfuse.NoiseStream(1)
    with pytest.raises(ValueError, match="q is on the meta device, features on cpu"):
        ops.drop_modalities([X[None], X[None]], torch.ones(2, device="meta"), stream)
    stream.state = stream.state[:1]
    for call in (
        lambda: ops.noisy_views(X, 0.1, stream),
        lambda: ops.drop_modalities([X[None], X[None]], torch.zeros(2), stream),
    ):
        with pytest.raises(ValueError, match=r"stream has a state of shape \[1\] in place of"):
            call()
