"""modality_accuracies: every backend against the definition in float64, and at the edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tolerances
import torch
from cells import Cell
from inputs import DTYPES
from scored import KINDS, LAYOUTS, Targets, expected
from torch import Tensor

from mmfuse import ops

INDICES = ["indices", "weighted indices"]
NAN, INF = float("nan"), float("inf")


def check(cell: Cell, logits: Sequence[Tensor], targets: Targets) -> None:
    labels, keywords = targets.on(cell.device)
    given = [z.to(cell.device) for z in logits]
    found = ops.modality_accuracies(given, labels, **keywords, backend=cell.backend)
    assert found.accuracy.dtype == found.prob.dtype == found.count.dtype == torch.float64
    for m, z in enumerate(logits):
        rows = expected(z, targets)
        count = rows.weight.sum()
        right = (z.double().argmax(1) == targets.labels).double()
        size = rows.weight.numel()
        accuracy = (rows.weight * right).sum() / count
        bound = tolerances.row_weight(torch.float64, 2 * accuracy, size)
        tolerances.assert_within(found.accuracy[m], accuracy, bound, "accuracy")
        # The same rows' prob, which is averaged in float64.
        mean = (rows.weight * rows.prob).sum() / count
        dtype = tolerances.accumulation_dtype(z.dtype)
        bound = tolerances.weighted_mean(dtype, rows.prob, rows.prob_bound, rows.weight)
        tolerances.assert_within(found.prob[m], mean, bound, "prob")
        bound = tolerances.row_weight(torch.float64, count, size)
        tolerances.assert_within(found.count, count, bound, "count")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", INDICES)
def test_parity_in_every_layout(cell: Cell, kind: str, layout: str, dtype: torch.dtype) -> None:
    cell.skip_slow(dtype != torch.float32 or kind != "indices")
    shape = (3, 5, 4, 9)
    logits = [LAYOUTS[layout]((3 * torch.randn(shape)).to(dtype)) for _ in range(2)]
    check(cell, logits, KINDS[kind](shape))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "shape",
    [(7, 3, 5), (1, 5, 300), (40, 2), (64, 309), (257, 10), (2, 1100, 3), (3000, 6)],
    ids=str,
)
@pytest.mark.parametrize("kind", INDICES)
def test_parity_of_every_shape(cell: Cell, kind: str, shape: tuple[int, ...]) -> None:
    """Rows of one block and of several; the last shape has more tiles than one launch takes."""
    cell.skip_slow(kind != "indices" or shape in ((64, 309), (2, 1100, 3), (1, 5, 300)))
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    for layout in ("contiguous", "rows first"):
        check(
            cell,
            [LAYOUTS[layout]((3 * torch.randn(shape)).to(dtype)) for dtype in dtypes],
            KINDS[kind](shape),
        )


def test_what_is_right(cell: Cell) -> None:
    """Of equal logits the first counts; a NaN is wrong, and so is a row of -inf."""
    z = torch.zeros(6, 3, device=cell.device)
    z[1, 1] = z[2, 0] = 1
    z[3, 1] = NAN
    z[4] = -INF
    z[5, 0] = -INF
    labels = torch.tensor([0, 1, 1, 0, 0, 1], device=cell.device)
    found = ops.modality_accuracies([z, z + 1], labels, backend=cell.backend)
    assert found.accuracy.tolist() == [0.5, 0.5] and found.count == 6
    assert bool(found.prob.isnan().all())


def test_rows_without_weight_do_not_count(cell: Cell) -> None:
    z = torch.eye(4, device=cell.device)
    z[3] = NAN
    labels = torch.tensor([0, 2, -1, 3], device=cell.device)
    weight = torch.tensor([1.0, 1.0, 3.0, 0.0], device=cell.device)
    found = ops.modality_accuracies(
        [z], labels, weight=weight, ignore_index=-1, backend=cell.backend
    )
    assert found.count == 4 and found.accuracy.tolist() == [0.25]
    assert bool(found.prob.isfinite().all())


@pytest.mark.parametrize("rows", [0, 3])
def test_without_a_row_that_counts(cell: Cell, rows: int) -> None:
    labels = torch.full((rows,), -100, device=cell.device)
    found = ops.modality_accuracies(
        [torch.randn(rows, 3, device=cell.device)], labels, backend=cell.backend
    )
    assert bool(found.accuracy.isnan().all() and found.prob.isnan().all())
    assert found.count == 0


def test_an_impossible_label_is_wrong_and_shows_in_prob(cell: Cell) -> None:
    overload = getattr(torch.ops.mmfuse.modality_accuracies, cell.backend)
    z, labels = torch.eye(3, device=cell.device), torch.tensor([0, 7, 2], device=cell.device)
    accuracy, prob, count = overload([z], labels, None, None, -100, False)
    assert accuracy.tolist() == pytest.approx([2 / 3]) and count == 3
    assert bool(prob.isnan().all())


def test_results_are_constants(cell: Cell) -> None:
    z = torch.randn(4, 3, device=cell.device, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64, device=cell.device)
    found = ops.modality_accuracies([z], labels, backend=cell.backend)
    assert not any(x.requires_grad for x in found)


def test_compiled_in_one_graph(cell: Cell) -> None:
    labels = torch.tensor([0, 1, 2, 1], device=cell.device)

    def call(z: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.modality_accuracies([z, -z], labels, backend=cell.backend))

    z = torch.randn(4, 3, device=cell.device)
    for a, b in zip(
        torch.compile(call, fullgraph=True, backend="aot_eager")(z), call(z), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits": []}, ValueError, "logits must hold at least one modality"),
        ({"logits": [torch.ones(3, 2).long()]}, TypeError, r"logits\[0\]"),
        ({"logits": [torch.ones(4, 2)]}, ValueError, r"logits\[0\] has 4 rows, labels 3"),
        ({"labels": torch.rand(3, 2)}, ValueError, "labels must be integer class indices, got"),
        ({"labels": torch.tensor([0, 1, 2])}, ValueError, "labels.* 2"),
        ({"labels": [0, 1, 1]}, TypeError, "labels must be an integer tensor"),
        ({"weight": torch.ones(3)}, ValueError, "weight must have shape"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], match: str) -> None:
    given: dict[str, Any] = {
        "logits": [torch.ones(3, 2)],
        "labels": torch.tensor([0, 1, 1]),
        **change,
    }
    with pytest.raises(error, match=match):
        ops.modality_accuracies(given.pop("logits"), given.pop("labels"), **given)
