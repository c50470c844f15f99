"""The eager forms that stand for the best ones: right in both ways, and small on a CPU."""

from __future__ import annotations

import pytest
import torch
from benchmarked import CPU, TINY, inputs_of
from cases import CASES
from engine import cost as costs_of
from engine import eager, providers

WITH_LISTS = (
    "ogm_ge",
    "ogm_ge_step",
    "update_noise",
    "update_pull",
    "update_all",
    "grad_stats_anchors",
    "inforeg",
    "redreg",
    "mmpareto_step",
)


@pytest.mark.parametrize("name", WITH_LISTS)
def test_on_a_cpu_no_list_as_large_as_the_gradients_is_made(name: str) -> None:
    case = CASES[name]
    prepared = providers.prepare("foreach", case, inputs_of(case))
    largest = 4 * 270_000
    # A temporary of the largest tensor, and one of a cache's size; the next tensor takes both over.
    extra = costs_of.cost_of(prepared, CPU).extra_bytes
    assert extra is not None and extra < 1.6 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITH_LISTS)
def test_lists_as_a_gpu_takes_them_pass_the_gate(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "_one_by_one", lambda device: False)
    case = CASES[name]
    if not case.takes(dtype):
        pytest.skip(f"{name} is not run in {dtype}")
    i = case.make(TINY, dtype, CPU)
    prepared = providers.prepare("foreach", case, i)
    prepared.restore()
    with torch.no_grad():
        case.check("foreach", i, prepared.call())


@pytest.mark.parametrize(
    ("name", "drawn"), [("mmpareto_step", "unimodal"), ("redundancy_pull", "state")]
)
def test_inputs_do_not_depend_on_what_was_drawn_before(name: str, drawn: str) -> None:
    case, made = CASES[name], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(getattr(inputs_of(case), drawn))
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)
