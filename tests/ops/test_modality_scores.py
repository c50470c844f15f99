"""modality_scores: every backend against float64, and their gradients."""

from __future__ import annotations

import pytest
import tolerances
import torch
from cells import Cell
from inputs import DTYPES
from peaks import megabytes
from torch import Tensor
from torch.nn import functional as F

from mmfuse import ops

SHAPES = [(1, 2), (2, 2), (2, 6), (3, 31), (64, 6), (64, 309), (65, 33), (257, 10), (5, 1025)]


def expected_scores(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """P and log p of every row that counts, in float64."""
    z, labels = z.detach().cpu().double(), labels.cpu()
    keep = labels != -100
    log_p = F.log_softmax(z[keep], dim=1).gather(1, labels[keep].unsqueeze(1)).squeeze(1)
    return log_p.exp(), log_p


def check(cell: Cell, logits: list[Tensor], labels: Tensor) -> None:
    scores = ops.modality_scores(logits, labels, backend=cell.backend)
    result_dtype = torch.float64 if any(z.dtype == torch.float64 for z in logits) else torch.float32
    assert scores.prob.dtype == scores.log_prob.dtype == result_dtype
    assert scores.count.dtype == torch.float64 and scores.count == (labels != -100).sum()
    assert not scores.count.requires_grad
    for m, z in enumerate(logits):
        p, log_p = expected_scores(z, labels)
        dtype = z.dtype if result_dtype == torch.float64 else torch.float32
        classes = z.shape[1]
        sensitivity = 1 + log_p.abs()
        for name, actual, expected, per_row in (
            ("prob", scores.prob[m], p.mean(), p * sensitivity),
            ("log_prob", scores.log_prob[m], log_p.mean(), sensitivity),
        ):
            bound = tolerances.softmax_score(dtype, per_row, classes)
            tolerances.assert_within(actual, expected, bound, f"{name} of modality {m}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parity(cell: Cell, dtype: torch.dtype, shape: tuple[int, int], count: int) -> None:
    logits = [(3 * torch.randn(shape)).to(dtype).to(cell.device) for _ in range(count)]
    check(cell, logits, torch.randint(0, shape[1], (shape[0],)).to(cell.device))


@pytest.mark.parametrize("classes", [2, 40])
def test_a_single_row_with_gaps_has_a_gradient(cell: Cell, classes: int) -> None:
    """Its classes are not one by one, but those of its gradient, which is dense, are."""
    twice = torch.randn(2, 2 * classes, device=cell.device)
    labels = torch.tensor([1], device=cell.device)
    for row in (twice[:1, ::2], twice.view(-1, 2).T[:1, ::2], twice.view(1, -1, 2)[:, ::2, 1]):
        assert row.shape == (1, classes) and row.stride(1) > 1
        z = row.detach().requires_grad_()
        found = ops.modality_scores([z], labels, backend=cell.backend)
        (grad,) = torch.autograd.grad(found.log_prob.sum(), z)
        expected = F.one_hot(labels, classes) - row.softmax(1)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (2, 3, 5)], ids=str)
def test_rows_that_overlap_have_a_gradient(cell: Cell, shape: tuple[int, ...]) -> None:
    """Windows of one sequence: they have no order that a dense gradient could take over."""
    sequence = torch.randn(12, device=cell.device)
    z = sequence.as_strided(shape, (1,) * len(shape)).requires_grad_()
    labels = torch.ones(shape[:1] + shape[2:], dtype=torch.int64, device=cell.device)
    found = ops.modality_scores([z], labels, backend=cell.backend)
    (grad,) = torch.autograd.grad(found.log_prob.sum(), z)
    exact = z.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    (expected,) = torch.autograd.grad(-F.cross_entropy(exact, labels), exact)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_other_label_types(cell: Cell, labels_dtype: torch.dtype) -> None:
    labels = torch.randint(0, 5, (9,)).to(labels_dtype).to(cell.device)
    scores = ops.modality_scores(
        [torch.randn(9, 5).to(cell.device)] * 2, labels, backend=cell.backend
    )
    assert bool(scores.prob.isfinite().all())


def test_modalities_of_different_widths_and_dtypes(cell: Cell) -> None:
    logits = [
        torch.randn(20, c).to(d).to(cell.device)
        for c, d in zip((4, 9, 300, 5), DTYPES, strict=True)
    ]
    check(cell, logits, torch.randint(0, 4, (20,)).to(cell.device))


