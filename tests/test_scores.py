"""Scores for regression and for several tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmfuse import scores


def test_inverse_errors() -> None:
    target = torch.tensor([1.0, 2.0, 4.0])
    z = {"a": target + torch.tensor([1.0, -1.0, 2.0]), "b": target + 0.5}
    found = scores.inverse_error(z, target)
    assert [float(x) for x in found.values()] == pytest.approx([0.5, 4.0])
    found = scores.inverse_error(z, target, error="absolute")
    assert [float(x) for x in found.values()] == pytest.approx([0.75, 2.0])
    assert scores.inverse_error({"a": target}, target)["a"].isfinite()


def test_ratios_of_errors() -> None:
    target = torch.zeros(2)
    z = {"a": target + 1, "b": target + 2, "c": target + 3}
    found = scores.error_ratios(z, target)
    assert [float(x) for x in found.values()] == pytest.approx([1 / 6.5, 4 / 5, 9 / 2.5])
    found = scores.error_ratios({**z, "gone": target + torch.nan}, target)
    assert bool(found.pop("gone").isnan())
    assert [float(x) for x in found.values()] == pytest.approx([1 / 6.5, 4 / 5, 9 / 2.5])


def test_several_tasks_by_their_geometric_mean() -> None:
    one = {"a": torch.tensor(0.5), "b": torch.tensor(0.25)}
    two = {"b": torch.tensor(100.0), "a": torch.tensor(400.0)}
    found = scores.combined(one, two, weights=[1, 3])
    assert float(found["a"] / found["b"]) == pytest.approx(2**0.25 * 4**0.75)
    assert float(scores.combined(one)["a"]) == pytest.approx(0.5)


def test_wrong_input_is_named() -> None:
    z = torch.zeros(3)
    with pytest.raises(ValueError, match=r"predictions\['a'\] is \[3, 1\], target \[3\]"):
        scores.inverse_error({"a": z.unsqueeze(1)}, z)
    with pytest.raises(TypeError, match=r"target must be a floating tensor, got torch\.int64"):
        scores.inverse_error({"a": z}, z.long())
    with pytest.raises(ValueError, match="'squared' or 'absolute'"):
        scores.error_ratios({"a": z}, z, error="log")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights must be 1 positive numbers"):
        scores.combined({"a": z}, weights=[0.0])
    with pytest.raises(ValueError, match=r"tasks\[1\] names"):
        scores.combined({"a": z}, {"b": z})
    with pytest.raises(ValueError, match=r"at least two modalities, got \['a'\]"):
        scores.error_ratios({"a": z}, z)
    with pytest.raises(ValueError, match=r"eps must be a finite number of at least 0, got -1\.0"):
        scores.inverse_error({"a": z}, z, eps=-1.0)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (torch.ones(2).to_sparse(), TypeError),
        (torch.ones(2, dtype=torch.float8_e4m3fn), TypeError),
        (torch.ones(2, dtype=torch.complex64), TypeError),
        (torch.ones(2, device="meta"), ValueError),
    ],
    ids=["sparse", "float8", "complex", "meta"],
)
def test_tensors_that_nothing_can_be_computed_of_are_named(
    wrong: torch.Tensor, error: type[Exception]
) -> None:
    right = torch.ones(2)
    with pytest.raises(error, match=r"predictions\['a'\]"):
        scores.inverse_error({"b": right, "a": wrong}, right)
    with pytest.raises(error, match="'a'"):
        scores.combined({"a": wrong, "b": right}, {"a": right, "b": right})


@pytest.mark.parametrize("wrong", [-0.5, torch.tensor(-0.5), np.float32(-0.5)], ids=repr)
def test_a_negative_score_is_not_taken_for_one_that_is_missing(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"tasks\[1\]\['a'\] must be positive, got .*-0\.5"):
        scores.combined({"a": 0.5}, {"a": wrong})
    assert torch.isnan(scores.combined({"a": torch.nan})["a"])


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_numbers_keep_their_digits(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = scores.combined({"a": 1 / 3, "b": np.float32(0.3)}, {"a": 1 / 7, "b": 2})
        half = scores.combined({"a": torch.tensor(0.1, dtype=torch.float16)})["a"]
    finally:
        torch.set_default_dtype(before)
    assert float(found["a"]) == pytest.approx(21**-0.5, rel=1e-14)
    assert float(found["b"]) == pytest.approx(0.6**0.5, rel=1e-7)
    assert half.dtype is torch.float32
