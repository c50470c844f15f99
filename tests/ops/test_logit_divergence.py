"""logit_divergence: every backend against float64, its gradients, masks, extremes and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import tolerances
import torch
from cells import Cell
from inputs import DTYPES
from samples.logit_divergence import KINDS
from torch import Tensor
from torch.nn import functional as F

from mmfuse import ops

SHAPES = [(1, 2), (3, 7), (5, 33), (64, 6), (130, 17), (4, 309), (2, 1025)]
LAYOUTS = {
    "rows apart": lambda z: F.pad(z, (0, 3))[:, :-3],
    "every other row": lambda z: z.repeat_interleave(2, 0)[::2],
    "odd address": lambda z: torch.cat([z.new_zeros(1), z.flatten()])[1:].view(z.shape),
    "transposed": lambda z: z.t().contiguous().t(),
    "every other class": lambda z: z.repeat_interleave(2, 1)[:, ::2],
}


def plain(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """Each row's, by the definition; a class that one of them masks must not carry a gradient."""
    log_p, log_q = a.log_softmax(1), b.log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)

    def kl(s: Tensor, t: Tensor) -> Tensor:
        return torch.where(s.exp() == 0, 0.0, s.exp() * (s - t)).sum(1)

    if kind == "kl":
        return kl(log_p, log_q)
    pairs = (
        ((log_m, log_p), (log_m, log_q)) if kind == "mixture" else ((log_p, log_m), (log_q, log_m))
    )
    return sum(kl(*pair) for pair in pairs) / 2


def exact(a: Tensor, b: Tensor, kind: str) -> tolerances.Divergence:
    """The parts of the bounds, in float64."""
    logs = [z.detach().cpu().double().log_softmax(1) for z in (a, b)]
    p, q = (x.exp() for x in logs)
    log_p, log_q = (x.where(x.isfinite(), 0.0) for x in logs)
    d = torch.where(logs[0].isfinite() & logs[1].isfinite(), log_p - log_q, 0.0)
    apart, x = (p - q).abs(), d.abs() / 2
    log_cosh = x + (-2 * x).exp().log1p() - math.log(2)
    if kind == "kl":
        near = d + torch.expm1(-d)
        terms = torch.where(d.abs() < 1, p * near, p * d - p + q)
        return tolerances.Divergence(
            p, q, log_p, log_q, terms, apart, (d.abs(), 0 * d), (1 + 0 * d, 0 * d)
        )
    if kind == "mixture":
        rate = x.tanh() / 2
        return tolerances.Divergence(
            p, q, log_p, log_q, (p + q) / 2 * log_cosh, apart / 4, (log_cosh,) * 2, (rate,) * 2
        )
    slope = (p + q) / 4 * x / x.clamp(max=300).cosh().square()
    nearer = math.log(2) - (-2 * x).exp().log1p()
    halves = [torch.where(larger, nearer, 2 * x - nearer) / 2 for larger in (d >= 0, d < 0)]
    terms = (p + q) / 2 * (x * x.tanh() - log_cosh)
    return tolerances.Divergence(
        p, q, log_p, log_q, terms, slope, tuple(halves), (0.5 + 0 * d,) * 2
    )


def accumulated(a: Tensor) -> torch.dtype:
    return tolerances.accumulation_dtype(a.dtype)


