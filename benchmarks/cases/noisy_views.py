"""`noisy_views`: two noisy copies of an input from one read, for RedReg's monitor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import OWN_NOISE, STATS_TOLERANCE, UPDATE_TOLERANCE, check_noise, close
from engine.inputs import SEED, Inputs
from engine.windows import windows
from engine.workloads import Workload
from torch import Tensor
from torch.nn import functional as F

from mmfuse import NoiseStream, ops
from mmfuse.reference import noise as reference_noise

#: RedReg's.
SIGMA = 0.03

Views = tuple[Tensor, Tensor, Tensor]


class ViewInputs(Inputs):
    """An input of an encoder, and the stream for its two views."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        self.x = self._randn(workload.shape, 1.0)
        self.stream = NoiseStream(SEED, device)
        self.nbytes = self.x.nbytes


@compiled(dynamic=True)
def _view(x: Tensor, state: Tensor, index: int) -> Tensor:
    z = reference_noise.standard_normal(state, x.numel(), index).view(x.shape)
    return (x + SIGMA * z).to(x.dtype)


@compiled(dynamic=False)
def _distance(first: Tensor, second: Tensor) -> Tensor:
    return (first.float() - second.float()).square().mean()


@register
class NoisyViews(Case):
    """Both views and their distance."""

    name = "noisy_views"
    title = "RedReg: noisy_views"
    kind = "inputs"
    ops = ("noisy_views",)
    passes = 3
    noisy = True
    workloads = (
        Workload("images", "images 64×3×64×64", "inputs", shape=(64, 3, 64, 64)),
        Workload("spectrograms", "spectrograms 64×1×257×188", "inputs", shape=(64, 1, 257, 188)),
    )
    make = staticmethod(ViewInputs)

    def check(self, provider: str, i: ViewInputs, result: Sequence[Tensor]) -> None:
        """Compares windows of both views with the stream's noise, and the distance with theirs."""
        *views, input_sq = result
        wide = [view.double() for view in views]
        distance = (wide[0] - wide[1]).square().mean()
        tolerance = STATS_TOLERANCE + 2 * torch.finfo(i.dtype).eps
        close("distance of the views", input_sq, distance, tolerance)
        x = i.x.double().flatten()
        wide = [view.flatten() for view in wide]
        if provider in OWN_NOISE:
            sigma = torch.full((2,), SIGMA, dtype=torch.float64, device=i.device)
            check_noise(i, [x, x], wide, [x, x], sigma)
            z1, z2 = ((view - x) / SIGMA for view in wide)
            error = 6 / len(x) ** 0.5 + torch.finfo(i.dtype).eps
            relation = (z1 * z2).mean()
            close("noise of one view times the other's", relation, 0 * distance, 0.0, error)
            return
        tolerance = UPDATE_TOLERANCE[i.dtype]
        for index, view in enumerate(wide):
            for _, start, end in windows([len(x)]):
                z = reference_noise.standard_normal(i.stream.state, end - start, index, start)
                want = x[start:end] + SIGMA * z
                what = f"view {index}, elements {start} to {end}"
                close(what, view[start:end], want, tolerance, tolerance)

    def official(self, i: ViewInputs) -> Views:
        first, second = (sequences.redreg.noisy_view(i.x) for _ in range(2))
        return first, second, sequences.redreg.mean_square(first, second)

    def foreach(self, i: ViewInputs) -> Views:
        noise = torch.randn((2, *i.x.shape), dtype=i.dtype, device=i.device)
        first, second = torch.add(i.x, noise, alpha=SIGMA, out=noise).unbind()
        return first, second, F.mse_loss(first, second)

    def compile(self, i: ViewInputs) -> Views:
        first, second = (_view(i.x, i.stream.state, index) for index in range(2))
        return first, second, _distance(first, second)

    def mmfuse(self, i: ViewInputs, backend: str) -> Views:
        return ops.noisy_views(i.x, SIGMA, i.stream, backend=backend)
