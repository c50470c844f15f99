"""ContributionSampler: each sample's number, the order, and the process that sees it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from mmfuse import ContributionSampler

CONTRIBUTIONS = torch.tensor([0.2, 0.5, 0.7, 0.9, 0.91, -3.0])
REPEATS = {0: 4, 1: 3, 2: 3, 3: 3, 4: 2, 5: 4}


def test_copies_by_contribution() -> None:
    sampler = ContributionSampler(CONTRIBUTIONS)
    assert Counter(sampler.indices) == REPEATS
    assert sampler.indices == sorted(sampler.indices)
    assert Counter(sampler) == REPEATS
    assert len(sampler) == 19
    shown = repr(ContributionSampler(CONTRIBUTIONS, shuffle=False, seed=3))
    assert shown.startswith(
        "ContributionSampler(6 samples and 13 copies, shuffle=False, epoch=0, stream=NoiseStream("
    )


def test_the_mean_over_the_modalities_counts() -> None:
    both = torch.stack([CONTRIBUTIONS - 0.25, CONTRIBUTIONS + 0.25], dim=1).double()
    assert Counter(ContributionSampler(both.mean(1)).indices) == REPEATS
    assert Counter(ContributionSampler(torch.tensor([[0.0, 1.2], [1.0, 1.0]])).indices) == {
        0: 3,
        1: 2,
    }


def test_the_mean_is_over_the_modalities_that_a_sample_has() -> None:
    nan = torch.nan
    contributions = torch.tensor([[0.2, 0.4, 3.0], [0.2, 0.4, nan], [nan, 0.3, nan], [nan] * 3])
    present = torch.tensor(
        [[True, True, True], [True, True, False], [False, True, False], [False] * 3]
    )
    sampler = ContributionSampler(contributions, present=present)
    assert Counter(sampler.indices) == {0: 2, 1: 4, 2: 1, 3: 1}
    everybody = ContributionSampler(contributions[:1], present=present[:1])
    assert everybody.indices == ContributionSampler(contributions[:1]).indices
    with pytest.raises(ValueError, match=r"contributions\[1\] is not finite"):
        ContributionSampler(contributions, present=torch.ones_like(present))


@pytest.mark.parametrize(
    ("contributions", "present", "error", "message"),
    [
        (torch.ones(2, 2), torch.ones(2, 2), TypeError, r"present must be a bool tensor \[N, M\]"),
        (torch.ones(2, 2), torch.ones(2, 2).bool().to_sparse(), TypeError, "present must be dense"),
        (torch.ones(2, 2), torch.ones(2, 3) > 0, ValueError, r"\[2, 2\], got \[2, 3\]"),
        (torch.ones(2), torch.ones(2) > 0, ValueError, r"must be \[N, M\]"),
        (torch.ones(2, 2), torch.ones(2, 2, device="meta") > 0, ValueError, "present is on the me"),
        (torch.ones(2, 2, device="meta"), None, ValueError, "contributions is on the meta device"),
        (torch.ones(2, 2).to_sparse(), None, TypeError, "contributions must be dense"),
    ],
)
def test_what_cannot_be_read_is_named(
    contributions: torch.Tensor,
    present: torch.Tensor | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        ContributionSampler(contributions, present=present)


def test_other_thresholds_and_copies() -> None:
    sampler = ContributionSampler(CONTRIBUTIONS, thresholds=(0.0, 0.6, 0.8), copies=(5, 0, 1, 2))
    assert Counter(sampler.indices) == {0: 1, 1: 1, 2: 2, 3: 3, 4: 3, 5: 6}


def test_order_depends_on_seed_and_epoch_only() -> None:
    state = torch.get_rng_state()
    sampler = ContributionSampler(CONTRIBUTIONS, seed=4)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and sorted(second) == sorted(first)
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(ContributionSampler(CONTRIBUTIONS, seed=5)) != first
    assert list(ContributionSampler(CONTRIBUTIONS, seed=4)) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_every_order_is_about_as_likely() -> None:
    """How often each of five samples comes first in 1,000 epochs: chi squared."""
    sampler = ContributionSampler(torch.full((5,), 0.95), copies=(0, 0, 0), seed=1)
    first = Counter()
    for epoch in range(1000):
        sampler.set_epoch(epoch)
        first[next(iter(sampler))] += 1
    chi_squared = sum((first[i] - 200) ** 2 / 200 for i in range(5))
    assert chi_squared < 23.5  # 4 degrees of freedom, p = 1e-4


def test_without_shuffling_in_the_order_of_the_dataset() -> None:
    sampler = ContributionSampler(CONTRIBUTIONS, shuffle=False)
    assert list(sampler) == sampler.indices


def test_in_a_data_loader() -> None:
    dataset = TensorDataset(torch.arange(6))
    loader = DataLoader(dataset, batch_size=4, sampler=ContributionSampler(CONTRIBUTIONS, seed=2))
    seen = torch.cat([batch for (batch,) in loader]).tolist()
    assert Counter(seen) == REPEATS


def test_shared_out_between_processes() -> None:
    dataset = TensorDataset(torch.arange(6))
    copies = Subset(dataset, ContributionSampler(CONTRIBUTIONS).indices)
    seen: Counter[int] = Counter()
    for rank in range(2):
        share = DistributedSampler(copies, num_replicas=2, rank=rank, drop_last=False)
        for (batch,) in DataLoader(copies, batch_size=4, sampler=share):
            seen.update(batch.tolist())
    # 19 copies make 20 with the one that DistributedSampler repeats, so that shares are equal.
    assert sum(seen.values()) == 20
    assert sum((seen - Counter(REPEATS)).values()) == 1
    assert not Counter(REPEATS) - seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contributions": torch.empty(0)}, "not empty"),
        ({"contributions": torch.tensor(1.0)}, r"\[N\] or \[N, M\]"),
        ({"contributions": torch.tensor([0.1, torch.nan])}, r"contributions\[1\] is not finite"),
        ({"copies": (1, 2)}, "2 thresholds need one number of copies more, got 2"),
        ({"thresholds": (0.9, 0.5)}, "thresholds must ascend"),
        ({"thresholds": (), "copies": (1,)}, "0 thresholds"),
        ({"copies": (1, -1, 0)}, r"copies\[1\] must be at least 0, got -1"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContributionSampler(**{"contributions": CONTRIBUTIONS, **arguments})
