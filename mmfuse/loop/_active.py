"""The parameters that have something to modulate in a step, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import NoiseStream
from ..ops._tensors import index_tensor
from ..ops.grad_stats import GradStats, grad_stats
from .shards import Shard, merge_stats, runs


class Active(NamedTuple):
    """The parameters that have something to modulate in this step: this rank's parts of them."""

    params: list[Tensor]
    grads: list[Tensor]
    #: Each one's index in its method: its stream id.
    ids: list[int]
    #: Each one's modality.
    modality: tuple[int, ...]
    #: The place of each one's part; empty if no parameter is sharded.
    shards: list[Shard | None]
    #: The device of all gradients, if they are whole, and contiguous or in channels_last, so that
    #: kernels can have them as they are; else None.
    device: torch.device | None = None
    #: The dtype of the kernels' vectors for these gradients: float64 if one is, else float32.
    dtype: torch.dtype = torch.float32
    #: The gradients as the compiled kernels can read them, if they have been read so.
    table: Tensor | None = None
    #: True if the table has the parameters and their anchors too; each pair is alike then.
    paired: bool = False

    def stats(self, backend: str | None) -> GradStats:
        """Statistics of the gradients, of whole tensors."""
        return self.whole(grad_stats(self.grads, backend=backend))

    def whole(self, stats: GradStats) -> GradStats:
        """Statistics of the whole tensors from those of the parts."""
        return merge_stats(stats, self.shards) if self.shards else stats

    def cut(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The parts, cut so that each piece is contiguous in its flattened whole tensor."""
        if not self.shards:
            return list(parts)
        pairs = zip(parts, self.shards, strict=True)
        return [run.tensor for part, shard in pairs for run in runs(part, shard)]

    def place(self, stream: NoiseStream) -> NoiseStream:
        """The stream for the pieces that `cut` makes of the gradients."""
        if not self.shards:
            return stream.place(self.ids)
        ids, offsets = [], []
        for i, grad, shard in zip(self.ids, self.grads, self.shards, strict=True):
            for run in runs(grad, shard):
                ids.append(i)
                offsets.append(run.offset)
        return stream.place(ids, offsets)

    def spread(self, values: Tensor) -> Tensor:
        """Each tensor's value for all of its pieces."""
        if not self.shards:
            return values
        counts = [
            sum(1 for _ in runs(grad, shard))
            for grad, shard in zip(self.grads, self.shards, strict=True)
        ]
        index = tuple(t for t, count in enumerate(counts) for _ in range(count))
        return values.index_select(0, index_tensor(index, values.device))
