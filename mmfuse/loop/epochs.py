"""EpochWindow: the epochs in which a method acts."""

from __future__ import annotations


class EpochWindow:
    """A mixin for methods that act from one epoch to another, both included."""

    starts: int
    ends: int | None
    epoch: int

    def _set_window(self, starts: int, ends: int | None) -> None:
        """Begins in epoch 0.

        Raises:
            ValueError: `ends` is before `starts`.
        """
        if ends is not None and ends < starts:
            raise ValueError(f"ends={ends} is before starts={starts}")
        self.starts = starts
        self.ends = ends
        self.epoch = 0

    @property
    def modulating(self) -> bool:
        """Whether the current epoch lies between `starts` and `ends`, both included."""
        return self.starts <= self.epoch and (self.ends is None or self.epoch <= self.ends)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, counted from 0."""
        self.epoch = epoch
