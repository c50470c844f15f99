"""A network, its optimizer and a batch: what whole training steps are measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor

from mmfuse import NoiseStream

from .inputs import SEED, Inputs
from .networks import AudioVisual
from .workloads import Workload

#: RedReg drops a modality with this probability in the first epoch.
DROP = 0.6


class TrainingInputs(Inputs):
    """A network of two encoders within an epoch, its optimizer, and a batch.

    `start` are the parameters as they were when the epoch began.
    """

    def __init__(
        self,
        workload: Workload,
        dtype: torch.dtype,
        device: torch.device,
        *,
        network: Callable[[int, int], AudioVisual],
    ) -> None:
        super().__init__(workload, dtype, device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(SEED)
            self.model = network(workload.width, workload.classes).to(device, dtype)
        rows = workload.batch
        self.audio = self._randn((rows, 1, *(workload.audio_shape or workload.shape)), 1.0)
        frames = (workload.frames,) if workload.frames > 1 else ()
        # Images lie in [0, 1], to which the released monitor clamps its views.
        self.visual = self._randn((rows, *frames, 3, *workload.shape), 1.0).sigmoid()
        self.labels = torch.randint(
            workload.classes, (rows,), generator=self._generator, device=device
        )
        self._seed: int | None = None
        self.optimizer = new_optimizer(self.model)
        self.parameters = list(self.model.parameters())
        self.start = [p.detach() + self._randn(p.shape, 1e-3) for p in self.parameters]
        self.pristine = {key: value.clone() for key, value in self.model.state_dict().items()}
        for p in self.parameters:
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.stream = NoiseStream(SEED, device)
        self.state = self.stream.state.clone()
        self.restore()

    @torch.no_grad()
    def restore(self, *, replaced: bool = False) -> None:
        """Puts network, optimizer and both random states back; a step leaves no gradient."""
        self.model.load_state_dict(self.pristine)
        for p in self.parameters:
            p.grad = None
            self.optimizer.state[p]["momentum_buffer"].zero_()
        self.stream.state.copy_(self.state)
        self.seed()

    def seed(self) -> None:
        """Sets PyTorch's random state: not to what the data is from, and RedReg drops nothing.

        A dropped input's feature is zero here, which shuts the gate: nothing would be regulated.
        """
        seeds = count(SEED + 1) if self._seed is None else (self._seed,)
        for self._seed in seeds:
            torch.manual_seed(self._seed)
            if self.uniform() >= DROP:
                break
        torch.manual_seed(self._seed)

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """The network as it was when the epoch began, for what a method copies then."""
        now = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.start)
            yield
            torch._foreach_copy_(self.parameters, now)

    def uniform(self) -> Tensor:
        """The number that decides which modality RedReg drops, from PyTorch's generator."""
        return torch.rand((), device=self.device)


def new_optimizer(model: AudioVisual) -> torch.optim.SGD:
    """The optimizer as both releases make it."""
    return torch.optim.SGD(model.parameters(), lr=2e-3, momentum=0.9, weight_decay=1e-4)
