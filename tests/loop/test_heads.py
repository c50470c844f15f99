"""Logits of each modality from a head that sees all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mmfuse


@pytest.mark.parametrize("bias", [True, False])
def test_linear_head_adds_up(bias: bool) -> None:
    head = nn.Linear(3 + 5 + 2, 4, bias=bias).double()
    features = {n: torch.randn(6, d).double() for n, d in (("a", 3), ("b", 5), ("c", 2))}
    logits = mmfuse.unimodal_logits(head, features)
    assert list(logits) == ["a", "b", "c"]
    torch.testing.assert_close(
        sum(logits.values()), head(torch.cat(list(features.values()), dim=1))
    )
    share = head.bias / 3 if bias else 0.0
    torch.testing.assert_close(logits["b"], features["b"] @ head.weight[:, 3:8].t() + share)


def test_other_heads_see_one_modality_at_a_time() -> None:
    head = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))
    features = {"a": torch.randn(6, 3), "b": torch.randn(6, 2)}
    logits = mmfuse.unimodal_logits(head, features)
    torch.testing.assert_close(
        logits["b"], head(torch.cat([torch.zeros(6, 3), features["b"]], dim=1))
    )


def test_head_errors() -> None:
    head = nn.Linear(5, 4)
    with pytest.raises(ValueError, match=r"takes 5 features, but \{'a': 3, 'b': 3\} add up to 6"):
        mmfuse.unimodal_logits(head, {"a": torch.ones(1, 3), "b": torch.ones(1, 3)})
    with pytest.raises(ValueError, match=r"features\['a'\] must be \[B, D\], got \[3\]"):
        mmfuse.unimodal_logits(head, {"a": torch.ones(3)})
    with pytest.raises(ValueError, match="at least one modality"):
        mmfuse.unimodal_logits(head, {})
