"""ContributionSampler: samples that contribute little are seen more often.

The re-sampling of the first release of ARM (Gao et al., AAAI 2025): a sample whose modalities'
mean contribution is small gets more copies in the training set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .._numbers import flag, real, whole
from ..noise import NoiseStream
from ..ops._arguments import check_near, check_sequence
from ..ops._tensors import check_dense

# A dataset that grows a thousandfold is a mistake, and its indices take the machine's memory.
_MOST_COPIES = 1000


class ContributionSampler(Sampler[int]):
    """Goes through a dataset with copies of the samples that contribute little.

    ::

        contributions = torch.cat([mmfuse.sample_contributions(...) for batch in loader])
        sampler = mmfuse.ContributionSampler(contributions)
        loader = DataLoader(dataset, batch_size=64, sampler=sampler)

    With several processes, let PyTorch share out the copies::

        copies = torch.utils.data.Subset(dataset, sampler.indices)
        loader = DataLoader(copies, batch_size=64, sampler=DistributedSampler(copies))

    Args:
        contributions: [N], or [N, M] whose mean over the modalities counts: one row for each sample
            of the dataset, in its order (see `mmfuse.sample_contributions`).
        thresholds: Ascending limits of the mean contribution. The first belongs to the interval
            above it, the others to the one below.
        copies: How many copies are added in each interval, one number more than thresholds.
        shuffle: A new order in each epoch, drawn from the noise stream; False for the dataset's.
        present: [N, M] bool, which modalities each sample has, for contributions [N, M]: the mean
            is that of these. A sample with fewer than two has nothing to balance, and no copies.
        seed: Of the order; None takes `torch.initial_seed()`. All orders follow from it and from
            `set_epoch`.

    Attributes:
        indices: The samples with their copies, as a list, in the order of the dataset.

    Raises:
        TypeError: the contributions are no real dense tensor, or `present` is no bool one.
        ValueError: the contributions are empty, of another shape, or not finite; thresholds and
            copies, or contributions and `present`, do not fit together; or a tensor is on the meta
            device, where it has no values.
    """

    indices: list[int]

    def __init__(
        self,
        contributions: Tensor,
        thresholds: Sequence[float] = (0.5, 0.9),
        copies: Sequence[int] = (3, 2, 1),
        *,
        shuffle: bool = True,
        present: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        if not isinstance(contributions, Tensor) or contributions.is_complex():
            kind = type(contributions).__name__
            raise TypeError(f"contributions must be a real tensor, got {kind}")
        if contributions.dim() not in (1, 2) or contributions.numel() == 0:
            raise ValueError(
                "contributions must be [N] or [N, M] and not empty, got "
                f"{list(contributions.shape)}"
            )
        _check_known("contributions", contributions)
        mean, lone = _means(contributions.detach().cpu().double(), present)
        if not mean.isfinite().all():
            i = int((~mean.isfinite()).nonzero()[0])
            raise ValueError(f"contributions[{i}] is not finite: {contributions[i].tolist()}")
        for name, value in (("thresholds", thresholds), ("copies", copies)):
            check_sequence(name, value, "numbers")
        thresholds = [real("thresholds", limit) for limit in thresholds]
        if len(copies) != len(thresholds) + 1 or not thresholds:
            raise ValueError(
                f"{len(thresholds)} thresholds need one number of copies more, got {len(copies)}"
            )
        if list(thresholds) != sorted(thresholds):
            raise ValueError(f"thresholds must ascend, got {tuple(thresholds)}")
        counts = [whole(f"copies[{i}]", n, 0, _MOST_COPIES) for i, n in enumerate(copies)]
        interval = (mean >= thresholds[0]).long()
        for threshold in thresholds[1:]:
            interval += mean > threshold
        repeats = 1 + torch.where(lone, 0, torch.tensor(counts)[interval])
        self.indices = torch.arange(len(mean)).repeat_interleave(repeats).tolist()
        self.shuffle: bool = flag("shuffle", shuffle)
        self.epoch: int = 0
        self._stream = NoiseStream(seed, name=type(self).__name__)

    def __repr__(self) -> str:
        samples = self.indices[-1] + 1
        return (
            f"{type(self).__name__}({samples:,} samples and {len(self) - samples:,} copies, "
            f"shuffle={self.shuffle}, epoch={self.epoch}, stream={self._stream})"
        )

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, counted from 0; without it every epoch has the same order."""
        self.epoch = whole("epoch", epoch, least=0)

    def __len__(self) -> int:
        """Samples and copies together."""
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        """The indices of one epoch."""
        if not self.shuffle:
            yield from self.indices
            return
        self._stream.state[1] = self.epoch
        keys = self._stream.uniform(len(self.indices))
        for i in keys.argsort(stable=True).tolist():
            yield self.indices[i]


def _means(contributions: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """[N] each sample's mean, 0 for one with fewer than two modalities; and which these are."""
    values = contributions.view(len(contributions), -1)
    if present is None:
        return values.mean(1), torch.zeros(len(values), dtype=torch.bool)
    if not isinstance(present, Tensor) or present.dtype is not torch.bool:
        kind = present.dtype if isinstance(present, Tensor) else type(present).__name__
        raise TypeError(f"present must be a bool tensor [N, M], got {kind}")
    _check_known("present", present)
    if contributions.dim() != 2 or present.shape != contributions.shape:
        raise ValueError(
            "present must be [N, M] as the contributions, "
            f"{list(contributions.shape)}, got {list(present.shape)}"
        )
    here = present.cpu()
    lone = here.sum(1) < 2
    mean = torch.where(here, values, 0.0).sum(1) / here.sum(1)
    return torch.where(lone, 0.0, mean), lone


def _check_known(name: str, value: Tensor) -> None:
    """Checks that a tensor's values can be looked at: it is dense, and not on the meta device."""
    check_dense(name, value)
    check_near(name, value, torch.device("cpu"))
