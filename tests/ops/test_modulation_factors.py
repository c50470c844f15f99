"""modulation_factors: every backend against float64, at the edges, and against the single steps."""

from __future__ import annotations

import math

import pytest
import tolerances
import torch
from cells import Cell
from torch import Tensor

import mmfuse
from mmfuse import _native, ops
from mmfuse.ops import GradStats
from mmfuse.ops._eager import Eager
from mmfuse.ops.modulation_factors import before_update, factors_before_update

FLOAT = (torch.float32, torch.float64)
NAN, INF = float("nan"), float("inf")
EPS = 1e-8
BETA = 3.0
FORMULAS = ["tpami", "cvpr", "mlb"]


def statistics(count: int, dtype: torch.dtype) -> GradStats:
    """Statistics of tensors with 1 to 40 elements or up to 2³³, with spreads over 12 decades."""
    numel = torch.randint(1, 41, (count,))
    numel[::7] = torch.randint(2, 2**33, (len(numel[::7]),))
    m2 = torch.randn(count).mul(6).exp().to(dtype)
    return GradStats(numel, torch.randn(count).to(dtype), m2)


def on(device: str, stats: GradStats) -> GradStats:
    return GradStats(*(None if s is None else s.to(device) for s in stats))


def expected(
    s: Tensor, alpha: float, formula: str, stats: GradStats | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The papers' formulas, modality by modality."""
    s = s.double()
    count = len(s)
    std = None
    if stats is not None:
        std = torch.zeros(len(stats.m2), dtype=torch.float64)
        some = stats.numel > 1
        std[some] = (stats.m2.double()[some] / (stats.numel[some] - 1)).sqrt() + EPS
    if formula == "mlb":
        rho = torch.stack([s[torch.arange(count) != m].mean() / s[m] for m in range(count)])
        change = torch.tanh(alpha * (rho - 1))
        return rho, torch.where(rho > 1, 1 + (BETA - 1) * change, 1 + change), std
    rho = torch.stack([(s[m] / s[torch.arange(count) != m]).mean() for m in range(count)])
    k = torch.ones_like(rho)
    ahead = rho > 1
    if formula == "tpami":
        k[ahead] = (1 - alpha * torch.tanh(rho[ahead] - 1)).clamp(min=0)
    else:
        k[ahead] = 1 - torch.tanh(alpha * rho[ahead])
    return rho, k, std


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("moments", [None, *FLOAT], ids=str)
@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize(("count", "tensors"), [(2, 16), (3, 0), (5, 137), (33, 1), (137, 9)])
def test_parity(
    cell: Cell,
    count: int,
    tensors: int,
    dtype: torch.dtype,
    moments: torch.dtype | None,
    formula: str,
) -> None:
    s = (torch.rand(count) + 1e-3).to(dtype)
    s[count // 2] *= 100  # one is far ahead
    owner = tuple(torch.randint(0, count, (tensors,)).tolist())
    stats = None if moments is None else statistics(tensors, moments)
    found = ops.modulation_factors(
        s.to(cell.device),
        0.8,
        formula,
        beta=BETA,
        owner=owner,
        stats=None if stats is None else on(cell.device, stats),
        eps=EPS,
        backend=cell.backend,
    )
    rho, k, std = expected(s, 0.8, formula, stats)
    assert bool((k < 0.9).any() and (k > 1.1 if formula == "mlb" else k == 1).any())
    assert found.ratios.dtype == found.coefficients.dtype == dtype
    assert found.scale.dtype == (moments or dtype)
    tolerances.assert_within(found.ratios, rho, tolerances.ratios(dtype, rho), "ratios")
    bound = tolerances.coefficients(dtype, count, 0.8, k)
    if formula == "mlb":
        bound = tolerances.balancing_coefficients(dtype, count, 0.8, BETA, k)
    tolerances.assert_within(found.coefficients, k, bound, "coefficients")
    # The tensors get what their modality has, rounded where it is.
    spread = found.coefficients[list(owner)].to(found.scale.dtype)
    assert torch.equal(found.scale, spread)
    if moments is None:
        assert found.noise_std is None
        return
    assert found.noise_std.dtype == moments
    tolerances.assert_within(
        found.noise_std, std, tolerances.modulation_noise(moments, std), "noise_std"
    )


@pytest.mark.parametrize("formula", ["tpami", "cvpr"])
def test_it_is_the_single_steps_in_one(cell: Cell, formula: str) -> None:
    """The docstring's snippet, on real statistics."""
    grads = [torch.randn(n, device=cell.device) for n in (30, 1, 7, 64)]
    stats = ops.grad_stats(grads, backend=cell.backend)
    s = torch.tensor([0.6, 0.2, 0.25], device=cell.device)
    owner = [0, 0, 1, 2]
    found = ops.modulation_factors(
        s, 0.5, formula, owner=owner, stats=stats, eps=EPS, backend=cell.backend
    )
    ratios = ops.discrepancy_ratios(s, backend=cell.backend)
    coefficients = mmfuse.ogm_coefficients(ratios, 0.5, formula)
    for actual, single in [
        (found.ratios, ratios),
        (found.coefficients, coefficients),
        (found.scale, coefficients[owner]),
        (found.noise_std, torch.where(stats.numel > 1, stats.std + EPS, 0)),
    ]:
        torch.testing.assert_close(actual, single)
    assert found.coefficients[0] < 1 and found.coefficients[1:].tolist() == [1, 1]


LISTS = {
    "few": lambda: [torch.randn(n) for n in (30, 1, 7, 2 * 16384 + 37)],
    "many": lambda: list(torch.randn(390).split(3)),
    "more than a table": lambda: list(torch.randn(2002).split(1)),
    "mixed": lambda: [torch.randn(n).to(d) for n in (9, 17) for d in (*FLOAT, torch.bfloat16)],
    "channels_last": lambda: [torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last)],
}


@pytest.mark.skipif(_native.read_list is None, reason="mmfuse._C was not built for this Python")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize("name", LISTS)
def test_statistics_on_the_way_are_those_of_grad_stats(
    cell: Cell, name: str, dtype: torch.dtype, formula: str
) -> None:
    """To the bit; and the update starts from True and no block."""
    if name != "few" and (dtype, formula) != (torch.float32, "tpami"):
        pytest.skip("lists differ in the statistics alone")
    grads = [g.to(cell.device) for g in LISTS[name]()]
    s = torch.tensor([0.6, 0.2, 0.25], dtype=dtype, device=cell.device)
    owner = tuple(i % 3 for i in range(len(grads)))
    kernel = before_update(Eager(cell.backend), s.device)
    if cell.backend in ("reference", "triton"):
        assert kernel is None
        return
    assert kernel is not None
    assert _native.read_list is not None
    _, table = _native.read_list(grads)
    for given in (table, None):
        stats = None if given is None else ops.grad_stats(grads, backend=cell.backend)
        found, started = factors_before_update(
            kernel, s, 0.5, formula, owner, given, EPS, beta=BETA
        )
        wanted = ops.modulation_factors(
            s, 0.5, formula, beta=BETA, owner=owner, stats=stats, eps=EPS, backend=cell.backend
        )
        for actual, single in zip(found, wanted, strict=True):
            assert (actual is None) == (single is None)
            if actual is not None:
                assert actual.dtype == single.dtype and torch.equal(actual, single)
        assert started.finite.shape == () and started.finite.tolist() is True
        if cell.backend == "cuda" and given is not None:
            assert started.done is not None and started.done.tolist() == [0]
        else:
            assert started.done is None


@pytest.mark.parametrize("dtype", FLOAT, ids=str)
def test_scores_of_zero_and_not_a_number(cell: Cell, dtype: torch.dtype) -> None:
    for scores, ratios, tpami, cvpr in [
        ([0.5, 0.0, 0.25], [INF, 0.0, INF], [0.25, 1.0, 0.25], [0.0, 1.0, 0.0]),
        ([0.0, 0.0], [NAN, NAN], [1.0, 1.0], [1.0, 1.0]),
        ([NAN, 0.5], [NAN, NAN], [1.0, 1.0], [1.0, 1.0]),
        ([0.5, 0.5], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]),
        ([1.0, 1e-30], [1e30, 1e-30], [0.25, 1.0], [0.0, 1.0]),
    ]:
        s = torch.tensor(scores, dtype=dtype, device=cell.device)
        for formula, k in (("tpami", tpami), ("cvpr", cvpr)):
            found = ops.modulation_factors(s, 0.75, formula, owner=[1, 0], backend=cell.backend)
            torch.testing.assert_close(
                found.ratios.cpu(), torch.tensor(ratios, dtype=dtype), equal_nan=True
            )
            assert found.coefficients.tolist() == k
            assert found.scale.tolist() == [k[1], k[0]]


