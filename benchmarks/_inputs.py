"""Random tensors for a workload, the same for every provider."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, reduce
from itertools import count
from typing import Any

import torch
from _networks import AudioVisual
from _workloads import Workload
from torch import Tensor

from mmfuse import NoiseStream
from mmfuse.ops import GradStats
from mmfuse.reference import grad_stats as reference_stats

ALPHA = 0.8
# Different from one, so that no provider can skip a tensor and the stated bytes are moved.
COEFFICIENTS = (0.75, 0.875)
PULL = 0.0625
BETA = 0.25
# Of the two features that are compared, on average: above the gate's threshold, and below one.
COSINE = 0.5
AGREEMENT = 0.2
# OPM's probability of a modality that is just ahead, and how much it rises.
Q_BASE, LAMBDA = 0.5, 0.5
# In a drop on its own; the modality that is behind loses nothing.
DROP_PROBABILITIES = (0.5, 0.0)
# RedReg's noise, and the length of its training run.
SIGMA = 0.03
EPOCHS = 80
# With which probability it drops a modality in the first epoch.
DROP = 0.6
SEED = 20220614
_EXACT_PIECE = 2**24
# Elements over which a float32 norm on the CPU is still right to four digits.
_NORM_PIECE = 2**22


class Inputs:
    """What a case hands to its providers.

    Attributes:
        workload: Where the sizes come from.
        dtype: Of the data.
        device: Of the data.
        nbytes: Bytes of one operand, e.g. of all gradients.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        self.workload = workload
        self.dtype = dtype
        self.device = device
        self.nbytes = 0
        self._cache: dict[object, Any] = {}
        self._generator = torch.Generator(device).manual_seed(SEED)

    def restore(self, *, replaced: bool = False) -> None:
        """Undoes what a call has changed; not timed.

        Args:
            replaced: The provider replaces gradients instead of updating them in place.
        """

    def cached(self, key: object, make: Callable[[], Any]) -> Any:
        """What a provider makes once for a training run, outside the timed region."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def _randn(self, shape: tuple[int, ...], std: float) -> Tensor:
        kwargs = {"generator": self._generator, "device": self.device}
        return torch.randn(shape, **kwargs).mul_(std).to(self.dtype)


class LogitsInputs(Inputs):
    """Logits in which the first modality is ahead, and labels."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.classes)
        self.labels = torch.randint(
            workload.classes, shape[:1], generator=self._generator, device=device
        )
        self.logits = [self._randn(shape, 1.0) for _ in range(workload.modalities)]
        self.logits[0] += 2 * torch.nn.functional.one_hot(self.labels, workload.classes).to(dtype)
        self.nbytes = sum(z.nbytes for z in self.logits)


class ScoresInputs(Inputs):
    """Scores of M modalities; always float32, as modality_scores returns them."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, torch.float32, device)
        self.scores = torch.linspace(0.6, 0.3, workload.modalities, device=device)
        self.nbytes = self.scores.nbytes


class FeatureInputs(Inputs):
    """A feature, the gradient that reaches it, and its encoder's coefficient."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.width)
        self.feature = self._randn(shape, 1.0).requires_grad_()
        self.grad_output = self._randn(shape, 1.0)
        self.coefficient = torch.tensor(COEFFICIENTS[0], device=device)
        self.nbytes = self.feature.nbytes


