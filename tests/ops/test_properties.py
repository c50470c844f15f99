"""Hypothesis: lists of 0 to 200 tensors of 0 to 10^5 elements, around block and chunk edges."""

from __future__ import annotations

import math

import pytest
import tolerances
import torch
from cells import Cell
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import CHUNK_EDGES, wide
from strategies import COMMON, dtypes, seeds

import mmfuse
from mmfuse import NoiseStream, ops

edges = st.sampled_from(
    [e + d for e in (0, 4, 8, 16, 32, 1024, *CHUNK_EDGES) for d in (-1, 0, 1) if e + d >= 0]
)
small_lists = st.lists(st.integers(0, 70), max_size=200)
large_lists = st.lists(st.one_of(edges, st.integers(0, 100_000)), max_size=4)


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


@pytest.mark.slow_except_on("reference", "cpu", "cuda")
@settings(max_examples=12, **COMMON)
@given(sizes=large_lists, dtype=dtypes, seed=seeds, offset=st.integers(0, 9))
def test_lists_of_large_tensors(cell: Cell, sizes, dtype, seed, offset) -> None:
    if cell.slow:
        sizes = [n % 9000 for n in sizes[:2]]
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


@settings(max_examples=8, **COMMON)
@given(
    values=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=60),
    bins=st.integers(1, 9),
    dtype=dtypes,
)
def test_entropies_are_those_of_information_theory(cell: Cell, values, bins, dtype) -> None:
    """Subadditive, submodular, and no margin knows more than the whole."""
    data = torch.tensor(values, dtype=torch.float64).t().to(dtype).to(cell.device)
    found = ops.joint_entropies([x[None] for x in data], [(0, 1, 2)], bins, backend=cell.backend)
    assert int(found.counts.sum()) == len(values)
    h_x, h_y, h_xy, h_z, h_xz, h_yz, h_xyz = found.entropies.flatten().tolist()
    # Four entropies, each off by at most this.
    slack = 4 * float(tolerances.entropy(torch.ones(bins**3)))
    for whole, part in ((h_xyz, h_xy), (h_xyz, h_xz), (h_xyz, h_yz), (h_xy, h_x), (h_yz, h_z)):
        assert whole >= part - slack
    for joint, one, other in ((h_xy, h_x, h_y), (h_xz, h_x, h_z), (h_yz, h_y, h_z)):
        assert joint <= one + other + slack
    assert h_xyz + h_z <= h_xz + h_yz + slack
    assert h_xyz <= math.log(len(values)) + slack


@settings(max_examples=8, **COMMON)
@given(
    rows=st.integers(1, 200),
    seed=seeds,
    pair=st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)),
)
def test_what_survives_a_higher_probability_survives_a_lower_one(cell: Cell, rows, seed, pair):
    stream = NoiseStream(seed, cell.device).place([3, 3], [1, 1])
    q = torch.tensor(sorted(pair), device=cell.device)
    features = [torch.ones(rows, 2, device=cell.device)] * 2
    keep = ops.drop_modalities(features, q, stream, backend=cell.backend).keep
    assert bool((keep[0] >= keep[1]).all())


@settings(max_examples=8, **COMMON)
@given(batch=st.integers(1, 40), width=st.integers(1, 9), seed=seeds, shift=st.floats(-50, 50))
def test_info_nce_does_not_see_what_all_rows_share(cell: Cell, batch, width, seed, shift) -> None:
    """A number added to all similarities drops out; nor is log B exceeded."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    a, b = torch.randn(2, batch, width, generator=generator, dtype=torch.float64)
    one, shifted = torch.ones(batch, 1).double(), torch.full((batch, 1), shift).double()
    bounds = [
        ops.info_nce(x.to(cell.device), y.to(cell.device), 0.7, backend=cell.backend)
        for x, y in ((a, b), (torch.cat([a, one], 1), torch.cat([b, shifted], 1)))
    ]
    # Similarities of up to |S| are rounded a few times, and so are their sums.
    largest = float((a.abs() @ b.abs().T).max()) + abs(shift)
    slack = 64 * tolerances.UNIT_ROUNDOFF[torch.float64] * (1 + largest / 0.7) * batch**0.5
    assert abs(float(bounds[0] - bounds[1])) <= slack
    assert float(bounds[0]) <= math.log(batch) + slack