def test_many_modalities(cell: Cell) -> None:
    logits = [torch.randn(8, 5).to(cell.device) for _ in range(40)]
    check(cell, logits, torch.randint(0, 5, (8,)).to(cell.device))


def test_strided_logits(cell: Cell) -> None:
    logits = [torch.randn(7, 20).t().to(cell.device), torch.randn(20, 14)[:, ::2].to(cell.device)]
    check(cell, logits, torch.randint(0, 7, (20,)).to(cell.device))


def test_large_logits_do_not_overflow(cell: Cell) -> None:
    logits = [torch.tensor([[1e4, -1e4, 0.0], [3e38, 0.0, -3e38]]).to(cell.device)]
    scores = ops.modality_scores(logits, torch.tensor([0, 0]).to(cell.device), backend=cell.backend)
    assert float(scores.prob) == 1.0
    assert float(scores.log_prob) == 0.0


def test_minus_infinity_masks_a_class(cell: Cell) -> None:
    z = torch.randn(6, 4)
    z[:, 2] = float("-inf")
    check(cell, [z.to(cell.device)], torch.tensor([0, 1, 3, 0, 1, 3]).to(cell.device))


def test_ignored_labels_do_not_count(cell: Cell) -> None:
    z = torch.randn(10, 4).to(cell.device)
    labels = torch.randint(0, 4, (10,)).to(cell.device)
    labels[[0, 3, 9]] = -100
    check(cell, [z, z.flip(0)], labels)


@pytest.mark.parametrize("batch", [0, 5])
def test_no_row_that_counts_gives_nan(cell: Cell, batch: int) -> None:
    labels = torch.full((batch,), -100, dtype=torch.int64, device=cell.device)
    z = torch.randn(batch, 3, device=cell.device)
    scores = ops.modality_scores([z, z], labels, backend=cell.backend)
    assert bool(scores.prob.isnan().all() and scores.log_prob.isnan().all())


def test_nan_logits_stay_in_their_modality(cell: Cell) -> None:
    good, bad = torch.randn(6, 3).to(cell.device), torch.randn(6, 3).to(cell.device)
    bad[4, 1] = float("nan")
    labels = torch.randint(0, 3, (6,)).to(cell.device)
    scores = ops.modality_scores([good, bad], labels, backend=cell.backend)
    assert bool(scores.prob[0].isfinite()) and bool(scores.prob[1].isnan())
    assert bool(scores.log_prob[0].isfinite()) and bool(scores.log_prob[1].isnan())


def test_an_impossible_label_gives_nan_in_the_kernel(cell: Cell) -> None:
    """The public op raises on the CPU; where it cannot look, the kernel must not read outside."""
    labels = torch.tensor([0, 3, 1], device=cell.device)
    narrow, broad = torch.randn(3, 3, device=cell.device), torch.randn(3, 4, device=cell.device)
    overload = getattr(torch.ops.mmfuse.modality_scores, cell.backend)
    prob, log_prob, count = overload([narrow, broad], labels, None, None, -100, False)
    assert count == 3
    assert prob.isnan().tolist() == log_prob.isnan().tolist() == [True, False]


# Targets that add up to 0 would leave a row without weight; with many labels, one has none.
OUT_OF_RANGE = {
    "cancel": ([-1.0, 1.0, 0.0], None, False),
    "cancel by weight": ([-0.5, 0.25, 0.0], [1.0, 2.0, 1.0], False),
    "without weight": ([1.5, 0.0, 1.0], [0.0, 1.0, 1.0], False),
    "label without weight": ([1.5, 0.0, 1.0], [0.0, 1.0, 1.0], True),
}


@pytest.mark.parametrize("kind", OUT_OF_RANGE)
def test_a_target_out_of_range_leaves_no_number_of_its_row(cell: Cell, kind: str) -> None:
    first, weight, multilabel = OUT_OF_RANGE[kind]
    labels = torch.tensor([first, [0.5, 0.5, 0.0]], device=cell.device)
    wide = None if weight is None else torch.tensor(weight).double().to(cell.device)
    logits = [torch.randn(2, 3, device=cell.device) for _ in range(2)]
    arguments = logits, labels, wide, None, -100, multilabel
    kernels = {
        name: getattr(getattr(torch.ops.mmfuse, name), cell.backend)
        for name in ("sample_scores", "modality_scores", "modality_scores_backward")
    }
    *scores, rows = kernels["sample_scores"](*arguments)
    assert rows.isnan().tolist() == [not multilabel, False]
    assert all(x.isnan().tolist() == [[True, False]] * 2 for x in scores)
    *means, count = kernels["modality_scores"](*arguments)
    assert count.isnan().item() != multilabel
    assert all(bool(x.isnan().all()) for x in means)
    slopes, one = torch.ones(2, device=cell.device), torch.ones_like(rows[0])
    for grad in kernels["modality_scores_backward"](slopes, slopes, one, *arguments):
        assert grad.isnan().tolist() == [[True] * 3, [False] * 3]
    if cell.device == "cpu":  # elsewhere nobody looks
        for op in (ops.modality_scores, ops.sample_scores):
            with pytest.raises(ValueError, match=rf"labels\[0, 0\] = {first[0]} is out of range"):
                op(logits, labels, weight=wide, multilabel=multilabel, backend=cell.backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (64, 6), (65, 309)], ids=str)
