"""`shared=`: parameters that several modalities use belong to none, and stay unmodulated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from balancing import (
    MONITORING,
    ON_GRADIENTS,
    ON_UPDATES,
    acted,
    balance,
    make,
    see,
    show,
    start,
)
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import mmfuse
from mmfuse.loop.modalities import Modalities

SIZES = {"audio": 5, "visual": 7}
LABELS = torch.tensor([0, 1, 2, 0, 1, 1])


class Encoder(nn.Module):
    """A layer of its own, and one that the other encoder has as well."""

    def __init__(self, width: int, common: nn.Module) -> None:
        super().__init__()
        self.own, self.common = nn.Linear(width, 6), common

    def forward(self, x: Tensor) -> Tensor:
        return self.common(torch.tanh(self.own(x)))


class Net(nn.Module):
    """Two encoders with a common layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.common = nn.Linear(6, 4)
        self.encoders = nn.ModuleDict({n: Encoder(d, self.common) for n, d in SIZES.items()})
        self.head = nn.Linear(8, 3)

    @property
    def own(self) -> dict[str, list[nn.Parameter]]:
        return {name: list(net.own.parameters()) for name, net in self.encoders.items()}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: self.encoders[n](x) for n, x in inputs.items()}

    def shown(self, method: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        inputs = {n: torch.randn(6, d, generator=generator) for n, d in SIZES.items()}
        features = self(inputs)  # a module that is sharded has to be called as a whole first
        return show(method, self.head, see(self.head, features, inputs, LABELS))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain_gradients(method: Any) -> dict[str, Tensor]:
    """The gradients of the method's losses, without the method."""
    model = Net()
    shown = model.shown(method)
    loss = shown.loss
    if method.rule.need.second == "unimodal":
        loss = loss + sum(shown.unimodal_losses.values())
    loss.backward()
    return gradients(model)


def made(kind: str, encoders: Any, model: Net, **changes: Any) -> Any:
    if kind in MONITORING:  # also of encoders that are lists of parameters
        changes["forward"] = dict(model.encoders)
    return make(kind, encoders, stream=mmfuse.NoiseStream(3), **changes)


@pytest.mark.parametrize("kind", ON_GRADIENTS)
def test_a_method_acts_as_on_the_own_parameters_alone(kind: str) -> None:
    """Several steps: anchors, noise and state are of the own parameters, to the bit."""
    results = []
    for shared in (True, False):
        model = Net()
        if shared:
            method = made(kind, dict(model.encoders), model, shared=model.common)
        else:
            method = made(kind, model.own, model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen, first = [], {}
        for _ in range(3):
            start(method)
            optimizer.zero_grad()
            seen.append(balance(method, model.shown(method)))
            first = first or gradients(model)
            optimizer.step()
        method.load_state_dict(copy.deepcopy(method.state_dict()))
        results.append((first, method.state_dict()["state"], model.state_dict(), seen))
    (first, state, trained, seen), (_, state_of_own, expected, _) = results
    assert acted(method, seen)
    for one, other in ((state, state_of_own), (trained, expected)):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    of_plain = plain_gradients(method)
    for name in ("common.weight", "common.bias", "head.weight"):
        torch.testing.assert_close(first[name], of_plain[name])


@pytest.mark.parametrize("kind", ON_UPDATES)
def test_an_update_of_what_is_shared_is_the_optimizers(kind: str) -> None:
    model = Net()
    method = made(kind, dict(model.encoders), model, shared=[model.common], apply_to="update")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method.attach(optimizer)
    start(method)
    shown = model.shown(method)
    shown.loss.backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method.step(shown.seen["logits"], LABELS)
    optimizer.step()
    as_usual = {
        n
        for n, p in model.named_parameters()
        if torch.allclose(p, before[n] - 0.1 * p.grad, rtol=1e-6, atol=0)
    }
    assert {"common.weight", "common.bias"} <= as_usual < before.keys()


def test_ogm_backward_takes_it() -> None:
    results = []
    for shared in (True, False):
        model = Net()
        method = mmfuse.OGM(model.own)
        shown = model.shown(method)
        more: Any = {"shared": model.common} if shared else {}
        mmfuse.ogm_backward(
            shown.loss,
            model.encoders if shared else model.own,
            shown.seen["logits"],
            LABELS,
            stream=mmfuse.NoiseStream(1),
            **more,
        )
        results.append(gradients(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


class TestForms:
    """A module, a parameter, or several of both; a generator is read once."""

    def count(self, shared: Any) -> int:
        model = Net()
        found = Modalities(model.encoders, shared=shared(model))
        assert id(model.head.weight) not in map(id, found.parameters)
        assert not any(p is model.common.weight for p in found.parameters)
        found.check_unchanged()
        return len(found.parameters)

    def test_all_of_them(self) -> None:
        assert self.count(lambda m: m.common) == 4
        assert self.count(lambda m: m.common.parameters()) == 4
        assert self.count(lambda m: [m.common]) == 4
        assert self.count(lambda m: [m.common.weight, m.common.bias, m.head]) == 4
        assert self.count(lambda m: [m.common, m.encoders["audio"].own.bias]) == 3
        assert self.count(lambda m: nn.ModuleList([m.common, m.head])) == 4

    def test_one_parameter(self) -> None:
        a, b = nn.Linear(3, 2), nn.Linear(3, 2)
        b.bias = a.bias
        found = Modalities({"a": a, "b": b}, shared=a.bias)
        assert [id(p) for p in found.parameters] == [id(a.weight), id(b.weight)]

    def test_what_no_encoder_holds_changes_nothing(self) -> None:
        nets = {n: nn.Linear(3, 2) for n in "ab"}
        assert len(Modalities(nets, shared=nn.Linear(2, 2)).parameters) == 4
        assert len(Modalities(nets, shared=[]).parameters) == 4

    def test_it_is_never_looked_at(self) -> None:
        """A quantised table may be shared, where an encoder's own would be refused."""
        table = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        a, b = nn.Linear(3, 2), nn.Linear(3, 2)
        for net in (a, b):
            net.register_parameter("table", table)
        with pytest.raises(TypeError, match=r"encoders\['a'\]\.table"):
            Modalities({"a": a, "b": nn.Linear(3, 2)})
        assert len(Modalities({"a": a, "b": b}, shared=[table]).parameters) == 4

    def test_other_types(self) -> None:
        model = Net()
        for shared, message in (
            ("common", "shared must be a module, a parameter or an iterable of both, got str"),
            (3, "shared must be .*, got int"),
            ({"common": model.common}, "shared must be .*, got dict"),
            (["common"], r"shared\[0\] is neither a module nor a parameter but str"),
            ([model.common, None], r"shared\[1\] is neither"),
            (model.common.weight * 1.0, "shared is the result of an operation"),
            ([model.common.state_dict()["weight"]], r"shared\[0\] is a tensor that requires no"),
        ):
            with pytest.raises(TypeError, match=message):
                Modalities(model.encoders, shared=shared)


class TestErrors:
    """They say what to do where encoders have parameters in common."""

    def test_a_parameter_in_two_encoders(self) -> None:
        message = (
            r"encoders\['visual'\]\.common\.weight is the same parameter as "
            r"encoders\['audio'\]\.common\.weight; .* as shared=\[\.\.\.\]: it stays unmodulated"
        )
        with pytest.raises(ValueError, match=message):
            mmfuse.OGM(dict(Net().encoders))

    def test_a_siamese_encoder_has_nothing_of_each(self) -> None:
        siamese = nn.Linear(5, 4)
        encoders = {"left": siamese, "right": siamese}
        with pytest.raises(ValueError, match="same parameter"):
            mmfuse.OGM(encoders)
        message = (
            r"encoders\['left'\] has no parameter of its own: shared= holds all 2\. .*scale_grad"
        )
        with pytest.raises(ValueError, match=message):
            mmfuse.OGM(encoders, shared=siamese)

    def test_own_parameters_that_are_not_selected(self) -> None:
        model = Net()
        message = r"has no parameter to modulate: 2 found, but select='conv' selects none"
        with pytest.raises(ValueError, match=message):
            mmfuse.OGM(dict(model.encoders), shared=model.common, select="conv")


def siamese_step(coefficients: tuple[float, float]) -> Tensor:
    """The gradient of an encoder that two modalities use, each feature's scaled on its way back."""
    torch.manual_seed(0)
    siamese, head = nn.Linear(5, 4), nn.Linear(8, 3)
    features = [siamese(torch.randn(6, 5)) for _ in coefficients]
    scaled = [
        mmfuse.ops.scale_grad(f, torch.tensor(k))
        for f, k in zip(features, coefficients, strict=True)
    ]
    F.cross_entropy(head(torch.cat(scaled, 1)), LABELS).backward()
    assert siamese.weight.grad is not None
    return siamese.weight.grad


def test_what_the_error_recommends_for_a_siamese_encoder_works() -> None:
    """Both modalities' parts of its gradient add up, each times its coefficient."""
    one, other = siamese_step((1.0, 0.0)), siamese_step((0.0, 1.0))
    torch.testing.assert_close(siamese_step((0.25, 0.5)), 0.25 * one + 0.5 * other)


class TestSurgery:
    """A shared module may be replaced within one that was given, which can be asked again."""

    def step(self, method: Any, model: Net) -> Any:
        model.zero_grad()
        shown = model.shown(method)
        shown.loss.backward()
        return method.step(shown.seen["logits"], LABELS)

    def test_in_a_shared_module(self) -> None:
        model = Net()
        method = mmfuse.OGM(dict(model.encoders), shared=model.common)
        self.step(method, model)
        model.common.weight = nn.Parameter(torch.randn(4, 6))
        assert self.step(method, model).finite
        given = mmfuse.OGM(dict(model.encoders), shared=model.common.parameters())
        self.step(given, model)
        model.common.weight = nn.Parameter(torch.randn(4, 6))
        with pytest.raises(ValueError, match=r"\['audio'\]\.common\.weight is new"):
            self.step(given, model)

    def test_in_an_encoders_own_part(self) -> None:
        model = Net()
        method = mmfuse.OGM(dict(model.encoders), shared=model.common)
        model.encoders["visual"].own.weight = nn.Parameter(torch.randn(6, 7))
        with pytest.raises(ValueError, match=r"\['visual'\]\.own\.weight is new"):
            self.step(method, model)

    def test_copies_go_on(self) -> None:
        model = Net()
        method = mmfuse.OGM(dict(model.encoders), shared=model.common)
        model, method = copy.deepcopy((model, method))
        method.modalities.check_unchanged()
        before = len(method.modalities.parameters)
        self.step(method, model)
        assert before == 4


def _of_ranks(rank: int, kind: str, sharded: bool) -> list[Tensor]:
    """Gradients after a step, whole; on several ranks of the same batch."""
    model = Net()
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for part in (model.common, *model.encoders.values(), model.head):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    method = made(kind, dict(model.encoders), model, shared=model.common)
    start(method)
    balance(method, model.shown(method))
    found = [p.grad for p in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found if g is not None]


@pytest.mark.parametrize("kind", ON_GRADIENTS)
def test_under_fully_shard(kind: str) -> None:
    expected = _of_ranks(0, kind, False)
    for found in ranks(2).run(_of_ranks, kind, True):
        assert len(found) == len(expected) == 8
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