def test_mlb_is_the_single_steps_in_one(cell: Cell) -> None:
    """The docstring's other snippet."""
    s, alpha = torch.tensor([0.6, 0.2, 0.25], device=cell.device), 0.5
    found = ops.modulation_factors(
        s, alpha, "mlb", beta=BETA, owner=[2, 0, 1], backend=cell.backend
    )
    ratios = (s.sum() - s) / (3 - 1) / s
    change = torch.tanh(alpha * (ratios - 1))
    k = 1 + torch.where(ratios > 1, (BETA - 1) * change, change)
    for actual, single in [(found.ratios, ratios), (found.coefficients, k)]:
        torch.testing.assert_close(actual, single)
    assert torch.equal(found.scale, found.coefficients[[2, 0, 1]])
    assert found.coefficients[0] < 1 < found.coefficients[2] < found.coefficients[1] < BETA


def test_mlb_of_scores_of_zero_and_not_a_number(cell: Cell) -> None:
    for scores, ratios, k in [
        ([0.5, 0.0], [0.0, INF], [1 - math.tanh(0.75), BETA]),
        ([0.0, 0.0], [NAN, NAN], [1.0, 1.0]),
        ([NAN, 0.5], [NAN, NAN], [1.0, 1.0]),
        ([0.5, 0.5], [1.0, 1.0], [1.0, 1.0]),
        ([0.5, NAN, 0.5], [NAN, NAN, NAN], [1.0, 1.0, 1.0]),
    ]:
        s = torch.tensor(scores, dtype=torch.float64, device=cell.device)
        found = ops.modulation_factors(s, 0.75, "mlb", beta=BETA, backend=cell.backend)
        assert found.ratios.tolist() == pytest.approx(ratios, nan_ok=True)
        assert found.coefficients.tolist() == pytest.approx(k, rel=1e-14)


