"""ARM against its formulas, and against the released arithmetic in NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cells import CELLS, Cell
from no_sync import no_host_sync
from torch import Tensor

import mmfuse
from mmfuse import ARM, ops
from mmfuse.methods._arm_information import released_ncmi
from mmfuse.methods.arm import modality_weights
from released import arm as released_arm

NAMES = ["audio", "visual", "text"]
Batch = tuple[dict[str, Tensor], Tensor, dict[str, Tensor], Tensor, Tensor]


def batch(
    cell: Cell, count: int = 2, rows: int = 12, width: int = 40, dtype: torch.dtype = torch.float32
) -> Batch:
    """Features after a ReLU, the fused ones made of them, the first with the larger share."""
    labels = torch.randint(0, 4, (rows,), device=cell.device)
    features = {
        n: torch.randn(rows, width, device=cell.device).relu().to(dtype) for n in NAMES[:count]
    }
    fused = sum((0.8 - 0.3 * m) * f for m, f in enumerate(features.values()))
    logits = {n: torch.randn(rows, 4, device=cell.device) for n in NAMES[:count]}
    return features, fused, logits, torch.randn(rows, 4, device=cell.device), labels


def true_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.double().softmax(1)[range(len(labels)), labels].mean().cpu()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_is_the_formula_of_the_docstring(cell: Cell, count: int) -> None:
    names = [*NAMES, "depth"][:count]
    features, fused, logits, fused_logits, labels = batch(cell, 3)
    if count == 4:
        features["depth"] = features["text"] + features["audio"]
        logits["depth"] = logits["text"] - logits["audio"]
    features, logits = ({n: d[n] for n in names} for d in (features, logits))
    arm = ARM(17, 3, num_modalities=count, backend=cell.backend).to(cell.device)
    out = arm(features, fused, logits, fused_logits, labels)

    flat = {n: f.flatten() for n, f in features.items()}
    c = fused.flatten()
    p = {n: true_class(z, labels) for n, z in logits.items()}
    p_c = true_class(fused_logits, labels)
    contributions = {}
    for m, n in enumerate(names):
        others = [o for o in names if o != n]
        nmi = ops.mutual_information(flat[n], c, 17, backend="reference").nmi
        ncmi = torch.stack(
            [
                ops.conditional_mutual_information(flat[n], c, flat[o], 3, backend="reference").ncmi
                for o in others
            ]
        ).mean()
        # The single quantities are float32 here.
        torch.testing.assert_close(out.nmi[m].float(), nmi, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out.ncmi[m].float(), ncmi, rtol=1e-6, atol=1e-7)
        mean_p = sum(p[o] for o in others) / len(others)
        found = out.nmi[m].cpu(), out.ncmi[m].cpu()
        contributions[n] = p_c * found[0] + mean_p * (found[0] - found[1])
        torch.testing.assert_close(
            out.contributions[m].cpu(), contributions[n], rtol=1e-5, atol=1e-6
        )
    if min(contributions.values()) < 1e-6:  # one of them contributes nothing
        assert out.weights.tolist() == [1.0] * count
        return
    for m, n in enumerate(names):
        others = [contributions[o] for o in names if o != n]
        weight = sum(o / contributions[n] for o in others) / len(others)
        torch.testing.assert_close(out.weights[m].cpu(), weight.double(), rtol=1e-4, atol=0)
        assert torch.equal(out.features[n], features[n] * out.weights[m].float())
    assert len(set(out.weights.tolist())) == count


def theirs(
    features: dict[str, Tensor],
    fused: Tensor,
    logits: dict[str, Tensor],
    fused_logits: Tensor,
    labels: Tensor,
) -> list[float]:
    """The released contributions and weights."""
    scores = released_arm.mean_scores([*logits.values(), fused_logits], labels)
    found = released_arm.contributions(features["audio"], features["visual"], fused, scores)
    return [*found.gains, *found.weights]


def test_official_is_the_released_arithmetic(cell: Cell) -> None:
    features, fused, logits, fused_logits, labels = batch(cell, dtype=torch.float64)
    arm = ARM.official(backend=cell.backend).to(cell.device)
    out = arm(features, fused, logits, fused_logits, labels)
    expected = theirs(features, fused, logits, fused_logits, labels)
    # The scores are float32, all else is float64.
    got = [*out.contributions.tolist(), *out.weights.tolist()]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_official_also_where_a_contribution_is_negative(cell: Cell) -> None:
    """Independent values share nothing, and the released ncmi is near 1 nonetheless."""
    features, _, logits, fused_logits, labels = batch(cell, rows=64, dtype=torch.float64)
    values = (features["audio"], torch.randn_like(features["audio"]))
    features = dict(zip(features, values, strict=True))
    fused = torch.randn_like(features["audio"])
    out = ARM.official(backend=cell.backend)(features, fused, logits, fused_logits, labels)
    expected = theirs(features, fused, logits, fused_logits, labels)
    np.testing.assert_allclose(
        [*out.contributions.tolist(), *out.weights.tolist()], expected, rtol=1e-5
    )
    assert out.contributions.min() < 0


def test_official_looks_at_the_batch_in_eval_too() -> None:
    arm, data = ARM.official(), batch(CELLS[0])
    trained = arm(*data)
    arm.eval()
    assert torch.equal(arm(*data).weights, trained.weights)
    with pytest.raises(TypeError, match="ARM needs fused, logits, fused_logits and labels"):
        arm(data[0])


@pytest.mark.parametrize("shape", ["usual", "one bin of z is empty"])
def test_released_ncmi_is_the_numpy_code(shape: str) -> None:
    x, y, z = np.random.default_rng(4).normal(size=(3, 500))
    x = np.maximum(x + 0.5 * y, 0)
    if shape != "usual":
        z = np.full_like(z, 3.0)
    counts = torch.from_numpy(np.histogramdd(np.stack([x, y, z], 1), 2)[0])
    expected = released_arm.ncmi(*map(torch.from_numpy, (x, y, z)))
    np.testing.assert_allclose(released_ncmi(counts).item(), expected, rtol=1e-12)


def test_released_ncmi_is_near_one_for_features_after_a_relu() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y, z = np.maximum(generator.normal(size=(3, 4096)) - 1.5, 0)
        counts = torch.from_numpy(np.histogramdd(np.stack([x, y, z], 1), 2)[0])
        assert 0.9 < released_ncmi(counts) < 1.1


def test_eval_needs_no_labels_and_takes_the_average_of_training(cell: Cell) -> None:
    arm = ARM(momentum=0.7, backend=cell.backend).to(cell.device)
    features = batch(cell)[0]
    arm.eval()
    assert torch.equal(arm(features).weights.cpu(), torch.ones(2, dtype=torch.float64))
    arm.train()
    average, share = torch.zeros(2, dtype=torch.float64), 0.0
    for _ in range(3):
        weights = arm(*batch(cell)).weights.cpu()
        average, share = 0.7 * average + 0.3 * weights, 0.7 * share + 0.3
    arm.eval()
    out = arm(features)
    torch.testing.assert_close(out.weights.cpu(), average / share, rtol=1e-12, atol=0)
    assert torch.equal(out.features["audio"], features["audio"] * out.weights[0].float())
    assert torch.equal(arm(features).weights, out.weights)  # and does not change it


def test_a_batch_that_is_not_finite_does_not_stay_in_the_average(cell: Cell) -> None:
    arm = ARM(backend=cell.backend).to(cell.device)
    arm(*batch(cell))
    before = arm.average.clone(), arm.average_weight.clone()
    features, *rest = batch(cell)
    features["visual"][3, 5] = torch.nan
    out = arm(features, *rest)
    assert out.weights.isnan().all()
    assert torch.equal(arm.average, before[0]) and torch.equal(arm.average_weight, before[1])


def test_a_batch_without_a_label_says_nothing(cell: Cell) -> None:
    """The weights are those of the batches before it, and stay in the average as they are."""
    arm = ARM(backend=cell.backend).to(cell.device)
    *given, labels = batch(cell)
    arm(*given, labels)
    before = copy.deepcopy(arm.state_dict())
    out = arm(*given, torch.full_like(labels, -100))
    expected = before["average"] / before["average_weight"]
    torch.testing.assert_close(out.weights, expected.to(out.weights))
    assert all(value.isfinite().all() for value in out.features.values())
    torch.testing.assert_close(dict(arm.state_dict()), dict(before), rtol=0, atol=0)


def test_weights_are_detached(cell: Cell) -> None:
    features, fused, *rest = batch(cell)
    for tensor in (*features.values(), fused):
        tensor.requires_grad_()
    arm = ARM(backend=cell.backend).to(cell.device)
    out = arm(features, fused, *rest)
    sum(f.sum() for f in out.features.values()).backward()
    assert fused.grad is None and not out.weights.requires_grad
    for m, feature in enumerate(features.values()):
        expected = out.weights[m].float().expand_as(feature)
        assert torch.equal(feature.grad, expected)


def test_weights_are_positive_and_bounded_by_the_clamp() -> None:
    weights = modality_weights(torch.tensor([-0.3, 0.2], dtype=torch.float64).clamp(min=1e-6))
    torch.testing.assert_close(
        weights, torch.tensor([2e5, 5e-6], dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_batched_information_is_that_of_each_problem(cell: Cell) -> None:
    rows = [torch.randn(5, 60, device=cell.device) for _ in range(4)]
    rows[3] = rows[0] + 0.5 * rows[1]
    for make in (ARM, ARM.official):
        information = make(6, 2, num_modalities=3).rule.information
        nmi, ncmi = information(rows, cell.backend)
        assert nmi.shape == ncmi.shape == (3, 5)
        for p in range(5):
            one = information([r[p : p + 1] for r in rows], cell.backend)
            assert torch.equal(nmi[:, p : p + 1], one[0])
            assert torch.equal(ncmi[:, p : p + 1], one[1])


@pytest.mark.parametrize("count", [2, 3])
def test_sample_contributions(cell: Cell, count: int) -> None:
    _, _, logits, fused_logits, labels = batch(cell, count, rows=9)
    got = mmfuse.sample_contributions(
        logits, fused_logits, labels, bins=3, backend=cell.backend
    ).cpu()
    assert got.shape == (9, count)
    values = [z.cpu() for z in logits.values()]
    c, y = fused_logits.cpu(), labels.cpu()
    for i in range(9):
        nmi, ncmi, p = [], [], []
        for m, z in enumerate(values):
            nmi.append(ops.mutual_information(z[i], c[i], 3, backend="reference").nmi)
            ncmi.append(
                torch.stack(
                    [
                        ops.conditional_mutual_information(
                            z[i], c[i], o[i], 2, backend="reference"
                        ).ncmi
                        for j, o in enumerate(values)
                        if j != m
                    ]
                ).mean()
            )
            p.append(z[i].double().softmax(0)[y[i]])
        p_c = c[i].double().softmax(0)[y[i]]
        for m in range(count):
            rest = [nmi[j] - ncmi[j] for j in range(count) if j != m]
            expected = p_c * nmi[m] + p[m] * sum(rest) / len(rest)
            # The single quantities are float32 here, and their difference cancels.
            torch.testing.assert_close(got[i, m], expected, rtol=1e-6, atol=1e-6)


def test_sample_contributions_of_a_sample_that_is_not_finite(cell: Cell) -> None:
    _, _, logits, fused_logits, labels = batch(cell, rows=6)
    logits["audio"][2, 1] = torch.inf
    got = mmfuse.sample_contributions(logits, fused_logits, labels, backend=cell.backend)
    assert got[2].isnan().all()
    assert got[[0, 1, 3, 4, 5]].isfinite().all()


def test_resumes(cell: Cell) -> None:
    first = ARM(backend=cell.backend).to(cell.device)
    first(*batch(cell))
    second = ARM(backend=cell.backend).to(cell.device)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    features = batch(cell)[0]
    assert torch.equal(second.eval()(features).weights, first.eval()(features).weights)


def test_does_not_wait_for_the_device(cell: Cell) -> None:
    arm = ARM(backend=cell.backend).to(cell.device)
    b = batch(cell)
    arm(*b)
    with no_host_sync(cell.device):
        arm(*b)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bins": 0}, ValueError, "bins must be from 1 to 256, got 0"),
        ({"bins": 2.0}, TypeError, "bins must be an integer"),
        ({"conditional_bins": 33}, ValueError, "conditional_bins must be from 1 to 32, got 33"),
        ({"num_modalities": 1}, ValueError, "num_modalities must be at least 2"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_refuses_hyper_parameters(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ARM(**arguments)


def test_refuses_inputs_before_anything_has_changed(cell: Cell) -> None:
    features, fused, logits, fused_logits, labels = batch(cell)
    wider = {**features, "visual": torch.cat([features["visual"]] * 2, 1)}
    none = {n: f[:0] for n, f in features.items()}
    cases = [
        ((list(features.values()), fused, logits, fused_logits, labels), TypeError, "must map"),
        (({"audio": fused}, fused, logits, fused_logits, labels), ValueError, "num_modalities=2"),
        ((features, fused, logits), TypeError, "needs fused, logits, fused_logits and labels"),
        ((features, fused[:, 1:], logits, fused_logits, labels), ValueError, "fused"),
        ((wider, fused, logits, fused_logits, labels), ValueError, "visual"),
        ((features, fused, {}, fused_logits, labels), ValueError, "missing"),
        ((features, fused, logits, fused_logits[:5], labels), ValueError, "fused_logits"),
        ((none, fused[:0], logits, fused_logits, labels), ValueError, "empty"),
    ]
    arm = ARM(backend=cell.backend).to(cell.device)
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            arm(*arguments)
    assert not arm.average.any() and not arm.average_weight.any()


def collapsed(data: Batch, name: str = "visual") -> Batch:
    """A batch in which one modality's features are all alike."""
    features, *others = data
    return ({**features, name: torch.full_like(features[name], 0.3)}, *others)


