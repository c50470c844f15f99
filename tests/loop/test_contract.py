"""A rule that is written here, in the loop: the contract's promises to a paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import mmfuse
from mmfuse.loop.contract import (
    Act,
    Batch,
    Clock,
    Decision,
    Need,
    Sensed,
    State,
    Stateless,
    Tensors,
    check_fits,
)
from mmfuse.loop.ranks import Observed


@dataclass(frozen=True)
class Result:
    coefficients: Tensor
    finite: Tensor


@dataclass(frozen=True)
class Halving(Stateless):
    """Halves the gradients of the modality with the larger score, and counts the steps."""

    result = Result
    need: ClassVar[Need] = Need(squares="before")

    def init(self, modalities: int, tensors: int) -> dict[str, Tensor]:
        return {"steps": torch.zeros(()), "squares": torch.zeros(tensors, dtype=torch.float64)}

    def sense(self, batch: Batch) -> Sensed:
        return Sensed(batch.scores.prob)

    def decide(self, state: State, seen: Observed, tensors: Tensors, clock: Clock) -> Decision:
        k = torch.where(seen.means == seen.means.max(), 0.5, 1.0)
        return Decision(Act(scale=tensors.each(k)), (k,), {"steps": state["steps"] + 1})

    def settle(self, state: State, squares: Tensor, tensors: Tensors) -> State:
        return {"squares": tensors.added_to(state["squares"], squares)}

    def epoch(self, state: State, epoch: int, tensors: Tensors) -> State:
        return {"squares": torch.full_like(state["squares"], float(epoch))}


def made(**common: Any) -> tuple[mmfuse.GradientMethod, dict[str, nn.Linear]]:
    nets = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    return mmfuse.GradientMethod(Halving(), nets, **common), nets


LABELS = torch.tensor([0, 1])
#: a is sure and right, b undecided.
LOGITS = {"a": torch.tensor([[9.0, 0.0], [0.0, 9.0]]), "b": torch.zeros(2, 2)}


def give_gradients(nets: dict[str, nn.Linear]) -> None:
    for net in nets.values():
        for p in net.parameters():
            p.grad = torch.ones_like(p)


def test_a_rule_is_all_that_a_method_needs() -> None:
    method, nets = made()
    give_gradients(nets)
    out = method.step(LOGITS, LABELS)
    assert out.coefficients.tolist() == [0.5, 1.0] and out.finite
    assert [p.grad.unique().item() for p in nets["a"].parameters()] == [0.5, 0.5]
    assert [p.grad.unique().item() for p in nets["b"].parameters()] == [1.0, 1.0]
    assert method._state["steps"] == 1
    assert method._state["squares"].tolist() == [6.0, 2.0, 6.0, 2.0]


def test_squares_of_some_tensors_go_to_their_places() -> None:
    method, nets = made()
    give_gradients(nets)
    nets["a"].weight.grad = None
    method.step(LOGITS, LABELS)
    assert method._state["squares"].tolist() == [0.0, 2.0, 6.0, 2.0]


def test_a_step_that_does_not_count_leaves_the_state() -> None:
    method, nets = made()
    give_gradients(nets)
    method.step(LOGITS, LABELS, found_inf=torch.ones(()))
    give_gradients(nets)
    nets["b"].bias.grad[0] = torch.nan
    assert not method.step(LOGITS, LABELS).finite
    assert method._state["steps"] == 0
    assert method._state["squares"].tolist() == [0.0] * 4


def test_outside_of_its_epochs_the_loop_leaves_out_the_act() -> None:
    method, nets = made(starts=1)
    method.set_epoch(0)
    give_gradients(nets)
    out = method.step(LOGITS, LABELS)
    assert out.coefficients.tolist() == [1.0, 1.0] and out.finite
    assert all((p.grad == 1).all() for net in nets.values() for p in net.parameters())
    assert method._state["steps"] == 1, "it goes on watching"
    method.set_epoch(1)
    assert method._state["squares"].tolist() == [1.0] * 4
    give_gradients(nets)
    assert method.step(LOGITS, LABELS).coefficients.tolist() == [0.5, 1.0]


def test_a_state_resumes() -> None:
    method, nets = made()
    method.set_epoch(7)
    give_gradients(nets)
    method.step(LOGITS, LABELS)
    other, _ = made()
    other.load_state_dict(method.state_dict())
    assert other.epoch == 7
    assert all(torch.equal(other._state[name], value) for name, value in method._state.items())
    before = other._state["squares"].clone()
    other.set_epoch(7)
    assert torch.equal(other._state["squares"], before), "it was in this epoch already"


@pytest.mark.parametrize(
    ("need", "apply_to", "anchored", "streamed", "message"),
    [
        (Need(), "both", False, False, "apply_to must be 'gradient' or 'update', got 'both'"),
        (Need(second="anchor"), "update", False, False, "acts on gradients only"),
        (Need(squares="after"), "update", False, False, "acts on gradients only"),
        (Need(stream=True, noise=torch.ones_like), "update", False, False, "noise from a callable"),
        (Need(), "gradient", True, False, "M keeps no anchors; leave out anchor_dtype"),
        (Need(), "gradient", False, True, "M draws no random numbers; leave out stream"),
    ],
)
def test_arguments_that_a_rule_has_no_use_for(
    need: Need, apply_to: str, anchored: bool, streamed: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_fits("M", need, apply_to, anchored, streamed)


def test_squares_that_overflow_do_not_count_though_the_gradient_is_finite() -> None:
    """They are summed in float32 within a chunk; one would stay in the epoch's sums for ever."""
    method, nets = made(backend="cpu")
    give_gradients(nets)
    nets["a"].weight.grad[0, 0] = 1e25
    out = method.step(LOGITS, LABELS)
    assert out.finite and nets["a"].weight.grad.isfinite().all()
    assert method._state["steps"] == 0
    assert method._state["squares"].tolist() == [0.0] * 4