@pytest.mark.parametrize("formula", FORMULAS)
def test_without_strength_every_coefficient_is_one(cell: Cell, formula: str) -> None:
    for scores in ([0.9, 0.1], [0.5, 0.0], [NAN, 0.5]):  # MLB's 0 times infinity is no number
        s = torch.tensor(scores, device=cell.device)
        found = ops.modulation_factors(s, 0.0, formula, owner=[0, 1, 1], backend=cell.backend)
        assert found.coefficients.tolist() == [1, 1]
        assert found.scale.tolist() == [1, 1, 1]


def test_tpami_ends_at_zero(cell: Cell) -> None:
    s = torch.tensor([0.9, 0.1], device=cell.device)
    found = ops.modulation_factors(s, 2.0, owner=[0, 1], backend=cell.backend)
    assert found.coefficients.tolist() == found.scale.tolist() == [0, 1]


def test_noise_of_tensors_that_are_short_or_not_finite(cell: Cell) -> None:
    numel = torch.tensor([1, 1, 0, 2, 5, 5], device=cell.device)
    m2 = torch.tensor([0.0, NAN, 0.0, 0.0, NAN, INF], device=cell.device)
    found = ops.modulation_factors(
        torch.tensor([0.25, 0.5], device=cell.device),
        0.8,
        owner=[0] * 6,
        stats=GradStats(numel, m2, m2),
        eps=0.5,
        backend=cell.backend,
    )
    expected = torch.tensor([0.0, 0.0, 0.0, 0.5, NAN, INF])
    torch.testing.assert_close(found.noise_std.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_strided_scores_and_statistics(cell: Cell) -> None:
    s = torch.rand(6, device=cell.device)[::2]
    numel = torch.tensor([3, 0, 9, 0], device=cell.device)[::2]
    m2 = torch.rand(4, device=cell.device)[::2]
    found, dense = (
        ops.modulation_factors(
            make(s), 0.8, owner=[2, 1], stats=GradStats(*map(make, (numel, m2, m2))),
            backend=cell.backend,
        )
        for make in (lambda t: t, Tensor.contiguous)
    )  # fmt: skip
    for a, b in zip(found, dense, strict=True):
        assert torch.equal(a, b)


class TestBadInput:
    def test_scores_and_strength(self) -> None:
        s = torch.ones(2)
        for scores, alpha, formula, error, match in [
            (torch.ones(1), 0.8, "tpami", ValueError, r"scores must have shape \[M\] with M >= 2"),
            (torch.ones(2).half(), 0.8, "tpami", TypeError, "scores must be a float32 or float64"),
            (s, -1.0, "tpami", ValueError, "alpha must be a finite number of at least 0, got -1"),
            (s, NAN, "tpami", ValueError, "alpha must be a finite number"),
            (s, 0.8, "eq9", ValueError, "formula must be 'tpami', 'cvpr' or 'mlb', got 'eq9'"),
        ]:
            with pytest.raises(error, match=match):
                ops.modulation_factors(scores, alpha, formula)

    @pytest.mark.parametrize("beta", [-1.0, NAN, INF])
    def test_beta(self, beta: float) -> None:
        with pytest.raises(ValueError, match="beta must be a finite number of at least 0"):
            ops.modulation_factors(torch.ones(2), 0.8, "mlb", beta=beta)

    def test_owner(self) -> None:
        for owner, match in [
            ([0, 2], r"owner\[1\] = 2 is none of the 2 modalities"),
            ([-1, 1], r"owner\[0\] = -1 is none of the 2 modalities"),
        ]:
            with pytest.raises(ValueError, match=match):
                ops.modulation_factors(torch.ones(2), 0.8, owner=owner)

    def test_statistics(self) -> None:
        n, m2 = torch.tensor([2, 3]), torch.ones(2)
        elsewhere = torch.ones(2, device="meta")
        for stats, error, match in [
            (GradStats(n[:1], m2, m2), ValueError, r"stats.numel must have shape \[2\]"),
            (GradStats(n, m2, m2[:1]), ValueError, r"stats.m2 must have shape \[2\].*got \[1\]"),
            (GradStats(n.int(), m2, m2), TypeError, "stats must hold int64"),
            (GradStats(n, m2, m2.half()), TypeError, "float32 or float64 moments"),
            (GradStats(n, m2, elsewhere), ValueError, "stats.m2 is on meta, scores on cpu"),
        ]:
            with pytest.raises(error, match=match):
                ops.modulation_factors(torch.ones(2), 0.8, owner=[0, 1], stats=stats)