def test_gradient_parity(cell: Cell, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits = [(3 * torch.randn(shape)).to(dtype).to(cell.device).requires_grad_() for _ in range(3)]
    labels = torch.randint(0, shape[1], (shape[0],))
    if shape[0] > 2:
        labels[1] = -100
    labels = labels.to(cell.device)
    a, b = torch.randn(3), torch.randn(3)
    scores = ops.modality_scores(logits, labels, backend=cell.backend)
    weights = [w.to(cell.device, scores.prob.dtype) for w in (a, b)]
    (weights[0] * scores.prob + weights[1] * scores.log_prob).sum().backward()
    for m, z in enumerate(logits):
        exact = z.detach().cpu().double().requires_grad_()
        p, log_p = expected_scores_differentiable(exact, labels.cpu())
        (a[m].double() * p.mean() + b[m].double() * log_p.mean()).backward()
        weight = (a[m].abs() + b[m].abs()).double() / len(p) * torch.ones_like(exact)
        bound = tolerances.softmax_gradient(dtype, weight, shape[1])
        # log p enters the weight p through exp: its error is relative to 1 + |log p|.
        factor = 1 + log_p.detach().abs().max()
        assert z.grad.dtype == dtype
        tolerances.assert_within(z.grad, exact.grad, bound * factor, f"gradient of modality {m}")


def expected_scores_differentiable(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    keep = labels != -100
    log_p = F.log_softmax(z[keep], dim=1).gather(1, labels[keep].unsqueeze(1)).squeeze(1)
    return log_p.exp(), log_p


def test_gradcheck(cell: Cell) -> None:
    labels = torch.tensor([0, 2, -100, 1], device=cell.device)
    logits = [
        torch.randn(4, c, dtype=torch.float64, device=cell.device, requires_grad=True)
        for c in (3, 5)
    ]

    def scores(*z: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(ops.modality_scores(z, labels, backend=cell.backend)[:2])

    assert torch.autograd.gradcheck(scores, logits)


@pytest.mark.slow
def test_memory_of_many_places() -> None:
    """Three float64 numbers of each row would take 100 MB, for each modality."""
    setup = (
        "z, y = torch.zeros(1, 2, 2**22), torch.zeros(1, 2**22).long(); "
        "ops.modality_scores([z[..., :9].contiguous()], y[:, :9])"
    )
    assert megabytes(setup, "ops.modality_scores([z], y)") < 40


class TestBadInput:
    def test_names_the_modality(self) -> None:
        z = torch.zeros(3, 2)
        cases = [
            ([], torch.zeros(3).long(), ValueError, "at least one modality"),
            ([z, z.long()], torch.zeros(3).long(), TypeError, r"logits\[1\] has dtype torch.int64"),
            (
                [z, z[:2]],
                torch.zeros(3).long(),
                ValueError,
                r"logits\[1\] has 2 rows, labels 3",
            ),
            ([z, z[0]], torch.zeros(3).long(), ValueError, r"logits\[1\] must have shape \[B, C\]"),
            ([z[:, :0]], torch.zeros(3).long(), ValueError, r"C of at least 2"),
            ([z], torch.zeros(3), TypeError, "labels must be an integer"),
            ([z], torch.zeros(3, 1).long(), ValueError, r"got shape \[3, 1\]; use squeeze"),
            ([z], torch.tensor([0, 2, 1]), ValueError, r"labels\[1\] = 2 is out of range for logi"),
            ([z], torch.tensor([0, 1, -1]), ValueError, r"labels\[2\] = -1 is out of range"),
        ]
        for logits, labels, error, match in cases:
            with pytest.raises(error, match=match):
                ops.modality_scores(logits, labels)
