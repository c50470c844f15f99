"""Parameters of encoders with their gradients: what updates are measured on."""

from __future__ import annotations

from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from mmfuse import NoiseStream
from mmfuse.ops import GradStats
from mmfuse.reference import grad_stats as reference_stats

from .inputs import SEED, Inputs, LogitsInputs, wide_of
from .workloads import Workload

#: Different from one, so that no provider can skip a tensor and the stated bytes are moved.
COEFFICIENTS = (0.75, 0.875)
PULL = 0.0625
BETA = 0.25
_EXACT_PIECE = 2**24
#: Elements over which a float32 norm on the CPU is still right to four digits.
NORM_PIECE = 2**22


def in_format(tensor: Tensor, channels_last: bool) -> Tensor:
    """A tensor in the memory format that `.to(memory_format=...)` gives a network's parameters."""
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
        cut = [(t, piece) for t, g in enumerate(self.flat_grads) for piece in g.split(NORM_PIECE)]
        self.pieces = [piece for _, piece in cut]
        self.piece_owner = torch.tensor([t for t, _ in cut], device=device)
        self.nbytes = sum(g.nbytes for g in self.pristine)
        self.ahead_nbytes = sum(g.nbytes for g in self.encoder_grads[0])

        self.wide = wide_of(dtype)
        self.modality_index = torch.tensor(self.modality, device=device)
        self.sizes = torch.tensor([g.numel() for g in self.grads], device=device)
        self.numel = self.sizes.to(self.wide)
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


def taken_anew(method: Any) -> None:
    """Has a method take its gradients for those of a new backward pass."""
    guard = getattr(method.modalities, "guard", None)
    if guard is None:  # a commit of before there was one, in `make bench-compare`
        method.modalities.changed = None
    else:
        guard.marks = None
