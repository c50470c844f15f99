"""Outputs of any task as distributions, and the checks of logits that are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfuse.loop.predictions import (
    check_alike,
    distributions,
    flat_distributions,
    is_multilabel,
    mean_where,
    present_only,
)


def test_a_place_or_an_output_is_a_distribution() -> None:
    z = torch.randn(2, 5, 3, 4)
    found = distributions(z).softmax(2)
    for b, i, j in ((0, 0, 0), (1, 2, 3)):
        torch.testing.assert_close(found[b, 4 * i + j], z[b, :, i, j].softmax(0))
    yes = distributions(z, multilabel=True).softmax(2)[..., 0]
    torch.testing.assert_close(yes, z.flatten(1).sigmoid())
    single = distributions(z[:, 0, 0, 0], multilabel=True)
    torch.testing.assert_close(single.softmax(2)[:, 0, 0], z[:, 0, 0, 0].sigmoid())


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 2, 2)])
@pytest.mark.parametrize("multilabel", [False, True])
def test_flat_ones_are_the_same_row_by_row(shape: tuple[int, ...], multilabel: bool) -> None:
    z = torch.randn(shape)
    each = distributions(z, multilabel)
    assert torch.equal(flat_distributions(z, multilabel), each.flatten(0, 1))
    assert len(each) == 6 and each.shape[2] == (2 if multilabel else 4)


def test_logits_of_classes_are_not_copied() -> None:
    z = torch.randn(6, 4)
    assert flat_distributions(z) is z


def test_what_is_missing_is_0_and_gets_no_gradient() -> None:
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]], requires_grad=True)
    (found,) = present_only([x], torch.tensor([[False, True]]))
    assert found.tolist() == [[0, 0], [torch.inf, 2]]
    found.sum().backward()
    assert x.grad.tolist() == [[0, 0], [1, 1]]


def test_means_of_what_counts() -> None:
    values = torch.tensor([[1.0, 5.0, torch.nan], [torch.nan] * 3])
    counted = torch.tensor([[True, True, False], [False] * 3])
    assert mean_where(values, counted).tolist() == [3, 0]


def test_which_criterion_says_yes_or_no() -> None:
    assert is_multilabel(nn.BCEWithLogitsLoss())
    assert not is_multilabel(nn.CrossEntropyLoss()) and not is_multilabel(None)


Z = torch.zeros(3, 4)
WRONG: dict[str, tuple[list[Any], dict[str, Any], type[Exception], str]] = {
    "dtype": ([Z, Z.long()], {}, TypeError, r"logits\['b'\] must be a floating-point .*int64"),
    "no tensor": (
        [Z, 1],
        {},
        TypeError,
        r"logits\['b'\] must be a floating-point .* not a tensor but int",
    ),
    "vector": ([Z[:, 0]] * 2, {}, ValueError, r"logits\['a'\] must be \[B, C\] or .* got \[3\]"),
    "shape": ([Z, Z[:, :3]], {}, ValueError, r"like logits\['a'\] \[3, 4\], got \[3, 3\]"),
    "one class": ([Z[:, :1]] * 2, {}, ValueError, r"one class; .*criterion=nn.BCEWithLogitsLoss"),
    "rows": ([Z, Z], {"rows": 2}, ValueError, r"must have 2 rows, as features, got \[3, 4\]"),
    "device": ([Z, Z.to("meta")], {}, ValueError, r"logits\['b'\] is on meta, logits\['a'\] on"),
    "number": ([Z[0, 0]] * 2, {"multilabel": True}, ValueError, r"must be \[B\], .* got \[\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_logits_that_cannot_be_compared_are_named(name: str) -> None:
    logits, options, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        check_alike(["a", "b"], logits, **options)


@pytest.mark.parametrize(
    ("z", "multilabel"), [(Z, False), (Z[:, :, None], False), (Z[:, 0], True), (Z[:, :1], True)]
)
def test_those_that_can_pass(z: Tensor, multilabel: bool) -> None:
    check_alike(["a", "b"], [z, z.half()], multilabel, rows=3)


def test_a_single_class_passes_where_nothing_is_compared() -> None:
    check_alike(["a", "b"], [Z[:, :1]] * 2, compared=False)
