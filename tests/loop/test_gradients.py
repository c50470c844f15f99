"""`GradientMethod`: the verbs that every method on gradients has, for all of the catalogue."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

ON_GRADIENTS = [made for made in mmfuse.METHODS.values() if issubclass(made, mmfuse.GradientMethod)]
every = pytest.mark.parametrize("made", ON_GRADIENTS, ids=lambda made: made.__name__)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({"audio": nn.Linear(4, 3), "visual": nn.Linear(5, 3)})

    def losses(self) -> tuple[Tensor, dict[str, Tensor], dict[str, object]]:
        """The joint loss, the unimodal ones, and all that methods look at."""
        inputs = {"audio": torch.randn(6, 4), "visual": torch.randn(6, 5)}
        labels = torch.tensor([0, 1, 2, 0, 1, 2])
        features = {name: net(inputs[name]) for name, net in self.encoders.items()}
        unimodal = {name: F.cross_entropy(z, labels) for name, z in features.items()}
        joint = F.cross_entropy(sum(features.values()), labels)
        seen = {"logits": features, "labels": labels, "features": features, "inputs": inputs}
        return joint, unimodal, seen


def backward(method: mmfuse.GradientMethod, net: Net) -> object:
    net.zero_grad()
    joint, unimodal, seen = net.losses()
    return method.backward(joint, **seen, unimodal_losses=unimodal)


@every
def test_every_method_has_every_verb(made: type[mmfuse.GradientMethod]) -> None:
    net = Net()
    methods = [made(dict(net.encoders))]
    if made.card.official:
        methods.append(made.official(dict(net.encoders), select="all"))
    for method in methods:
        method.begin()
        for epoch in (0, 0, 1):
            method.set_epoch(epoch)
            out = backward(method, net)
            assert out.coefficients.shape == (2,) and out.finite
            assert method.epoch == epoch
        state = method.state_dict()
        assert (state["format"], state["method"], state["epoch"]) == (1, made.__name__, 1)
        again = type(method)(dict(net.encoders))
        again._adopt(method.rule)
        again.load_state_dict(state)
        assert again.epoch == 1
        for bad in ({**state, "format": 0}, {k: v for k, v in state.items() if k != "format"}):
            with pytest.raises(ValueError, match="saved by another version"):
                again.load_state_dict(bad)
        assert scalars_have_names(out)


def scalars_have_names(out: object) -> bool:
    tags = mmfuse.scalars_of(out, ["audio", "visual"])
    return "coefficients/audio" in tags and "finite" in tags


@every
@pytest.mark.parametrize(
    ("epoch", "error", "message"),
    [
        (1.5, TypeError, "epoch must be an integer, got float"),
        (-1, ValueError, "epoch must be at least 0, got -1"),
    ],
)
def test_a_wrong_epoch_changes_nothing(
    made: type[mmfuse.GradientMethod], epoch: object, error: type[Exception], message: str
) -> None:
    method = made(dict(Net().encoders))
    method.set_epoch(2)
    with pytest.raises(error, match=message):
        method.set_epoch(epoch)
    assert method.epoch == 2


@every
def test_epochs_that_are_never_told(made: type[mmfuse.GradientMethod]) -> None:
    """They are an error if anchors are needed; a window that would never end gives one warning."""
    net = Net()
    method = made(dict(net.encoders), ends=3)
    if method.anchors is not None:
        with pytest.raises(RuntimeError, match=r"call set_epoch\(epoch\) first, in every epoch"):
            backward(method, net)
        return
    with pytest.warns(RuntimeWarning, match="ends=3, but set_epoch was never called"):
        backward(method, net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(method, net)
        backward(made(dict(net.encoders)), net)


@every
def test_outside_of_its_epochs_nothing_changes(made: type[mmfuse.GradientMethod]) -> None:
    net = Net()
    method = made(dict(net.encoders), starts=2)
    method.set_epoch(1)
    net.zero_grad()
    joint, unimodal, seen = net.losses()
    parameters = list(net.parameters())
    # A training without these methods has this loss: the joint one, or the sum of all.
    two = method.rule.need.second == "unimodal"
    expected = torch.autograd.grad(
        joint + sum(unimodal.values()) if two else joint, parameters, retain_graph=True
    )
    out = method.backward(joint, **seen, unimodal_losses=unimodal)
    assert out.coefficients.tolist() == [method.rule.need.neutral] * 2
    for p, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@every
def test_what_is_missing_is_named(made: type[mmfuse.GradientMethod]) -> None:
    net = Net()
    method = made(dict(net.encoders))
    method.set_epoch(0)
    joint, unimodal, seen = net.losses()
    need = method.rule.need
    if need.second == "unimodal":
        with pytest.raises(TypeError, match="backward needs unimodal_losses"):
            method.backward(joint, **seen)
        with pytest.raises(ValueError, match=r"unimodal_losses .* missing \['visual'\]"):
            method.backward(joint, unimodal_losses={"audio": unimodal["audio"]})
        for verb in (method.step, method.observe):
            with pytest.raises(TypeError, match="needs two gradients of each encoder"):
                verb(seen["logits"], seen["labels"])
    else:
        with pytest.raises(TypeError, match="backward needs logits and labels"):
            method.backward(joint)
        with pytest.raises(TypeError, match=r"labels.* go together"):
            method.step(seen["logits"])
        for name in need.inputs:
            with pytest.raises(TypeError, match="go together: give all or none"):
                method.observe(**{**seen, name: None})
        joint.backward()
        with pytest.raises(RuntimeError, match="nothing was observed"):
            method.step()
    assert method._clock.step == 0