@pytest.mark.parametrize("count", [2, 3])
def test_a_batch_in_which_a_modality_has_collapsed(cell: Cell, count: int) -> None:
    """Its weights were 5e5 and 2e-6, and evaluation was wrong for a hundred batches."""
    arm = ARM(8, num_modalities=count, backend=cell.backend).to(cell.device)
    first = arm(*collapsed(batch(cell, count)))
    assert first.weights.tolist() == [1.0] * count, "there is no average yet"
    assert arm.average_weight == 0
    assert first.contributions.min() < 1e-6
    for _ in range(3):
        arm(*batch(cell, count))
    before = copy.deepcopy(arm.state_dict())
    expected = arm.eval()(batch(cell, count)[0]).weights
    out = arm.train()(*collapsed(batch(cell, count)))
    assert torch.equal(out.weights, expected) and not torch.equal(expected, first.weights)
    after = arm.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in ("average", "average_weight"))
    arm(*batch(cell, count))
    assert not torch.equal(arm.average, before["average"]), "the next one counts again"


def test_the_released_code_takes_a_collapsed_batch_as_it_is() -> None:
    data = collapsed(batch(CELLS[0]))
    out = ARM.official()(*data)
    assert out.contributions.min() < 0
    assert torch.equal(out.weights, modality_weights(out.contributions))


