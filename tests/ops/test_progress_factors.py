"""progress_factors: every backend against CGGM's formulas in float64, and at the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tolerances
import torch
from cells import Cell
from torch import Tensor

from mmfuse import ops

FLOAT = (torch.float32, torch.float64)
NAN, INF = float("nan"), float("inf")
EPS = 1e-8


def expected(s: Tensor, last: Tensor, bound: float) -> tuple[list[float], list[float], list[float]]:
    """Shares, the whole that each is a share of, and the magnitudes in it: `s[m][j]` is a table."""
    shares, wholes, magnitudes = [], [], []
    change = (s - last).tolist()
    for m in range(len(s)):
        both = [
            j for j in range(len(s))
            if j != m and not math.isnan(change[m][j]) and not math.isnan(change[j][m])
        ]  # fmt: skip
        if not both:
            shares.append(NAN), wholes.append(NAN), magnitudes.append(NAN)
            continue
        others = [change[j][m] for j in both]
        mine = math.fsum(change[m][j] for j in both) / len(both)
        whole = math.fsum([*others, mine, EPS])
        shares.append(min(max(math.fsum([*others, EPS]) / whole, -bound), bound))
        wholes.append(abs(whole))
        magnitudes.append(sum(map(abs, others)) + sum(abs(change[m][j]) for j in both) + EPS)
    return shares, wholes, magnitudes


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("table", [False, True], ids=["scores", "table"])
@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize("last_dtype", FLOAT, ids=str)
@pytest.mark.parametrize(("count", "tensors"), [(2, 16), (3, 0), (5, 137), (37, 9), (137, 1)])
def test_parity(
    cell: Cell,
    count: int,
    tensors: int,
    dtype: torch.dtype,
    last_dtype: torch.dtype,
    table: bool,
    bound: float | None,
) -> None:
    cell.skip_slow(count in (37, 137) or last_dtype != torch.float64)
    s = torch.rand((count, count) if table else (count,)).to(dtype)
    last = torch.rand(count, count).to(last_dtype)
    shares_before = torch.randn(count).to(last_dtype)
    if table and count > 2:
        s[2] = s[:, 2] = NAN  # the third is missing
    if table and count > 3:
        s[0, 1] = NAN  # 0 and 1 share nothing
    owner = tuple(torch.randint(0, count, (tensors,)).tolist())
    found = ops.progress_factors(
        *(x.to(cell.device) for x in (s, last, shares_before)),
        1.3,
        bound,
        owner=owner,
        scale_dtype=dtype,
        backend=cell.backend,
    )
    assert found.scale.dtype == dtype
    assert all(x.dtype == last_dtype for x in found._replace(scale=found.shares))
    wide, before = s.double(), last.double()
    if not table:
        wide = wide.unsqueeze(1).expand(count, count)
        before = before.diagonal().unsqueeze(1).expand(count, count)
    numbers = expected(wide, before, math.inf if bound is None else bound)
    k, whole, magnitude = (torch.tensor(x, dtype=torch.float64) for x in numbers)
    known = ~k.isnan()
    assert int(known.sum()) == (count - 1 if table and count > 2 else count)
    assert torch.equal(found.shares.isnan().cpu(), ~known)
    limit = tolerances.progress_share(last_dtype, count, k[known], whole[known], magnitude[known])
    tolerances.assert_within(found.shares.cpu()[known], k[known], limit, "shares")
    kept = found.kept_shares.cpu()
    assert torch.equal(kept[known], found.shares.cpu()[known])
    assert torch.equal(kept[~known], shares_before[~known])
    coefficients = found.coefficients.cpu()
    factor = 1.3 * k[known]
    tolerances.assert_within(coefficients[known], factor, 1.3 * 2 * limit, "coefficients")
    assert bool((coefficients[~known] == 1).all())
    torch.testing.assert_close(
        found.progress.cpu(),
        (wide - before).diagonal().to(last_dtype),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    # A sample that is not there leaves what was known.
    remembered = torch.where(wide.isnan(), last.double(), wide).to(last_dtype)
    assert torch.equal(found.kept_scores.cpu(), remembered)
    # The tensors get what their modality has, rounded where it is.
    assert torch.equal(found.scale, found.coefficients[list(owner)].to(dtype))


def one(cell: Cell, scores: list[Any], last: list[Any], **options: Any) -> ops.ProgressFactors:
    before = torch.tensor(last, dtype=torch.float64, device=cell.device)
    return ops.progress_factors(
        torch.tensor(scores, dtype=torch.float64, device=cell.device),
        before if before.dim() == 2 else before.diag(),
        torch.full((len(last),), 7.0, dtype=torch.float64, device=cell.device),
        1.0,
        backend=cell.backend,
        **options,
    )


def test_by_hand(cell: Cell) -> None:
    found = one(cell, [0.5, 0.25, 0.25], [0.25, 0.25, 0.0], owner=[2, 0])
    assert found.progress.tolist() == [0.25, 0.0, 0.25]
    assert found.shares.tolist() == pytest.approx([0.5, 1.0, 0.5], rel=1e-7)
    assert found.scale.tolist() == found.coefficients[[2, 0]].tolist()
    assert found.kept_scores.tolist() == [[0.5] * 3, [0.25] * 3, [0.25] * 3]


def test_where_nothing_changes_all_shares_are_one(cell: Cell) -> None:
    assert one(cell, [0.5, 0.25], [0.5, 0.25]).shares.tolist() == [1.0, 1.0]


def test_progress_that_cancels(cell: Cell) -> None:
    """The whole is ε exactly: the progress of others is added up, not taken from the whole."""
    given = [0.5 + 1 / 32, 0.5 - 1 / 32], [0.5, 0.5]
    free = one(cell, *given).shares.tolist()
    assert free == pytest.approx([-1e8 / 32 + 1, 1e8 / 32 + 1], rel=1e-12)
    assert one(cell, *given, bound=2.0).shares.tolist() == [-2.0, 2.0]
    assert one(cell, *given, bound=1).coefficients.tolist() == [-1.0, 1.0]


def test_who_is_missing_keeps_what_was_known(cell: Cell) -> None:
    scores = [[0.5, 0.5, NAN], [0.25, 0.5, NAN], [NAN, NAN, NAN]]
    found = one(cell, scores, [[0.25] * 3] * 3)
    assert found.shares.tolist() == pytest.approx([0.0, 1.0, NAN], abs=1e-7, nan_ok=True)
    assert found.coefficients[2] == 1 and found.kept_shares[2] == 7
    assert found.kept_scores.tolist() == [[0.5, 0.5, 0.25], [0.25, 0.5, 0.25], [0.25] * 3]


@pytest.mark.parametrize("scores", [[NAN, NAN], [NAN, 0.5], [[NAN, NAN], [NAN, 0.5]]], ids=str)
def test_without_another_to_compare_with(cell: Cell, scores: list[Any]) -> None:
    found = one(cell, scores, [0.25, 0.25])
    assert bool(found.shares.isnan().all())
    assert found.coefficients.tolist() == [1, 1] and found.kept_shares.tolist() == [7, 7]


def test_strided_arguments(cell: Cell) -> None:
    s, last = torch.rand(6, device=cell.device)[::2], torch.rand(3, 6, device=cell.device)[:, ::2]
    given, dense = (
        ops.progress_factors(make(s), make(last), make(s), 1.3, owner=[2], backend=cell.backend)
        for make in (lambda t: t, Tensor.contiguous)
    )
    for a, b in zip(given, dense, strict=True):
        assert torch.equal(a, b)


def test_compiled_in_one_graph(cell: Cell) -> None:
    last = torch.zeros(2, 2, device=cell.device)

    def step(scores: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            ops.progress_factors(
                scores, last, scores, 1.3, 2.0, owner=[1, 0, 0], backend=cell.backend
            )
        )

    scores = torch.tensor([0.5, 0.75], device=cell.device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(scores), step(scores), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"scores": torch.ones(1)}, ValueError, r"shape \[M\] or \[M, M\] with M >= 2, got \[1\]"),
        ({"scores": torch.ones(2, 3)}, ValueError, r"got \[2, 3\]"),
        ({"scores": torch.ones(2).half()}, TypeError, "scores must be a float32 or float64"),
        ({"last_scores": torch.ones(2)}, ValueError, r"last_scores must have shape \[2, 2\]"),
        ({"last_scores": [0.5]}, TypeError, "last_scores must be a float32 or float64 tensor"),
        ({"last_scores": torch.ones(2, 2).half()}, TypeError, "last_scores must be a float32 or"),
        ({"last_shares": torch.ones(3)}, ValueError, r"last_shares must have shape \[2\]"),
        ({"last_shares": torch.ones(2).double()}, TypeError, "last_shares must be a tensor of"),
        ({"last_shares": torch.ones(2).to("meta")}, ValueError, "last_shares is on meta, scores"),
        ({"scale_dtype": torch.half}, TypeError, "scale_dtype must be torch.float32 or"),
        ({"rho": 0.0}, ValueError, "rho must be a positive finite number, got 0.0"),
        ({"rho": INF}, ValueError, "rho must be a positive finite number"),
        ({"bound": 0.5}, ValueError, "bound must be at least 1, or None for no bound, got 0.5"),
        ({"bound": NAN}, ValueError, "bound must be at least 1"),
        ({"owner": [0, 2]}, ValueError, r"owner\[1\] = 2 is none of the 2 modalities"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], match: str) -> None:
    given: dict[str, Any] = {
        "scores": torch.ones(2),
        "last_scores": torch.zeros(2, 2),
        "last_shares": torch.zeros(2),
        "rho": 1.3,
        **change,
    }
    with pytest.raises(error, match=match):
        ops.progress_factors(**given)
