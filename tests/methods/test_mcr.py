"""MCR's terms and the gradients that each encoder gets of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cells import Cell
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse
from mmfuse.methods._mcr_parts import nt_xent, weighted
from released import mcr as released

NAMES = ("audio", "visual", "text")
ROWS = 6
WEIGHT = {"greedy": -1.0, "independent": 0.0, "collaborative": 1.0}


class Net(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(count)
        self.encoders = nn.ModuleDict({n: nn.Linear(3, 5) for n in NAMES[:count]})
        self.head = nn.Linear(5 * count, 4)
        self.inputs = {n: torch.randn(ROWS, 3).double() for n in self.encoders}
        self.labels = torch.tensor([0, 1, 2, 3, 0, 1])
        self.double()

    def forward(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        features = {n: net(self.inputs[n]).tanh() for n, net in self.encoders.items()}
        return features, mmfuse.unimodal_logits(self.head, features)

    def gradients(self, loss: Tensor) -> dict[str, list[Tensor]]:
        """The gradients of each encoder."""
        return {
            n: list(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))
            for n, net in self.encoders.items()
        }


def orders(seed: int, count: int, permutations: int) -> list[Tensor]:
    stream = mmfuse.NoiseStream(seed)
    drawn = [stream.uniform(ROWS * permutations, m) for m in range(count)]
    return [u.view(permutations, ROWS).argsort(1) for u in drawn]


def divergence(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.softmax(1), b.softmax(1)
    mean = (p + q) / 2
    kl = [(x * (x.log() - mean.log())).sum(1) for x in (p, q)]
    return (kl[0] + kl[1]).mean() / 2


def js(z: dict[str, Tensor], each: list[Tensor]) -> list[Tensor]:
    """J_m, one permutation after the other."""
    joint = sum(z.values())
    found = []
    for name, order in zip(z, each, strict=True):
        others = sum(x for n, x in z.items() if n != name)
        found.append(sum(divergence(z[name][o] + others, joint) for o in order) / len(order))
    return found


@pytest.mark.parametrize("strategy", WEIGHT)
@pytest.mark.parametrize("count", [2, 3])
def test_each_encoder_plays_its_own_game(cell: Cell, count: int, strategy: Any) -> None:
    net = Net(count).to(cell.device)
    net.inputs = {n: x.to(cell.device) for n, x in net.inputs.items()}
    features, z = net()
    mcr = mmfuse.MCR(
        0.5,
        strategy,
        contrast=0.0,
        permutations=3,
        num_modalities=count,
        stream=mmfuse.NoiseStream(5, cell.device),
        backend=cell.backend,
    )
    out = mcr(features, z)
    every = js(z, [o.to(cell.device) for o in orders(5, count, 3)])
    torch.testing.assert_close(out.contributions, torch.stack(every).detach())
    torch.testing.assert_close(out.loss, -0.5 * sum(every))
    found, k = net.gradients(out.loss), WEIGHT[strategy]
    for m, name in enumerate(net.encoders):
        own = net.gradients(every[m])[name]
        of_others = net.gradients(sum(j for i, j in enumerate(every) if i != m))[name]
        expected = [-0.5 * (a + k * b) for a, b in zip(own, of_others, strict=True)]
        torch.testing.assert_close(found[name], expected, rtol=1e-7, atol=1e-10)
        assert all(bool(g.abs().sum() > 0) for g in found[name])
    assert out.contrast == 0


@pytest.mark.parametrize("strategy", ["greedy", "independent"])
def test_official_has_the_released_gradients(strategy: Any) -> None:
    net = Net(2)
    features, z = net()
    mcr = mmfuse.MCR.official(
        0.5, strategy, permutations=3, stream=mmfuse.NoiseStream(5), contrast=0.7
    )
    out = mcr(features, z, net.labels)

    class AsReleased(nn.Module):
        fc = net.head

        def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, ...]:
            a, v = features.values()
            return a, v, net.head(torch.cat([a, v], 1))

    kept = nn.ParameterList(net.parameters())
    optimizer = torch.optim.SGD(kept, lr=0.0)
    seen = released.step(
        AsReleased(),
        optimizer,
        *net.inputs.values(),
        net.labels,
        orders=orders(5, 2, 3),
        strength=0.5,
        strategy=strategy,
        contrast=0.7,
    )
    grads = [p.grad.clone() for p in net.parameters()]
    features, z = net()
    out = mcr.official(0.5, strategy, permutations=3, stream=mmfuse.NoiseStream(5), contrast=0.7)(
        features, z, net.labels
    )
    joint = net.head(torch.cat(list(features.values()), 1))
    losses = [F.cross_entropy(joint, net.labels)]
    losses += mmfuse.unimodal_losses(z, net.labels).values()
    net.zero_grad()
    (sum(losses) + out.loss).backward()
    torch.testing.assert_close(grads, [p.grad for p in net.parameters()], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(out.contributions, torch.stack(seen.divergences).detach())
    torch.testing.assert_close(out.contrast, seen.contrast.detach())


def test_a_head_that_adds_up_may_be_given_or_not() -> None:
    net = Net(2)
    found = []
    for head in (None, net.head):
        features, z = net()
        mcr = mmfuse.MCR(permutations=2, stream=mmfuse.NoiseStream(5))
        out = mcr(features, z, net.labels, head=head)
        found.append((out.loss, out.contributions, net.gradients(out.loss)))
    torch.testing.assert_close(*found)


def test_any_head_sees_permuted_features() -> None:
    net = Net(2)
    deep = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    features, z = net()
    mcr = mmfuse.MCR(0.5, contrast=0, permutations=2, stream=mmfuse.NoiseStream(5))
    out = mcr(features, z, head=deep)
    a, v = features.values()
    joint = deep(torch.cat([a, v], 1))
    of_audio, of_visual = orders(5, 2, 2)
    expected = [
        sum(divergence(deep(torch.cat([a[o], v], 1)), joint) for o in of_audio) / 2,
        sum(divergence(deep(torch.cat([a, v[o]], 1)), joint) for o in of_visual) / 2,
    ]
    torch.testing.assert_close(out.contributions, torch.stack(expected).detach())


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("strategy", ["greedy", "independent"])
def test_the_gradient_of_a_head_that_does_not_add_up(strategy: str, official: bool) -> None:
    """The release's terms with such a head, whose features alone are cut off from the gradient."""
    net = Net(2)
    deep = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    made = mmfuse.MCR.official if official else mmfuse.MCR
    mcr = made(0.5, strategy, contrast=0, permutations=2, stream=mmfuse.NoiseStream(5))
    features, z = net()
    out = mcr(features, z, head=deep)
    a, v = (f.detach() for f in features.values())
    joint = deep(torch.cat([a, v], 1))
    terms = [divergence(deep(torch.cat([a[o], v], 1)), joint) / 2 for o in orders(5, 2, 2)[0]]
    terms += [divergence(deep(torch.cat([a, v[o]], 1)), joint) / 2 for o in orders(5, 2, 2)[1]]
    wanted = -0.5 * sum(terms)
    torch.testing.assert_close(out.loss, wanted)
    if strategy == "greedy":  # J_m has both signs
        wanted = 0.0 * wanted
    parameters = list(deep.parameters())
    expected = torch.autograd.grad(wanted, parameters)
    found = torch.autograd.grad(out.loss, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("count", [2, 3])
def test_the_contrast_is_over_all_pairs_of_a_class(count: int) -> None:
    torch.manual_seed(0)
    features = [torch.randn(ROWS, 5, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    labels = torch.tensor([0, 1, 2, -100, 0, 1])
    rows = F.normalize(torch.cat(features), dim=1)
    classes = labels.repeat(count).tolist()
    terms = []
    for i, mine in enumerate(classes):
        others = [n for n, c in enumerate(classes) if c not in (mine, -100)]
        for j, its in enumerate(classes):
            if i == j or mine != its or mine == -100:
                continue
            s = torch.exp(rows[i] @ rows[j] / 0.5)
            terms.append(
                -torch.log(s / (s + sum(torch.exp(rows[i] @ rows[n] / 0.5) for n in others)))
            )
    found = nt_xent(features, labels, 0.5)
    expected = sum(terms) / len(terms)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, features), torch.autograd.grad(expected, features)
    )


@pytest.mark.parametrize("labels", [[1, 1, 1], [-100, -100, -100], [0, -100, -100]])
def test_without_others_or_without_pairs_the_contrast_is_0(labels: list[int]) -> None:
    features = [torch.randn(3, 5, requires_grad=True) for _ in range(1)]
    found = nt_xent(features, torch.tensor(labels), 0.5)
    (grad,) = torch.autograd.grad(found, features)
    assert found == 0 and bool((grad == 0).all())


@pytest.mark.parametrize("k", [-1, 0, 1])
def test_weighted_is_exact(k: int) -> None:
    x = torch.randn(9, requires_grad=True)
    y = weighted(x, k)
    assert torch.equal(y, x)
    if k:
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert (grad == k).all()
    else:
        assert not y.requires_grad


def test_what_is_constant_contributes_nothing() -> None:
    net = Net(2)
    net.inputs["audio"][:] = net.inputs["audio"][:1]
    features, z = net()
    out = mmfuse.MCR(permutations=4)(features, z, net.labels)
    assert out.contributions[0] < 1e-15 < out.contributions[1]


def test_steps_permute_anew_and_evaluation_adds_nothing() -> None:
    net = Net(2)
    features, z = net()
    mcr = mmfuse.MCR(permutations=1, stream=mmfuse.NoiseStream(1), starts=1)
    mcr.set_epoch(0)
    assert mcr(features, z, net.labels).loss == 0
    mcr.set_epoch(1)
    first, second = mcr(features, z, net.labels), mcr(features, z, net.labels)
    assert not torch.equal(first.contributions, second.contributions)
    out = mcr.eval()(features, z)
    assert out.loss == 0 and not out.contributions.any()


FEATURES = {n: torch.randn(ROWS, 5) for n in ("audio", "visual")}
LOGITS = {n: torch.randn(ROWS, 4) for n in FEATURES}
LABELS = torch.zeros(ROWS, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"labels": None}, TypeError, "labels must be class indices, for the contrast; got None"),
        ({"labels": torch.zeros(ROWS, 4)}, TypeError, "labels must be class indices"),
        ({"labels": LABELS.to_sparse()}, TypeError, "labels must be dense"),
        ({"labels": LABELS[:3]}, ValueError, r"labels must have shape \[6\], got \[3\]"),
        ({"logits": {"audio": LOGITS["audio"]}}, ValueError, r"missing \['visual'\]"),
        (
            {"logits": {**LOGITS, "visual": LABELS}},
            TypeError,
            r"logits\['visual'\] must be a floating-point tensor; it has dtype torch\.int64",
        ),
        (
            {"logits": {**LOGITS, "visual": torch.zeros(ROWS, 3)}},
            ValueError,
            r"logits\['visual'\] must be .* like logits\['audio'\] \[6, 4\], got \[6, 3\]",
        ),
        (
            {"features": {**FEATURES, "visual": torch.zeros(ROWS, 2)}},
            ValueError,
            "must be of one size, not {'audio': 5, 'visual': 2}; contrast=0",
        ),
    ],
)
def test_bad_batches(change: dict[str, Any], error: type[Exception], text: str) -> None:
    mcr = mmfuse.MCR()
    before = mcr.noise_state.clone()
    given = {"features": FEATURES, "logits": LOGITS, "labels": LABELS, **change}
    with pytest.raises(error, match=text):
        mcr(**given)
    assert torch.equal(mcr.noise_state, before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strategy": "fair"}, "strategy must be one of 'greedy', 'independent', 'collaborative'"),
        ({"strength": -1.0}, "strength must be a finite number of at least 0"),
        ({"contrast": math.inf}, "contrast must be a finite number"),
        ({"temperature": 0.0}, "temperature must be a positive finite number"),
        ({"permutations": 0}, "permutations must be at least 1"),
        ({"num_modalities": 1}, "num_modalities must be at least 2"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        mmfuse.MCR(**options)


def test_official_is_for_two() -> None:
    with pytest.raises(ValueError, match=r"MCR\.official is for num_modalities=2"):
        mmfuse.MCR.official(num_modalities=3)
