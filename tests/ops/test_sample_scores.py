"""sample_scores and the targets of modality_scores: every kind in every layout, against float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tolerances
import torch
from cells import Cell
from inputs import DTYPES
from scored import KINDS, LAYOUTS, Targets, expected
from torch import Tensor
from torch.nn import functional as F

from mmfuse import ops

SHAPES = [(1, 2, 1), (7, 3, 5), (2, 33, 17), (3, 4, 3, 7), (1, 5, 300)]

# The quick tests have every kind once there, in `test_without_places` and below it.
NOT_IN_THE_INTERPRETER = pytest.mark.slow_except_on("reference", "cpu", "cuda")


def logits_of(
    cell: Cell, shape: Sequence[int], dtypes: Sequence[torch.dtype], layout: str = "contiguous"
) -> list[Tensor]:
    made = [(3 * torch.randn(tuple(shape))).to(dtype) for dtype in dtypes]
    return [LAYOUTS[layout](z).to(cell.device).requires_grad_() for z in made]


def result_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(z.dtype == torch.float64 for z in logits) else torch.float32


def check_samples(
    cell: Cell, logits: Sequence[Tensor], targets: Targets, statistics: bool = False
) -> None:
    labels, keywords = targets.on(cell.device)
    keywords = keywords | {"statistics": statistics, "backend": cell.backend}
    found = ops.sample_scores(logits, labels, **keywords)
    wide = result_dtype(logits)
    assert found.prob.dtype == found.log_prob.dtype == wide
    assert found.weight.dtype == torch.float64
    for m, z in enumerate(logits):
        rows = expected(z.detach(), targets)
        tolerances.assert_within(found.prob[m], rows.prob, rows.prob_bound, "prob")
        tolerances.assert_within(found.log_prob[m], rows.log_prob, rows.log_prob_bound, "log_prob")
        bound = tolerances.row_weight(wide, rows.weight, z.shape[1])
        tolerances.assert_within(found.weight, rows.weight, bound, "weight")


def check_means(cell: Cell, logits: Sequence[Tensor], targets: Targets) -> None:
    labels, keywords = targets.on(cell.device)
    found = ops.modality_scores(logits, labels, **keywords, backend=cell.backend)
    assert found.prob.dtype == found.log_prob.dtype == result_dtype(logits)
    slopes = torch.randn(2, len(logits))
    loss = (found.prob * slopes[0].to(found.prob)).sum()
    loss = loss + (found.log_prob * slopes[1].to(found.prob)).sum()
    grads = torch.autograd.grad(loss, logits)
    for m, z in enumerate(logits):
        exact = z.detach().cpu().double().requires_grad_()
        rows = expected(exact, targets)
        dtype = z.dtype if found.prob.dtype == torch.float64 else torch.float32
        rows_bounds = expected(z.detach().to(dtype), targets)
        for name, each, bound in (
            ("prob", rows.prob, rows_bounds.prob_bound),
            ("log_prob", rows.log_prob, rows_bounds.log_prob_bound),
        ):
            mean = (rows.weight * each).sum() / rows.weight.sum()
            bound = tolerances.weighted_mean(dtype, each.detach(), bound, rows.weight)
            tolerances.assert_within(getattr(found, name)[m], mean, bound, name)
        count = rows.weight.sum()
        bound = tolerances.row_weight(found.prob.dtype, count, rows.shares.numel())
        tolerances.assert_within(found.count, count, bound, "count")
        part = rows.weight / count
        total = (part * (slopes[0, m] * rows.prob + slopes[1, m] * rows.log_prob)).sum()
        (wanted,) = torch.autograd.grad(total, exact)
        # Every term of a row with many classes is at most its share or its softmax.
        size = rows.shares.amax(1).clamp(max=1) if "multilabel" in targets.keywords else 1.0
        size = 2 * slopes[:, m].abs().sum().double() * (part * size).unsqueeze(1)
        deepest = 1 + rows.log_prob.detach().abs().max()
        bound = tolerances.softmax_gradient(z.dtype, size.expand_as(exact), z.shape[1]) * deepest
        assert grads[m].dtype == z.dtype
        tolerances.assert_within(grads[m], wanted, bound, f"gradient of modality {m}")


@NOT_IN_THE_INTERPRETER
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_parity_in_every_layout(cell: Cell, kind: str, layout: str, dtype: torch.dtype) -> None:
    cell.skip_slow(dtype in (torch.float16, torch.float64))
    shape = (3, 5, 4, 9)
    targets = KINDS[kind](shape)
    logits = logits_of(cell, shape, [dtype, dtype], layout)
    check_samples(cell, logits, targets)
    check_means(cell, logits, targets)


@NOT_IN_THE_INTERPRETER
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parity_of_every_shape(cell: Cell, kind: str, shape: tuple[int, ...]) -> None:
    targets = KINDS[kind](shape)
    if not bool(expected(torch.randn(shape), targets).weight.sum()):
        pytest.skip("no row of this shape counts, see test_no_row_that_counts_gives_nan")
    logits = logits_of(cell, shape, [torch.float32, torch.bfloat16, torch.float64])
    check_samples(cell, logits, targets)
    check_means(cell, logits, targets)


@NOT_IN_THE_INTERPRETER
@pytest.mark.parametrize("layout", ["contiguous", "classes last"])
@pytest.mark.parametrize("kind", KINDS)
def test_more_classes_than_a_tile(cell: Cell, kind: str, layout: str) -> None:
    shape = (2, 1100, 3)
    logits = logits_of(cell, shape, [torch.bfloat16], layout)
    check_samples(cell, logits, KINDS[kind](shape))
    check_means(cell, logits, KINDS[kind](shape))


@pytest.mark.parametrize("shape", [(40, 2), (64, 309), (257, 10)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_without_places(cell: Cell, kind: str, shape: tuple[int, int]) -> None:
    """[N, C], also transposed: its rows are one by one in memory."""
    for layout in ("contiguous", "rows first"):
        logits = logits_of(cell, shape, [torch.float32, torch.float16], layout)
        targets = KINDS[kind](shape)
        check_samples(cell, logits, targets)
        check_means(cell, logits, targets)


@pytest.mark.parametrize("shape", [(6,), (6, 1)], ids=str)
def test_a_single_logit(cell: Cell, shape: tuple[int, ...]) -> None:
    z, y = torch.randn(shape), torch.tensor([0.0, 1, 1, 0, 1, 0]).view(shape)
    found = ops.modality_scores(
        [z.to(cell.device)], y.to(cell.device), multilabel=True, backend=cell.backend
    )
    p = torch.where(y == 1, z.sigmoid(), 1 - z.sigmoid())
    torch.testing.assert_close(found.prob.cpu(), p.mean().view(1))
    torch.testing.assert_close(
        found.log_prob.cpu(), -F.binary_cross_entropy_with_logits(z, y).view(1)
    )
    assert found.count.item() == 6


@pytest.mark.parametrize("kind", KINDS)
def test_means_are_those_of_the_losses(cell: Cell, kind: str) -> None:
    """In the words of PyTorch: -log_prob is the loss, where every row counts alike."""
    shape = (4, 3, 5)
    labels, keywords = KINDS[kind](shape).on(cell.device)
    z = torch.randn(shape, dtype=torch.float64, device=cell.device)
    found = -ops.modality_scores([z], labels, **keywords, backend=cell.backend).log_prob[0]
    if kind == "many labels":
        loss = F.binary_cross_entropy_with_logits(z, labels.double())
    elif kind == "weighted labels":
        return
    else:
        keywords = {k: v.double() if k == "weight" else v for k, v in keywords.items()}
        loss = F.cross_entropy(
            z, labels.double() if labels.is_floating_point() else labels, **keywords
        )
        if labels.is_floating_point():  # PyTorch divides by the number of rows
            w = keywords.get("weight", torch.ones(3, device=cell.device)).view(-1, 1).double()
            loss = loss * (z.numel() / 3) / (labels.double() * w).sum()
    torch.testing.assert_close(found, loss)


@pytest.mark.slow_except_on("cpu")
@NOT_IN_THE_INTERPRETER
@pytest.mark.parametrize("layout", ["contiguous", "classes last"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(cell: Cell, kind: str, layout: str) -> None:
    labels, keywords = KINDS[kind]((2, 3, 2)).on(cell.device)
    modalities = 1 if cell.slow else 2  # twice the calls, each of which takes twice as long
    logits = logits_of(cell, (2, 3, 2), [torch.float64] * modalities, layout)

    def scores(*z: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(ops.modality_scores(z, labels, **keywords, backend=cell.backend)[:2])

    assert torch.autograd.gradcheck(scores, logits)


@NOT_IN_THE_INTERPRETER
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_lies_as_the_logits(cell: Cell, layout: str) -> None:
    (z,) = logits_of(cell, (2, 3, 4, 5), [torch.float32], layout)
    labels = torch.randint(0, 3, (2, 4, 5)).to(cell.device)
    (grad,) = torch.autograd.grad(
        ops.modality_scores([z], labels, backend=cell.backend).prob.sum(), z
    )
    dense = layout in ("contiguous", "classes last")
    assert not dense or grad.stride() == z.stride()


@NOT_IN_THE_INTERPRETER
@pytest.mark.parametrize("layout", ["contiguous", "classes last"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_is_masked(cell: Cell, kind: str, layout: str) -> None:
    """-inf has probability 0: its share of 0 counts nothing, its gradient is 0."""
    shape = (3, 4, 5)
    labels, keywords = KINDS[kind](shape).on(cell.device)
    if labels.is_floating_point():
        labels[:, 2] = 0
    else:
        labels[labels == 2] = 1
    (z,) = logits_of(cell, shape, [torch.float32], layout)
    with torch.no_grad():
        z[:, 2] = -torch.inf
    targets = Targets(
        labels.cpu(), {k: v.cpu() if isinstance(v, Tensor) else v for k, v in keywords.items()}
    )
    check_samples(cell, [z], targets)
    check_means(cell, [z], targets)


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_do_not_overflow(cell: Cell, kind: str) -> None:
    labels, keywords = KINDS[kind]((4, 3, 2)).on(cell.device)
    z = torch.tensor([3e38, 0.0, -3e38], device=cell.device).view(1, 3, 1).expand(4, 3, 2)
    found = ops.sample_scores([z.contiguous()], labels, **keywords, backend=cell.backend)
    assert bool((found.prob.isfinite() & (found.prob >= 0) & (found.prob <= 1)).all())
    assert bool(((found.log_prob <= 0) & ~found.log_prob.isnan()).all())


def test_rows_without_weight_do_not_count(cell: Cell) -> None:
    z = torch.randn(3, 4).to(cell.device)
    z[0] = -torch.inf
    t = torch.eye(4)[:3].to(cell.device)
    t[0] = 0
    for labels, keywords in (
        (torch.tensor([0, 1, 2]), {"weight": torch.tensor([0.0, 1, 1, 1])}),
        (torch.tensor([-1, 1, 2]), {"ignore_index": -1}),
        (t, {}),
    ):
        labels, keywords = Targets(labels, keywords).on(cell.device)
        found = ops.sample_scores([z], labels, **keywords, backend=cell.backend)
        assert found.weight.tolist() == [0, 1, 1]
        assert found.prob[0, 0] == found.log_prob[0, 0] == 0
        means = ops.modality_scores([z], labels, **keywords, backend=cell.backend)
        assert means.count == 2
        assert bool(means.prob.isfinite().all())


@NOT_IN_THE_INTERPRETER
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_gives_nan(cell: Cell, kind: str, shape: tuple[int, ...]) -> None:
    labels, keywords = KINDS[kind](shape).on(cell.device)
    logits = logits_of(cell, shape, [torch.float32] * 2)
    found = ops.modality_scores(logits, labels, **keywords, backend=cell.backend)
    assert bool(found.prob.isnan().all() and found.log_prob.isnan().all())
    assert found.count == 0
    grads = torch.autograd.grad(found.prob.sum(), logits)
    assert [g.shape for g in grads] == [z.shape for z in logits]
    each = ops.sample_scores(logits, labels, **keywords, backend=cell.backend)
    assert each.prob.shape == (2, *shape[:1], *shape[2:])


@pytest.mark.parametrize("kind", ["probabilities", "many labels", "weighted indices"])
def test_an_impossible_target_gives_nan_in_the_kernel(cell: Cell, kind: str) -> None:
    labels, keywords = KINDS[kind]((3, 4, 2)).on(cell.device)
    weight = keywords.get("weight")
    weight = None if weight is None else weight.double()
    for bad in (4, -1) if weight is not None else (1.5, -0.5, torch.nan):
        wrong = labels.clone()
        wrong.view(-1)[0] = bad
        arguments = weight, None, keywords.get("ignore_index", -100), "multilabel" in keywords
        z = [torch.randn(3, 4, 2).to(cell.device)]
        overload = getattr(torch.ops.mmfuse.sample_scores, cell.backend)
        prob, log_prob, _ = overload(z, wrong, *arguments)
        assert prob.isnan().sum() == log_prob.isnan().sum() == 1
        assert bool(prob[0, 0, 0].isnan())
        overload = getattr(torch.ops.mmfuse.modality_scores, cell.backend)
        assert bool(overload(z, wrong, *arguments)[0].isnan().all())


def check_statistics(cell: Cell, logits: Sequence[Tensor], targets: Targets) -> None:
    """Against float64, with the scores that come without them."""
    labels, keywords = targets.on(cell.device)
    found = ops.sample_scores(logits, labels, **keywords, statistics=True, backend=cell.backend)
    check_samples(cell, logits, targets, statistics=True)
    wide = result_dtype(logits)
    assert found.correct.dtype == torch.bool
    assert found.entropy.dtype == found.log_sum_exp.dtype == found.abs_sum.dtype == wide
    counts = targets.labels != keywords.get("ignore_index", -100)
    for m, z in enumerate(logits):
        exact, classes = z.detach().cpu().double(), z.shape[1]
        correct = (exact.argmax(1) == targets.labels) & counts
        assert torch.equal(found.correct[m].cpu(), correct)
        log_p = exact.log_softmax(1)
        entropy = -torch.where(log_p.exp() == 0, 0.0, log_p.exp() * log_p).sum(1)
        of_classes = exact.movedim(1, -1).flatten(0, -2)
        bound = tolerances.log_sum_exp(z.dtype, of_classes, torch.zeros_like(of_classes))
        sizes = exact.abs().sum(1)
        for name, wanted, limit in (
            ("entropy", entropy, tolerances.row_entropy(z.dtype, entropy, classes)),
            ("log_sum_exp", exact.logsumexp(1), bound.view(entropy.shape)),
            ("abs_sum", sizes, tolerances.abs_sum(z.dtype, sizes, classes)),
        ):
            wanted = torch.where(counts, wanted, 0.0)
            tolerances.assert_within(getattr(found, name)[m], wanted, limit, name)


#: A run of equal terms rounds the same way each time, which a bound of √C does not cover.
MANY = 50_000


def equal_shares() -> Tensor:
    labels = torch.full((1, MANY, 3), 0.1 / (MANY - 1))
    labels[:, 0] = 0.9
    return labels


@pytest.mark.parametrize("layout", ["contiguous", "classes last"])
def test_equal_shares_of_many_classes(cell: Cell, layout: str) -> None:
    cell.skip_slow()
    labels = equal_shares()
    logits = logits_of(cell, labels.shape, [torch.float32], layout)
    for targets in (Targets(labels, {}), Targets(labels, {"multilabel": True})):
        check_samples(cell, logits, targets)
        check_means(cell, logits, targets)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [Cell("triton", "cpu")], indirect=True, ids=str)
def test_equal_shares_of_many_classes_in_the_interpreter(cell: Cell) -> None:
    labels = equal_shares()
    check_samples(cell, logits_of(cell, labels.shape, [torch.float32]), Targets(labels, {}))


@pytest.mark.parametrize("layout", ["contiguous", "classes last"])
@pytest.mark.parametrize("shape", [(1, MANY, 3), (1, 1000, 64), (1, 90, 64)], ids=str)
def test_equal_logits_of_many_classes(cell: Cell, shape: tuple[int, ...], layout: str) -> None:
    cell.skip_slow(shape[1] > 90)
    if cell.backend == "reference" and shape[1] == MANY:
        pytest.skip("PyTorch's log_softmax sums many classes in one float32")
    labels = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    for first, others in ((0.9375, 0.0), (0.1, 0.1), (-1.3333, 0.77)):
        z = torch.full(shape, others)
        z[:, 0] = first
        check_statistics(cell, [LAYOUTS[layout](z).to(cell.device)], Targets(labels, {}))


INDICES = ["indices", "weighted indices"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", INDICES)
def test_statistics_in_every_layout(cell: Cell, kind: str, layout: str, dtype: torch.dtype) -> None:
    shape = (3, 5, 4, 9)
    check_statistics(cell, logits_of(cell, shape, [dtype, dtype], layout), KINDS[kind](shape))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [*SHAPES, (40, 2), (9, 309), (257, 10), (2, 1100, 3)], ids=str)
def test_statistics_of_every_shape(cell: Cell, shape: tuple[int, ...]) -> None:
    for layout in ("contiguous", "rows first"):
        dtypes = [torch.float32, torch.bfloat16, torch.float64]
        check_statistics(cell, logits_of(cell, shape, dtypes, layout), KINDS["indices"](shape))


@pytest.mark.parametrize("classes", [3, 40, 700])
@pytest.mark.parametrize("layout", ["contiguous", "rows first"])
def test_of_equal_logits_the_first_one_is_the_argmax(cell: Cell, layout: str, classes: int) -> None:
    z = torch.randint(0, 3, (90, classes)).float()
    labels = torch.where(torch.rand(90) < 0.5, z.argmax(1), torch.randint(0, classes, (90,)))
    labels[:5] = z[:5].flip(1).argmax(1).neg() + classes - 1  # the last of the largest
    check_statistics(cell, [LAYOUTS[layout](z).to(cell.device)], Targets(labels, {}))


@pytest.mark.parametrize("layout", ["contiguous", "of wider rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_of_few_classes_with_anything_in_them(
    cell: Cell, dtype: torch.dtype, layout: str
) -> None:
    """They may go side by side, whatever the layout: what is in one shows in no other."""
    z = (3 * torch.randn(70, 5)).to(dtype)
    labels = torch.randint(0, 5, (70,))
    for row, (place, value) in enumerate([(0, torch.nan), (1, torch.inf), (2, -torch.inf)]):
        z[row, place] = value
    z[3], z[4], labels[5] = -torch.inf, 0, -100
    every = [3, 40, 69, *range(3), 4, 5]
    for name in ("sample_scores", "sample_statistics"):
        overload = getattr(getattr(torch.ops.mmfuse, name), cell.backend)
        found, alone = (
            overload(
                [LAYOUTS[layout](z[i]).to(cell.device)],
                labels[i].to(cell.device),
                None,
                None,
                -100,
                False,
            )
            for i in (slice(None), every)
        )
        for all_rows, few in zip(found, alone, strict=True):
            bound = 1e-3 if all_rows.is_floating_point() else 0
            torch.testing.assert_close(
                all_rows[..., every], few, rtol=bound, atol=bound, equal_nan=True
            )


@pytest.mark.parametrize("layout", ["contiguous", "rows first"])
def test_statistics_of_masked_classes_and_extremes(cell: Cell, layout: str) -> None:
    inf = torch.inf
    z = torch.tensor([[0.0, -inf, 1], [1e4, -1e4, 0], [-1e4, -1e4, -1e4], [30.0, 0, -200]])
    labels = torch.tensor([2, 1, 0, 0])
    check_statistics(cell, [LAYOUTS[layout](z).to(cell.device)], Targets(labels, {}))
    broken = torch.tensor([[0.0, torch.nan, 1], [-inf, -inf, -inf], [0.0, 1, 2], [inf, 0, 1]])
    overload = getattr(torch.ops.mmfuse.sample_statistics, cell.backend)
    labels = torch.tensor([2, 0, 2, 0], device=cell.device)
    found = overload([LAYOUTS[layout](broken).to(cell.device)], labels, None, None, -100, False)
    assert found[3].tolist() == [[False, False, True, False]]
    for numbers in (found[4], found[5]):
        assert numbers.isnan().tolist() == [[True, True, False, True]]
    wrong = overload([z.to(cell.device)], labels + 3, None, None, 5, False)
    assert wrong[0].isnan().tolist() == [[False, True, False, True]]
    assert not wrong[3].any() and not wrong[5][0, 0] and not wrong[6][0, 2]


@NOT_IN_THE_INTERPRETER
def test_statistics_of_many_modalities_and_of_none_to_count(cell: Cell) -> None:
    check_statistics(cell, logits_of(cell, (8, 5), [torch.float32] * 18), KINDS["indices"]((8, 5)))
    nothing = torch.zeros(0, 3, 2).to(cell.device)
    labels = torch.zeros(0, 2, dtype=torch.int64, device=cell.device)
    found = ops.sample_scores([nothing], labels, statistics=True, backend=cell.backend)
    assert all(x.shape == (1, 0, 2) for x in (found.prob, *found[3:]))


def test_without_statistics_there_are_none(cell: Cell) -> None:
    z, labels = torch.randn(4, 3).to(cell.device), torch.zeros(4).long().to(cell.device)
    assert ops.sample_scores([z], labels, backend=cell.backend)[3:] == (None,) * 4


class TestBadInput:
    def test_statistics_are_of_class_indices(self) -> None:
        for keywords, what in (({}, "probabilities"), ({"multilabel": True}, "multilabel=True")):
            with pytest.raises(ValueError, match=f"statistics=True is for labels .* not {what}"):
                ops.sample_scores([self.Z], torch.zeros(3, 2), statistics=True, **keywords)
        with pytest.raises(ValueError, match=r"labels\[1\] = 2 is out of range for logits\[0\]"):
            ops.sample_scores([self.Z], torch.tensor([0, 2, 1]), statistics=True)

    Z = torch.zeros(3, 2)
    Y = torch.tensor([0, 1, 1])

    @pytest.mark.parametrize(
        ("labels", "keywords", "error", "match"),
        [
            (Y, {"weight": torch.ones(3)}, ValueError, r"weight must have shape \[2\].*got \[3\]"),
            (Y, {"weight": [1.0, 2.0]}, TypeError, "weight must be a floating tensor, got list"),
            (Y, {"weight": torch.ones(2).long()}, TypeError, "weight must be a floating tensor"),
            (
                Y,
                {"weight": torch.ones(2, requires_grad=True)},
                ValueError,
                "weight must not require",
            ),
            (Y, {"pos_weight": torch.ones(2)}, ValueError, "pos_weight is for multilabel=True"),
            (Y, {"ignore_index": 1.0}, TypeError, "ignore_index must be an integer, got float"),
            (Y, {"multilabel": True}, TypeError, "labels must be floating, of the logits' shape"),
            (Y[:2], {}, ValueError, r"logits\[0\] has 3 rows, labels 2"),
            (Y.float(), {}, TypeError, "labels must be an integer tensor of class indices"),
            (torch.zeros(3, 3), {}, ValueError, r"must have the shape of logits\[0\], \[3, 2\]"),
            (torch.full((3, 2), 2.0), {}, ValueError, r"labels\[0, 0\] = 2.0 is out of range"),
            (torch.full((3, 2), -1.0), {"multilabel": True}, ValueError, "is out of range"),
            (torch.zeros(3, 2), {"ignore_index": 0}, ValueError, "ignore_index is for class indi"),
            (
                torch.zeros(3, 2, requires_grad=True),
                {},
                ValueError,
                "labels must not require a gradient",
            ),
            (
                torch.zeros(3, 2),
                {"multilabel": True, "pos_weight": torch.ones(3)},
                ValueError,
                r"pos_weight must have shape \[2\]",
            ),
        ],
    )
    def test_names_the_argument(
        self, labels: Tensor, keywords: dict[str, object], error: type[Exception], match: str
    ) -> None:
        for op in (ops.modality_scores, ops.sample_scores):
            with pytest.raises(error, match=match):
                op([self.Z], labels, **keywords)

    def test_names_shapes_with_places(self) -> None:
        z = torch.zeros(2, 3, 4)
        for labels in (
            torch.zeros(2, 5).long(),
            torch.zeros(2).long(),
            torch.zeros(2, 3, 4).long(),
        ):
            with pytest.raises(ValueError, match=r"without its classes, \[2, 4\], got"):
                ops.modality_scores([z], labels)
        with pytest.raises(ValueError, match=r"labels\[1, 2\] = 3 is out of range for logits\[0\]"):
            ops.modality_scores([z], torch.tensor([[0, 1, 2, 0], [0, 1, 3, 0]]))
        with pytest.raises(ValueError, match=r"weight must have shape \[4\].*of logits\[1\]"):
            ops.modality_scores(
                [z, torch.zeros(2, 4, 4)], torch.zeros(2, 4).long(), weight=torch.ones(3)
            )
