"""Observed micro-batches that are no part of the step they would count in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from balancing import LOGITS_ONLY
from torch import Tensor, nn

from mmfuse import METHODS

LABELS = torch.tensor([0, 1, 2, 0])


def encoders() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: nn.Linear(5, 3) for name in ("audio", "visual")}


def batch(nets: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
    """New gradients; the logits that they come from."""
    x = 3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    logits = {name: net(x) for name, net in nets.items()}
    torch.stack([z.square().sum() for z in logits.values()]).sum().backward()
    return {name: z.detach() for name, z in logits.items()}


def made(name: str, nets: dict[str, nn.Module], epoch: int | None = 0) -> Any:
    method = METHODS[name](nets)
    if epoch is not None:
        method.set_epoch(epoch)
    return method


def scores(out: Any) -> Tensor:
    found = getattr(out, "scores", None)
    return out.coefficients if found is None else found


@pytest.mark.parametrize("name", LOGITS_ONLY)
class TestForget:
    def test_what_was_observed_is_gone(self, name: str) -> None:
        nets = encoders()
        plain, other = made(name, nets), made(name, nets)
        other.observe(batch(nets, 1), LABELS)
        other.observe(batch(nets, 2), LABELS)
        other.forget()
        for method in (plain, other):
            for net in nets.values():
                net.zero_grad()
            method.step(batch(nets, 3), LABELS)
        for a, b in zip(plain._state.values(), other._state.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    def test_then_a_step_has_nothing(self, name: str) -> None:
        nets = encoders()
        method = made(name, nets)
        logits = batch(nets, 1)
        method.observe(logits, LABELS)
        method.forget()
        method.forget()  # of nothing
        with pytest.raises(RuntimeError, match="nothing was observed"):
            method.step()
        method.step(logits, LABELS)


def test_a_decision_about_updates_is_kept() -> None:
    nets = encoders()
    ogm = METHODS["OGM"](nets, apply_to="update")
    optimizer = torch.optim.SGD([p for net in nets.values() for p in net.parameters()], 0.1)
    ogm.attach(optimizer)
    ogm.step(batch(nets, 1), LABELS)
    ogm.forget()
    optimizer.step()


@pytest.mark.parametrize("name", LOGITS_ONLY)
class TestLeftByTheEpochBefore:
    """They are kept, since their gradients may be as well."""

    @pytest.mark.parametrize("before", [None, 0])
    def test_is_said_once(self, name: str, before: int | None) -> None:
        nets = encoders()
        if before is None and METHODS[name](nets).anchors is not None:
            pytest.skip("observes nothing before the first epoch")
        method, plain = made(name, nets, before), made(name, nets, before)
        method.observe(batch(nets, 1), LABELS)
        with pytest.warns(RuntimeWarning, match="wait for a step, and count in its first one"):
            method.set_epoch(1)
        assert method.epoch == 1
        method.set_epoch(1)
        method.set_epoch(2)
        plain.set_epoch(2)
        found = scores(method.step(batch(nets, 2), LABELS))
        for net in nets.values():
            net.zero_grad()
        alone = scores(plain.step(batch(nets, 2), LABELS))
        assert name in ("LearningRates", "NoiseOnly") or not torch.equal(found, alone)

    def test_not_after_a_step_or_forget_or_in_a_new_run(self, name: str) -> None:
        nets = encoders()
        method = made(name, nets)
        method.observe(batch(nets, 1), LABELS)
        method.set_epoch(0)  # it runs already, as where a run is resumed
        method.step()
        method.set_epoch(1)
        method.observe(batch(nets, 2), LABELS)
        method.forget()
        method.set_epoch(2)
        method.observe(batch(nets, 3), LABELS)
        method.begin()
        method.set_epoch(0)


@pytest.mark.parametrize("name", LOGITS_ONLY)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_is_noticed_once(name: str, mode: Any) -> None:
    nets = encoders()
    method = made(name, nets)
    logits = batch(nets, 1)
    method.observe(logits, LABELS)
    with mode():
        with pytest.warns(
            RuntimeWarning, match="observe was called where no gradients are"
        ) as seen:
            method.observe(logits, LABELS)
        method.observe(logits, LABELS)
    assert [w.filename for w in seen] == [__file__]
    method.observe(logits, LABELS)
    method.step()


def test_a_warning_that_is_an_error_leaves_nothing_behind() -> None:
    nets = encoders()
    method = made("OGM", nets)
    logits = batch(nets, 1)
    with torch.no_grad(), pytest.raises(RuntimeWarning, match="no gradients"):
        method.observe(logits, LABELS)  # in all tests warnings are errors
    with pytest.raises(RuntimeError, match="nothing was observed"):
        method.step()


def test_step_and_backward_may_come_where_no_gradients_are_recorded() -> None:
    """A step is taken on gradients that there are, and so it is no evaluation."""
    nets = encoders()
    method = made("OGM", nets)
    logits = batch(nets, 1)
    with torch.no_grad():
        method.step(logits, LABELS)