def check(cell: Cell, first: Sequence[Tensor], second: Sequence[Tensor], kind: str) -> None:
    """Rows and means, and the gradients of both."""
    leaves = [z.detach().requires_grad_() for z in (*first, *second)]
    first, second = leaves[: len(first)], leaves[len(first) :]
    rows = ops.logit_divergence(first, second, kind=kind, per_row=True, backend=cell.backend)
    means = ops.logit_divergence(first, second, kind=kind, backend=cell.backend)
    wide = any(z.dtype == torch.float64 for z in leaves)
    assert rows.dtype == means.dtype == (torch.float64 if wide else torch.float32)
    assert rows.shape == (len(first), len(first[0])) and means.shape == (len(first),)
    weights = torch.randn(rows.shape, dtype=rows.dtype).to(rows.device)
    slopes = torch.randn(means.shape, dtype=means.dtype).to(means.device)
    of_rows = torch.autograd.grad((weights * rows).sum(), leaves)
    of_means = torch.autograd.grad((slopes * means).sum(), leaves)
    for k, pair in enumerate(zip(first, second, strict=True)):
        dtype = accumulated(pair[0])
        parts = exact(*pair, kind)
        bound = tolerances.divergence(dtype, parts)
        sides = [z.detach().cpu().double().requires_grad_() for z in pair]
        expected = plain(*sides, kind)
        tolerances.assert_within(rows[k], expected, bound, f"rows of pair {k}")
        added = tolerances.growth(len(bound)) * tolerances.UNIT_ROUNDOFF[dtype] * expected.mean()
        tolerances.assert_within(means[k], expected.mean(), bound.mean() + added, f"mean {k}")
        each = weights[k].cpu().double()
        for found, weight in ((of_rows, each), (of_means, slopes[k].cpu().double() / len(each))):
            wanted = torch.autograd.grad((weight * expected).sum(), sides, retain_graph=True)
            weight = weight.expand(len(each)).unsqueeze(1)
            for side, grad in enumerate(wanted):
                got = found[k + side * len(first)]
                assert got.dtype == pair[side].dtype and got.is_contiguous()
                limit = tolerances.divergence_gradient(got.dtype, parts, side, grad, weight)
                tolerances.assert_within(got, grad, limit, f"gradient {side} of pair {k}")


