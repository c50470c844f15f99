"""Replays in which modalities take turns: in each, one encoder and the head have gradients."""

from __future__ import annotations

from trajectory import Replay

#: The parts of MLA's files that the replayed steps do not make; tests compare them by themselves.
ASIDE = {"projector.initial", "gating.logits", "gating.weights_two", "gating.weights_three"}
#: The elementwise division is by entries that come near to 0 (data/README.md).
TOLERANCE = {"mla_first": 1e-6, "mla_head": 1e-9}


class Turns(Replay):
    """A replay of batches whose `step` is called once for each modality."""

    def step(self) -> None:
        """The optimizer's step, of one turn."""
        moved = [(n, p) for n, p in self.model.named_parameters() if p.grad is not None]
        modalities = {n.split(".")[0] for n, _ in moved} - {"head"}
        turn = len(self.recorded["turn"]) % 2
        assert modalities == {("audio", "visual")[turn]}, "one encoder has gradients in a turn"
        self.record(turn=turn)
        for name, p in moved:
            self._compare_later(f"grad_after.{name}", p.grad, f"grad.{name}")
        self.optimizer.step()
        for name, p in moved:
            self._compare_later(f"param.{name}", p)
        self._stepped = len(self.recorded["turn"]) // 2
