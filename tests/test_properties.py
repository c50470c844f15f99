"""Hypothesis: lists of 0 to 200 tensors of 0 to 10^5 elements, around block and chunk edges."""

from __future__ import annotations

import pytest
import tolerances
import torch
from conftest import Cell
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import CHUNK_EDGES, DTYPES, wide

import mmfuse
from mmfuse import NoiseStream, ops

COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}

edges = st.sampled_from(
    [e + d for e in (0, 4, 8, 16, 32, 1024, *CHUNK_EDGES) for d in (-1, 0, 1) if e + d >= 0]
)
small_lists = st.lists(st.integers(0, 70), max_size=200)
large_lists = st.lists(st.one_of(edges, st.integers(0, 100_000)), max_size=4)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**64 - 1)


def run(cell: Cell, sizes: list[int], dtype: torch.dtype, seed: int, offset: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    grads = [torch.randn(n, generator=generator).to(dtype).to(cell.device) for n in sizes]
    before = wide(grads)
    scale = torch.rand(len(sizes), generator=generator)
    sigma = torch.rand(len(sizes), generator=generator)
    stream = NoiseStream(seed, cell.device).place(range(len(sizes)), [offset] * len(sizes))
    stats = ops.grad_stats(grads, backend=cell.backend)
    ops.update_grads_(
        grads,
        scale.to(cell.device),
        noise_std=sigma.to(cell.device),
        stream=stream,
        backend=cell.backend,
    )
    assert stats.numel.tolist() == sizes
    for t, (g, g0) in enumerate(zip(grads, before, strict=True)):
        if not sizes[t]:
            continue
        mean = g0.mean()
        m2 = (g0 - mean).square().sum()
        tolerances.assert_within(stats.mean[t], mean, tolerances.mean(dtype, g0.abs().mean()))
        tolerances.assert_within(stats.m2[t], m2, tolerances.sum_of_products(dtype, m2))
        s, sd = scale[t].double(), sigma[t].double()
        z = stream.normal(sizes[t], t, offset, dtype=torch.float64).cpu()
        expected = s * g0 + sd * z
        zero = torch.zeros(())
        bound = tolerances.updated_grad(dtype, expected, s * g0, zero, sd, z)
        tolerances.assert_within(g, expected, bound, f"tensor {t} of {sizes[t]}")


@settings(max_examples=12, **COMMON)
@given(sizes=small_lists, dtype=dtypes, seed=seeds, offset=st.integers(0, 2**33))
def test_lists_of_small_tensors(cell: Cell, sizes, dtype, seed, offset) -> None:
    run(cell, sizes, dtype, seed, offset)


@settings(max_examples=12, **COMMON)
@given(sizes=large_lists, dtype=dtypes, seed=seeds, offset=st.integers(0, 9))
def test_lists_of_large_tensors(cell: Cell, sizes, dtype, seed, offset) -> None:
    if cell.slow:
        sizes = [n % 9000 for n in sizes]
    run(cell, sizes, dtype, seed, offset)


positive = st.floats(1e-3, 1.0)


@settings(max_examples=50, **COMMON)
@given(values=st.lists(positive, min_size=2, max_size=9), factor=st.floats(0.1, 10.0))
def test_ratios_do_not_depend_on_the_scores_scale_or_order(values, factor) -> None:
    s = torch.tensor(values, dtype=torch.float64)
    rho = ops.discrepancy_ratios(s)
    torch.testing.assert_close(ops.discrepancy_ratios(s * factor), rho)
    torch.testing.assert_close(ops.discrepancy_ratios(s.flip(0)), rho.flip(0))
    assert float(rho.max()) >= 1 - 1e-12
    assert int(rho.argmax()) == int(s.argmax()) or float(s.max() - s[rho.argmax()]) < 1e-12


@settings(max_examples=50, **COMMON)
@given(
    rho=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=9),
    alpha=st.floats(0.0, 5.0),
    formula=st.sampled_from(["tpami", "cvpr"]),
)
def test_coefficients_are_in_the_unit_interval_and_never_increase(rho, alpha, formula) -> None:
    ordered = torch.tensor(sorted(rho), dtype=torch.float64)
    k = mmfuse.ogm_coefficients(ordered, alpha, formula)
    assert bool(((k >= 0) & (k <= 1)).all())
    assert bool((k.diff() <= 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_do_not_depend_on_a_shift_of_the_logits(cell: Cell, dtype: torch.dtype) -> None:
    z = torch.randn(10, 5, dtype=dtype, device=cell.device)
    labels = torch.randint(0, 5, (10,), device=cell.device)
    one, other = ops.modality_scores([z, z + 3.0], labels, backend=cell.backend).log_prob
    # Adding 3 rounds each logit once, by at most half a unit in the last place of 8.
    assert abs(float(one - other)) < 64 * tolerances.UNIT_ROUNDOFF[dtype]