def pair_of(cell: Cell, shape: tuple[int, int], dtype: torch.dtype, apart: float) -> list[Tensor]:
    a = 3 * torch.randn(shape)
    return [z.to(dtype).to(cell.device) for z in (a, a + apart * torch.randn(shape))]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parity(cell: Cell, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    cell.skip_slow(shape[1] > 300 and kind == "mixture")
    check(cell, *([z] for z in pair_of(cell, shape, dtype, 2.0)), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_different_widths_and_dtypes(cell: Cell, kind: str) -> None:
    pairs = [pair_of(cell, (20, c), d, 1.0) for c, d in zip((4, 9, 40, 5), DTYPES, strict=True)]
    check(cell, [a for a, _ in pairs], [b for _, b in pairs], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_many_pairs(cell: Cell, kind: str) -> None:
    """More than a launch has room for; without the interpreter's unrolled branches."""
    count = 4 if cell.slow else 18
    pairs = [pair_of(cell, (8, 5), torch.float32, 1.0) for _ in range(count)]
    check(cell, [a for a, _ in pairs], [b for _, b in pairs], kind)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_layouts(cell: Cell, kind: str, layout: str) -> None:
    a, b = pair_of(cell, (9, 11), torch.float32, 1.0)
    turned = [LAYOUTS[layout](z) for z in (a, b)]
    check(cell, [turned[0], a], [b, turned[1]], kind)


def test_rows_that_are_expanded(cell: Cell) -> None:
    """One distribution for all rows, such as the uniform one."""
    a, b = pair_of(cell, (6, 5), torch.float32, 1.0)
    for kind in KINDS:
        check(cell, [a, b[:1].expand(6, 5)], [b[:1].expand(6, 5), a], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6])
def test_nearly_equal_logits(cell: Cell, kind: str, apart: float) -> None:
    """The result is some d²/8 of differences d, far below the rounding of ln p."""
    check(cell, *([z] for z in pair_of(cell, (7, 33), torch.float32, apart)), kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_give_exactly_nothing(cell: Cell, kind: str, dtype: torch.dtype) -> None:
    a, _ = pair_of(cell, (9, 37), dtype, 0.0)
    a[2, 5] = -torch.inf
    leaves = [a.clone().requires_grad_() for _ in "ab"]
    found = ops.logit_divergence(
        leaves[:1], leaves[1:], kind=kind, per_row=True, backend=cell.backend
    )
    assert not found.any()
    for grad in torch.autograd.grad(found.sum(), leaves):
        assert float(grad.abs().max()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_negative_beyond_rounding(cell: Cell, kind: str) -> None:
    """However small the difference: a term is off by u |d| p, and its size is d² p / 8."""
    a = torch.randn(20, 9).to(cell.device)
    for apart in (1e-3, 1e-5, 1e-7):
        b = a + apart * torch.randn(20, 9).to(cell.device)
        found = ops.logit_divergence([a], [b], kind=kind, per_row=True, backend=cell.backend)
        assert float(found.min()) >= -(2.0**-24) * 4 * apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(cell: Cell, kind: str, dtype: torch.dtype) -> None:
    a = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, -1e4], [1e4, 1e4 - 1, 1e4 + 2], [30.0, 0, -200]])
    b = torch.tensor([[-1e4, 1e4, 0.0], [0.0, -1e4, 0.0], [-1e4, -1e4 - 2, -1e4], [0.0, 90, 0.5]])
    check(cell, [a.to(cell.device, dtype)], [b.to(cell.device, dtype)], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_classes(cell: Cell, kind: str) -> None:
    """A class masked in both counts nothing; one masked in p alone is infinite for "mixture"."""
    a, b = pair_of(cell, (3, 6), torch.float32, 1.0)
    narrow = [z[:, :4].contiguous() for z in (a, b)]
    masked = [F.pad(z, (0, 2), value=-torch.inf) for z in narrow]
    call = {"kind": kind, "per_row": True, "backend": cell.backend}
    leaves = [z.requires_grad_() for z in (*masked, *narrow)]
    found = ops.logit_divergence([masked[0]], [masked[1]], **call)
    same = ops.logit_divergence([narrow[0]], [narrow[1]], **call)
    torch.testing.assert_close(found, same)
    grads = torch.autograd.grad(found.sum() + same.sum(), leaves)
    for wide, of_narrow in zip(grads[:2], grads[2:], strict=True):
        torch.testing.assert_close(wide[:, :4], of_narrow)
        assert not wide[:, 4:].any()
    with torch.no_grad():
        only_p, only_q = ops.logit_divergence([masked[0], a], [b, masked[1]], **call)
    assert bool(only_p.isinf().all()) == (kind == "mixture")
    assert bool(only_q.isinf().all()) == (kind != "js")
    for z, other, value in ((masked[0], b, only_p), (a, masked[1], only_q)):
        wanted = plain(z.detach().cpu().double(), other.detach().cpu().double(), kind)
        torch.testing.assert_close(value.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
    if kind == "js":
        assert float(only_p.max()) <= math.log(2)


def test_a_row_without_a_class_or_with_nan_is_nan_alone(cell: Cell) -> None:
    a, b = pair_of(cell, (4, 5), torch.float32, 1.0)
    a[1], b[2, 3] = -torch.inf, torch.nan
    for kind in KINDS:
        call = {"kind": kind, "backend": cell.backend}
        found = ops.logit_divergence([a, b], [b, b], per_row=True, **call)
        assert found.isnan().tolist() == [[False, True, True, False], [False, False, True, False]]
        means = ops.logit_divergence(
            [a, a.flip(0).nan_to_num(0, 0, 0)], [b, b[:1].expand(4, 5)], **call
        )
        assert means.isnan().tolist() == [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_gives_nan(cell: Cell, kind: str) -> None:
    z = torch.empty(0, 3, device=cell.device, requires_grad=True)
    mean = ops.logit_divergence([z, z], [z, z], kind=kind, backend=cell.backend)
    assert mean.shape == (2,) and bool(mean.isnan().all())
    rows = ops.logit_divergence([z], [z], kind=kind, per_row=True, backend=cell.backend)
    assert rows.shape == (1, 0)
    for found in (mean, rows):
        assert torch.autograd.grad(found.sum(), z)[0].shape == (0, 3)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(cell: Cell, kind: str, per_row: bool) -> None:
    cell.skip_slow(per_row)
    leaves = [
        torch.randn(2, c, dtype=torch.float64, device=cell.device, requires_grad=True)
        for c in (2, 3, 2, 3)
    ]

    def call(*z: Tensor) -> Tensor:
        return ops.logit_divergence(z[:2], z[2:], kind=kind, per_row=per_row, backend=cell.backend)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_gets_no_gradient(cell: Cell, kind: str) -> None:
    """The student gets the same one as beside a teacher with one; also under torch.func."""
    a, b = pair_of(cell, (5, 7), torch.float32, 1.0)

    def call(x: Tensor, y: Tensor) -> Tensor:
        return ops.logit_divergence([x], [y], kind=kind, backend=cell.backend).sum()

    both = [z.clone().requires_grad_() for z in (a, b)]
    grads = torch.autograd.grad(call(*both), both)
    for side in (0, 1):
        pair = [z.clone().requires_grad_(k == side) for k, z in enumerate((a, b))]
        call(*pair).backward()
        assert torch.equal(pair[side].grad, grads[side]) and pair[1 - side].grad is None
        assert torch.equal(torch.func.grad(call, side)(a, b), grads[side])

        def outer(y: Tensor, side: int = side) -> Tensor:
            return torch.func.grad(call, side)(*((a, y) if side == 0 else (y, b)))

        # A tensor that an outer level tracks is none of this one's.
        assert torch.equal(outer((b, a)[side].clone().requires_grad_()).detach(), grads[side])


def test_the_losses_of_pytorch(cell: Cell) -> None:
    a, b = pair_of(cell, (12, 6), torch.float64, 1.0)
    found = ops.logit_divergence([a], [b], backend=cell.backend)
    logs = b.log_softmax(1), a.log_softmax(1)
    torch.testing.assert_close(found[0], F.kl_div(*logs, reduction="batchmean", log_target=True))
    js = ops.logit_divergence([a], [b], kind="js", backend=cell.backend)
    middle = ((a.softmax(1) + b.softmax(1)) / 2).log()
    halves = [F.kl_div(middle, x, reduction="batchmean", log_target=True) for x in logs]
    torch.testing.assert_close(js[0], sum(halves) / 2)


def test_compiled_with_its_gradient(cell: Cell) -> None:
    a, b = pair_of(cell, (4, 3), torch.float32, 1.0)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        found = [
            ops.logit_divergence([x * 2, x], [y, y * 2], kind=kind, backend=cell.backend).sum()
            for kind in KINDS
        ]
        return sum(found) + ops.logit_divergence([x], [y], per_row=True, backend=cell.backend).sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = a.clone().requires_grad_()
        function(leaf, b).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


def test_the_same_bits_again(cell: Cell) -> None:
    a, b = pair_of(cell, (300, 9), torch.float32, 1.0)
    first, again = (ops.logit_divergence([a], [b], backend=cell.backend) for _ in range(2))
    assert torch.equal(first, again)


class TestBadInput:
    Z = torch.zeros(3, 2)

    @pytest.mark.parametrize(
        ("first", "second", "error", "match"),
        [
            ([], [], ValueError, "first and second must hold at least one tensor each"),
            ([Z], [Z, Z], ValueError, "first holds 1 tensors, second 2"),
            (Z, [Z], TypeError, r"first must be a list of tensors \[B, C\]"),
            ([Z], Z, TypeError, r"second must be a list of tensors"),
            ([Z, Z.long()], [Z, Z], TypeError, r"first\[1\] has dtype torch.int64"),
            ([Z], [Z.to_sparse()], TypeError, r"second\[0\] has layout"),
            ([Z], [[0.0]], TypeError, r"second\[0\] is not a tensor but list"),
            ([Z, Z[0]], [Z, Z], ValueError, r"first\[1\] must have shape \[B, C\].*got \[2\]"),
            ([Z[:, :0]], [Z[:, :0]], ValueError, r"C of at least 2, got \[3, 0\]"),
            ([Z[:, :1]], [Z[:, :1]], ValueError, r"got \[3, 1\]; of one logit .* F.pad\(z, \(1,"),
            ([Z, Z], [Z, Z[:2]], ValueError, r"second\[1\] has shape \[2, 2\], first\[1\] \[3, 2"),
            ([Z, Z[:2]], [Z, Z[:2]], ValueError, r"first\[1\] has 2 rows, first\[0\] 3"),
            ([Z], [Z.to("meta")], ValueError, r"second\[0\] is on meta, first\[0\] on cpu"),
        ],
    )
    def test_names_the_argument(
        self, first: object, second: object, error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            ops.logit_divergence(first, second)

    def test_an_unknown_kind(self) -> None:
        with pytest.raises(
            ValueError, match="kind must be one of 'kl', 'mixture', 'js'; got 'jsd'"
        ):
            ops.logit_divergence([self.Z], [self.Z], kind="jsd")

    def test_meta_tensors(self) -> None:
        z = self.Z.to("meta")
        assert ops.logit_divergence([z], [z], backend="reference").shape == (1,)
