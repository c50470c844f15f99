"""Modules that draw numbers for the samples that pass through them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..noise import NoiseStream
from ..ops._arguments import check_stream
from ..ops.drop_modalities import DroppedModalities, named_drop
from .epochs import EpochWindowModule
from .ranks import Group, agree, rank_and_size


class DrawingModule(EpochWindowModule):
    """A method in the forward pass with a random stream, whose state is a buffer.

    With ranks of one batch size B, sample i of rank r draws the number of sample r·B + i of the
    whole batch.

    Attributes:
        noise_state: Of the stream.
    """

    process_group: Group
    backend: str | None
    noise_state: Tensor

    def _begin_stream(self, stream: NoiseStream | None, name: str | None) -> None:
        """Registers the stream's state; None makes a stream from the class and the name."""
        # On the CPU also within `torch.device("meta")`, where it would not be known later.
        if stream is not None:
            check_stream(stream, on_meta=True)  # `_begin_at` says what to do with one there
        named = f"{type(self).__name__}/{name}"
        first = NoiseStream(device="cpu", name=named) if stream is None else stream
        self._begin_at("noise_state", first.state)
        if stream is None:
            self.noise_state = self.noise_state.to(self.epoch_state.device)

    def extra_repr(self) -> str:
        """The same of every module, and the random stream."""
        return f"{super().extra_repr()}, stream={NoiseStream.from_state(self.noise_state)}"

    def agreed_stream(self) -> NoiseStream:
        """The stream, the same on all ranks."""
        stream = NoiseStream.from_state(self.noise_state)
        stream.agreed = self._agreed
        agree(stream, self.process_group)
        self._agreed = stream.agreed
        return stream

    def first_row(self, rows: int) -> int:
        """The place of this rank's first sample in the whole batch."""
        return rank_and_size(self.process_group)[0] * rows

    def drop_features(
        self, names: Sequence[str], features: Sequence[Tensor], q: Tensor, scale: Tensor | None
    ) -> DroppedModalities:
        """Drops with probabilities q [M], and multiplies what is left by `scale`; one launch."""
        called = [f"features[{name!r}]" for name in names]
        first = self.first_row(features[0].shape[0])
        placed = self.agreed_stream().place(range(len(called)), [first] * len(called))
        return named_drop(called, features, q, placed, scale, self.backend)

    def _advance(self) -> None:
        """The next step draws other numbers."""
        self.noise_state[1].add_(1)