class DropInputs(Inputs):
    """Features of two modalities, of which the first loses samples, and what reaches them."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.width)
        self.features = [self._randn(shape, 1.0).requires_grad_() for _ in DROP_PROBABILITIES]
        self.grad_outputs = [self._randn(shape, 1.0) for _ in self.features]
        self.q = torch.tensor(DROP_PROBABILITIES, device=device)
        self.stream = NoiseStream(SEED, device)
        self.nbytes = sum(feature.nbytes for feature in self.features)


class PairInputs(Inputs):
    """Features of two modalities whose rows have `COSINE` with each other, and the gate's limit."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.width)
        a, other = (self._randn(shape, 1.0) for _ in range(2))
        b = COSINE * a + (1 - COSINE**2) ** 0.5 * other
        self.features = [feature.requires_grad_() for feature in (a, b)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.threshold = torch.tensor(AGREEMENT, dtype=wide, device=device)
        self.nbytes = sum(feature.nbytes for feature in self.features)


class ViewInputs(Inputs):
    """An input of an encoder, and the stream for its two views."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        self.x = self._randn(workload.shape, 1.0)
        self.stream = NoiseStream(SEED, device)
        self.nbytes = self.x.nbytes


class MapInputs(Inputs):
    """Representations of two views, and the mean square of the views' difference."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        self.z1 = self._randn(workload.shape, 1.0)
        self.z2 = self.z1 + self._randn(workload.shape, 0.1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.input_sq = torch.tensor(2 * SIGMA**2, dtype=wide, device=device)
        self.nbytes = self.z1.nbytes + self.z2.nbytes


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
    """As both releases make it."""
    return torch.optim.SGD(model.parameters(), lr=2e-3, momentum=0.9, weight_decay=1e-4)


def in_format(tensor: Tensor, channels_last: bool) -> Tensor:
    """In the memory format that `.to(memory_format=...)` gives a network's parameters."""
    if channels_last and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def in_memory(tensor: Tensor) -> Tensor:
    """A flat view of a dense tensor's memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


class GradientInputs(Inputs):
    """Parameters of all encoders with their gradients, and the vectors that say what to do.

    `grads` are the buffers that providers update in place; `official` puts new tensors in the
    parameters' `.grad`. `results` finds both. `flat_grads` and the like hold the elements as they
    lie in memory; `pieces` are views that cut large gradients.
    """

    def __init__(
        self,
        workload: Workload,
        dtype: torch.dtype,
        device: torch.device,
        *,
        select: str = "all",
        anchored: bool = False,
    ) -> None:
        super().__init__(workload, dtype, device)
        encoders = [
            [shape for shape in shapes if select == "all" or len(shape) == 4]
            for shapes in workload.encoders
        ]
        self._counts = [len(shapes) for shapes in encoders]
        self.modality = [m for m, count in enumerate(self._counts) for _ in range(count)]
        shapes = [shape for encoder in encoders for shape in encoder]
        # Every tensor has its own spread, so that a mixed-up index shows.
        spreads = [1e-3 * (1 + t % 7) for t in range(len(shapes))]
        last = workload.channels_last
        self.pristine = [
            in_format(self._randn(s, std), last) for s, std in zip(shapes, spreads, strict=True)
        ]
        self.grads = [torch.empty_like(g) for g in self.pristine]
        # Weights are written only where a case reads them; else their pages cost no memory.
        self.params = [
            in_format(self._randn(g.shape, 0.02), last) if anchored else torch.empty_like(g)
            for g in self.pristine
        ]
        self.anchors = [
            p + in_format(self._randn(p.shape, 1e-3), last) for p in self.params if anchored
        ]
        for p in self.params:
            p.requires_grad_()
        self.encoder_params = self.by_encoder(self.params)
        self.encoder_grads = self.by_encoder(self.grads)
        self.flat_grads, self.flat_params, self.flat_anchors = (
            [in_memory(t) for t in row] for row in (self.grads, self.params, self.anchors)
        )
        cut = [(t, piece) for t, g in enumerate(self.flat_grads) for piece in g.split(_NORM_PIECE)]
        self.pieces = [piece for _, piece in cut]
        self.piece_owner = torch.tensor([t for t, _ in cut], device=device)
        self.nbytes = sum(g.nbytes for g in self.pristine)
        self.ahead_nbytes = sum(g.nbytes for g in self.encoder_grads[0])

        # Coefficients are float32 for every dtype up to float32, as mmfuse and AMP have them.
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.modality_index = torch.tensor(self.modality, device=device)
        self.numel = torch.tensor([g.numel() for g in self.grads], dtype=self.wide, device=device)
        self.coefficients = torch.tensor(
            COEFFICIENTS[: len(encoders)], dtype=self.wide, device=device
        )
        self.scale = self.coefficients[self.modality_index]
        self.ones = torch.ones_like(self.scale)
        self.noise_std_host = spreads
        self.noise_std = torch.tensor(spreads, dtype=self.wide, device=device)
        self.pull_by_encoder = torch.full_like(self.coefficients, PULL)
        self.pull = self.pull_by_encoder[self.modality_index]
        self.beta = torch.tensor(BETA, dtype=self.wide, device=device)
        # A loss is computed in float32 under mixed precision, so the logits are float32 too.
        self.head = LogitsInputs(workload, self.wide, device)
        self.stream = NoiseStream(SEED, device)
        self.state = self.stream.state.clone()
        self.restore()

    @torch.no_grad()
    def restore(self, *, replaced: bool = False) -> None:
        """Puts the gradients and the noise stream back; noise would grow with every call.

        A provider that replaces gradients gets some that nobody else holds, so that replacing one
        frees its memory, as it does in training.
        """
        if not replaced:
            torch._foreach_copy_(self.grads, self.pristine)
        for p, grad, pristine in zip(self.params, self.grads, self.pristine, strict=True):
            p.grad = pristine.clone() if replaced else grad
        self.stream.state.copy_(self.state)

    def by_encoder(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        """Splits a list over all parameters into one list per encoder."""
        rest = iter(tensors)
        return [[next(rest) for _ in range(count)] for count in self._counts]

    def results(self) -> list[Tensor]:
        """The gradients as a provider has left them."""
        return [p.grad for p in self.params]

    @cached_property
    def exact_stats(self) -> GradStats:
        """The reference's grad_stats in float64, in pieces that bound the memory."""
        rows = [self.pristine]
        if self.anchors:
            rows += [[p.detach() for p in self.params], self.anchors]
        totals = []
        for tensors in zip(*rows, strict=True):
            parts = []
            for piece in zip(*(t.flatten().split(_EXACT_PIECE) for t in tensors), strict=True):
                grad, *displaced = ([x.double()] for x in piece)
                numel, moments = reference_stats.grad_stats(grad, *(displaced or ([], [])))
                parts.append(GradStats(numel, *moments.unbind()))
            totals.append(reduce(GradStats.merge, parts))
        fields = [column for column in zip(*totals, strict=True) if column[0] is not None]
        return GradStats(*map(torch.cat, fields))
