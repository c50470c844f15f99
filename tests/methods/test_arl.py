"""ARL's formula and its state; the authors' numbers are in tests/golden."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cells import Cell
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmfuse

Named = dict[str, Tensor]


def batch_of(count: int, device: Any = "cpu", rows: int = 9) -> tuple[Named, Named, Tensor]:
    """Features, logits of other sizes and certainties, and labels."""
    names = [f"m{i}" for i in range(count)]
    features = {n: torch.randn(rows, 5, device=device).requires_grad_() for n in names}
    logits = {n: (i + 1) * torch.randn(rows, 4, device=device) for i, n in enumerate(names)}
    return features, logits, torch.randint(0, 4, (rows,), device=device)


def written(logits: list[list[list[float]]], temperature: float) -> tuple[list[float], ...]:
    """The equations, number by number: w, v, H and u."""
    count, sizes, entropies = len(logits), [], []
    for rows in logits:
        sizes.append(sum(abs(z) for row in rows for z in row) / len(rows))
        total = 0.0
        for row in rows:
            e = [math.exp(z) for z in row]
            total -= sum(x / sum(e) * math.log(x / sum(e)) for x in e)
        entropies.append(total / len(rows))
    v = [s / sum(sizes) for s in sizes]
    h = [max(x / sum(entropies), 0.6 / count) for x in entropies]
    u = [1 / x / sum(1 / y for y in h) for x in h]
    others = [sum(v[j] for j in range(count) if j != m) / (count - 1) for m in range(count)]
    e = [math.exp(temperature * o * c) for o, c in zip(others, u, strict=True)]
    return [x / sum(e) for x in e], v, h, u


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_formula(cell: Cell, count: int) -> None:
    arl = mmfuse.ARL(5.0, num_modalities=count, backend=cell.backend).to(cell.device)
    floored = 0
    for _ in range(2 if cell.backend == "triton" else 25):
        features, logits, labels = batch_of(count, cell.device)
        entering = torch.randn(9, 5, device=cell.device)
        w, v, h, u = written([z.tolist() for z in logits.values()], 5.0)
        out = arl(features, logits, labels)
        # Entropies in float32, which differences of logarithms round by some roundings of 1.
        for found, expected in (
            (out.weights, w),
            (out.magnitudes, v),
            (out.entropies, h),
            (out.certainties, u),
            (out.coefficients, [1 + x for x in w]),
        ):
            assert found.tolist() == pytest.approx(expected, rel=1e-5)
        sum((entering * f).sum() for f in out.features.values()).backward()
        for m, (name, f) in enumerate(features.items()):
            assert torch.equal(out.features[name], f)
            torch.testing.assert_close(f.grad, (1 + w[m]) * entering, rtol=1e-5, atol=0)
            p = logits[name].softmax(1).gather(1, labels[:, None]).mean()
            torch.testing.assert_close(out.scores[m].float(), p.float(), rtol=1e-5, atol=0)
        floored += sum(x == 0.6 / count for x in h)
    assert floored or count == 2


def test_the_floor_holds() -> None:
    features, logits, labels = batch_of(2)
    logits["m0"] = 30 * logits["m0"]
    out = mmfuse.ARL()(features, logits, labels)
    assert float(out.entropies[0]) == 0.3 and float(out.entropies[1]) > 0.7


def test_rows_that_do_not_count_are_left_out() -> None:
    features, logits, labels = batch_of(2)
    labels[[1, 4]] = -100
    kept = [i for i in range(9) if i not in (1, 4)]
    spoilt = {name: z.clone() for name, z in logits.items()}
    for z in spoilt.values():
        z[[1, 4]] = math.nan
    found = mmfuse.ARL()(features, spoilt, labels)
    some = {name: z[kept] for name, z in logits.items()}
    expected = mmfuse.ARL()({n: f[kept] for n, f in features.items()}, some, labels[kept])
    torch.testing.assert_close(found.weights, expected.weights)
    torch.testing.assert_close(found.scores, expected.scores)
    unlabelled = mmfuse.ARL()({n: f[kept] for n, f in features.items()}, some)
    torch.testing.assert_close(unlabelled.weights, expected.weights)
    assert unlabelled.scores is None


def test_places_count_as_samples_do() -> None:
    """Logits [B, C, d] are those of B·d samples."""
    features, _, _ = batch_of(2, rows=3)
    logits = {name: torch.randn(3, 4, 5) for name in features}
    labels = torch.randint(0, 4, (3, 5))
    labels[0, 2] = -100
    found = mmfuse.ARL()(features, logits, labels)
    flat = {name: z.movedim(1, 2).reshape(15, 4) for name, z in logits.items()}
    many = {name: torch.randn(15, 5) for name in features}
    expected = mmfuse.ARL()(many, flat, labels.flatten())
    torch.testing.assert_close(found.weights, expected.weights)


def test_class_weights_count() -> None:
    features, logits, labels = batch_of(2)
    labels = torch.arange(9) % 4
    only = torch.tensor([1.0, 0.0, 0.0, 0.0])
    found = mmfuse.ARL(criterion=nn.CrossEntropyLoss(only))(features, logits, labels)
    rows = labels == 0
    expected = mmfuse.ARL()(
        {n: f[rows] for n, f in features.items()}, {n: z[rows] for n, z in logits.items()}
    )
    torch.testing.assert_close(found.weights, expected.weights)


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_where_nothing_is_said_or_all_is_certain_modalities_are_alike(value: float) -> None:
    """Magnitudes of 0, or entropies of 0."""
    features, logits, labels = batch_of(3)
    for z in logits.values():
        z.zero_()
        z[:, 0] = value
    out = mmfuse.ARL(num_modalities=3)(features, logits, labels)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    for found in (out.weights, out.magnitudes, out.entropies):
        torch.testing.assert_close(found, third)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("release", [None, "later"])
def test_what_is_not_finite_scales_nothing_and_is_not_kept(release: Any, value: float) -> None:
    arl = mmfuse.ARL() if release is None else mmfuse.ARL.official(release=release, starts=0)
    features, logits, labels = batch_of(2)
    arl(features, logits, labels)
    logits["m1"][3, 2] = value
    out = arl(features, logits, labels)
    assert not out.weights.isfinite().all()
    if release is None:
        assert out.coefficients.tolist() == [1.0, 1.0]
    assert arl.weights.tolist() == [0.5, 0.5]


def test_releases_differ_in_whose_weights_act() -> None:
    later, july = (mmfuse.ARL.official(release=r) for r in ("later", "july"))
    plain = mmfuse.ARL(starts=6)
    last = None
    for epoch in (5, 6, 6, 6, 5, 6):
        features, logits, labels = batch_of(2)
        for arl in (later, july, plain):
            arl.set_epoch(epoch)
            assert arl.loss_weight == (4.0 if epoch == 6 else 1.0)
        outs = [arl(features, logits, labels) for arl in (later, july, plain)]
        own = [(1 + w) * (epoch == 6) + (epoch != 6) for w in outs[0].weights.tolist()]
        assert outs[2].coefficients.tolist() == pytest.approx(own)
        before = [0.5, 0.5] if last is None else last
        late = [1 + w for w in before] if epoch == 6 else [1.0, 1.0]
        assert outs[0].coefficients.tolist() == pytest.approx(late)
        assert outs[1].coefficients.tolist() == ([1.5, 1.5] if epoch == 6 else [1.0, 1.0])
        last = outs[0].weights.tolist() if epoch == 6 else None


def test_a_release_goes_on_from_its_state() -> None:
    one, other = (mmfuse.ARL.official(starts=0) for _ in range(2))
    for arl in (one, other):
        arl.set_epoch(0)
    one(*batch_of(2))
    other.load_state_dict(one.state_dict())
    batch = batch_of(2)
    assert torch.equal(one(*batch).coefficients, other(*batch).coefficients)
    assert one.half().weights.dtype == torch.float64


def test_in_evaluation_it_passes() -> None:
    arl = mmfuse.ARL().eval()
    features, _, _ = batch_of(2)
    out = arl(features)
    assert out.features == features and out.coefficients.tolist() == [1.0, 1.0]
    assert out.weights is None
    assert arl.weights.tolist() == [0.5, 0.5]


def test_it_stays_outside_of_checkpointed_parts() -> None:
    arl, (features, logits, labels) = mmfuse.ARL(), batch_of(2)

    def part(a: Tensor, b: Tensor) -> Tensor:
        out = arl({"m0": a, "m1": b}, logits, labels).features
        return out["m0"] * out["m1"]

    out = checkpoint(part, *features.values(), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"ARL is called in a backward pass.* outside of the"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number of at least 0"),
        ({"gamma": math.inf}, ValueError, "gamma must be a finite number of at least 0, got inf"),
        ({"num_modalities": 1}, ValueError, "num_modalities must be at least 2"),
        ({"starts": 2, "ends": 1}, ValueError, "ends=1 is before starts=2"),
        ({"criterion": nn.MSELoss()}, TypeError, "criterion must be nn.CrossEntropyLoss"),
        ({"criterion": "ce"}, TypeError, "criterion must be"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mmfuse.ARL(**options)


def test_bad_arguments_change_nothing() -> None:
    arl = mmfuse.ARL()
    features, logits, labels = batch_of(2)
    arl(features, logits, labels)
    before = copy.deepcopy(arl.state_dict())
    short = {name: z[:3] for name, z in logits.items()}
    for given, error, text in [
        ((features, None, labels), TypeError, r"ARL needs logits in training; call eval\(\)"),
        ((batch_of(3)[0], logits, labels), ValueError, "num_modalities=2, but features has"),
        ((features, {"a": 1, "m1": 2}, labels), ValueError, "name different modalities"),
        (
            (features, {**logits, "m1": [1]}, labels),
            TypeError,
            r"logits\['m1'\] must be a floating",
        ),
        ((features, short, None), ValueError, r"logits\['m0'\] must have 9 rows, .* got \[3, 4\]"),
        ((features, logits, labels + 7), ValueError, r"out of range for logits\['m0'\]"),
    ]:
        with pytest.raises(error, match=text):
            arl(*given)
        assert all(torch.equal(arl.state_dict()[name], x) for name, x in before.items())