def test_a_batch_that_is_not_finite_is_no_collapsed_one() -> None:
    """It shows; an average in its place would hide it."""
    features, *others = batch(CELLS[0])
    features["visual"][0, 0] = torch.nan
    arm = ARM(8)
    assert arm(features, *others).weights.isnan().any()
    assert arm.average_weight == 0


def test_a_wrong_prediction_counts_nothing_with_the_gate(cell: Cell) -> None:
    """P_m = p_c·nmi_m + p_m·(…): without p_m the first term is left, without p_c the second."""
    _, _, logits, fused_logits, labels = batch(cell)
    given = {n: z.clone() for n, z in logits.items()}
    rows = torch.arange(len(labels), device=cell.device)
    for z in (*given.values(), fused_logits):
        z[rows, labels] = 5.0  # all are right
    keywords = {"conditional_bins": 10, "backend": cell.backend}
    plain = mmfuse.sample_contributions(given, fused_logits, labels, **keywords)
    right = mmfuse.sample_contributions(given, fused_logits, labels, gate=True, **keywords)
    assert torch.equal(right, plain)
    # The labels change no information: only the probabilities depend on them.
    other = (labels + 1) % 4
    wrong = mmfuse.sample_contributions(given, fused_logits, other, gate=True, **keywords)
    assert torch.equal(wrong, torch.zeros_like(plain))
    given["audio"][0, labels[0]] = -5.0
    one = mmfuse.sample_contributions(given, fused_logits, labels, gate=True, **keywords)
    ungated = mmfuse.sample_contributions(given, fused_logits, labels, **keywords)
    assert torch.equal(one[1:], ungated[1:])
    values, c = given["audio"][0].cpu(), fused_logits[0].cpu()
    nmi = ops.mutual_information(values, c, 30, backend="reference").nmi
    first = c.double().softmax(0)[labels[0].cpu()] * nmi
    # The single quantity is float32 here.
    torch.testing.assert_close(one[0, 0].cpu(), first, rtol=1e-6, atol=1e-7)
    assert one[0, 1] == ungated[0, 1]
