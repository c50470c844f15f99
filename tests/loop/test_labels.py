"""Labels of every integer type count alike, in every part that reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from balancing import LOGITS_ONLY
from ranks import ranks
from torch import Tensor, nn

import mmfuse
from mmfuse import METHODS

#: Class 156 is −100 in uint8, which would mark a row to ignore.
CLASSES, HIGH = 200, 156
KINDS = [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.int64]


def batch(seed: int, label: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = {n: torch.randn(4, CLASSES, generator=generator) for n in ("audio", "visual")}
    return logits, torch.full((4,), label)


def decided(name: str, dtype: torch.dtype) -> list[float]:
    """The scores of a step of two micro-batches, the second of which is all of the high class."""
    torch.manual_seed(0)
    nets = {n: nn.Linear(3, 2) for n in ("audio", "visual")}
    method = METHODS[name](nets)
    method.set_epoch(0)
    for net in nets.values():
        for p in net.parameters():
            p.grad = torch.randn_like(p)
    for seed, label in ((1, 3), (2, HIGH)):
        logits, labels = batch(seed, label)
        method.observe(logits, labels.to(dtype))
    return method.step().scores.tolist()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("name", LOGITS_ONLY)
def test_micro_batches_are_weighed_alike(name: str, dtype: torch.dtype) -> None:
    assert decided(name, dtype) == decided(name, torch.int64)
    both = [
        mmfuse.ops.modality_scores(list(z.values()), y) for z, y in (batch(1, 3), batch(2, HIGH))
    ]
    if name == "OGM":
        mean = (both[0].prob + both[1].prob) / 2
        torch.testing.assert_close(torch.tensor(decided(name, dtype)), mean)


def test_rows_are_counted_as_they_are_scored() -> None:
    for labels, count in (
        (torch.tensor([HIGH, 2, HIGH], dtype=torch.uint8), 3),
        (torch.tensor([-100, 2], dtype=torch.int8), 1),
    ):
        z = torch.zeros(len(labels), HIGH + 1)
        assert mmfuse.ops.modality_scores([z], labels).count == count


def _of_rank(rank: int, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    logits, labels = batch(1 + rank, (3, HIGH)[rank])
    features = {n: z[:, :6].contiguous() for n, z in logits.items()}
    opm, arm = mmfuse.OPM(stream=mmfuse.NoiseStream(0)), mmfuse.ARM()
    fused, whole = features["audio"] + features["visual"], logits["audio"] + logits["visual"]
    out = opm(features, logits, labels.to(dtype))
    return (
        out.scores.tolist(),
        arm(features, fused, logits, whole, labels.to(dtype)).scores.tolist(),
    )


def test_ranks_are_weighed_alike() -> None:
    """Methods on features average their scores over the ranks in the forward pass."""
    expected: Any = ranks(2).run(_of_rank, torch.int64)
    assert expected[0] == expected[1]
    assert ranks(2).run(_of_rank, torch.uint8) == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16], ids=str)
def test_a_label_out_of_range_is_named(dtype: torch.dtype) -> None:
    logits = [torch.randn(2, 5)]
    with pytest.raises(ValueError, match=r"labels\[1\] = 156 is out of range for logits\[0\]"):
        mmfuse.ops.modality_scores(logits, torch.tensor([0, HIGH], dtype=dtype))


def test_contributions_of_samples() -> None:
    (logits, labels) = batch(1, HIGH)
    fused = logits["audio"] + logits["visual"]
    expected = mmfuse.sample_contributions(logits, fused, labels)
    found = mmfuse.sample_contributions(logits, fused, labels.to(torch.uint8))
    assert torch.equal(found, expected)
