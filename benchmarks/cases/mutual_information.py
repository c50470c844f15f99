"""`mutual_information` with NumPy's bins: of one pair of variables, and of many at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import close
from engine.inputs import COSINE, Inputs
from engine.workloads import Workload
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import joint_entropies as reference

# Results are float32; sums of entropies lose some digits where the information is small.
TOLERANCE = 1e-5


class ValueInputs(Inputs):
    """Two variables [P, N], normal with the correlation `COSINE`."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        x, other = (self._randn(workload.shape, 1.0) for _ in range(2))
        y = x.mul(COSINE).add_(other, alpha=(1 - COSINE**2) ** 0.5)
        self.x, self.y = (values.requires_grad_() for values in (x, y))
        self.bins = workload.bins
        self.nbytes = x.nbytes + y.nbytes


def bins_of(x: Tensor, bins: int) -> Tensor:
    """[P, N] int32 indices of NumPy's bins over each row's range, found by their edges."""
    x = x if x.dtype == torch.float64 else x.float()
    low, high = x.aminmax(dim=1, keepdim=True)
    inner = torch.arange(1, bins, dtype=x.dtype, device=x.device) * ((high - low) / bins) + low
    return torch.searchsorted(inner, x, right=True, out_int32=True)


def counts_of(*indices: Tensor, bins: int) -> Tensor:
    """[P, bins, …, bins] float64 counts; on a GPU `bincount` waits for its largest value."""
    problems = len(indices[0])
    cells = torch.arange(problems, dtype=torch.int32, device=indices[0].device).unsqueeze(1)
    for index in indices:
        cells = cells * bins + index
    shape = (problems, *[bins] * len(indices))
    return torch.bincount(cells.flatten(), minlength=math.prod(shape)).view(shape).double()


def entropy(p: Tensor, *others: int) -> Tensor:
    """[P] entropy of p [P, bins, …], summed over the other variables."""
    margin = p.sum(others) if others else p
    return torch.special.entr(margin).flatten(1).sum(1)


def exact_information(i: ValueInputs) -> list[Tensor]:
    """Numbers from the reference's counts; the bins are those of the values' own precision."""
    rows = [i.x.detach(), i.y.detach()]
    found, _ = reference.joint_entropies(rows, [0, 1], 2, i.bins)
    h_x, h_y, h_xy = found[0].unbind(-1)
    mi = h_x + h_y - h_xy
    return [mi, h_x, h_y, 2 * mi / (h_x + h_y)]


@compiled(dynamic=False)
def _shared(x: Tensor, y: Tensor, bins: int) -> tuple[Tensor, ...]:
    entropies, _ = reference.joint_entropies([x, y], [0, 1], 2, bins)
    h_x, h_y, h_xy = entropies[0].unbind(-1)
    mi = h_x + h_y - h_xy
    return mi, h_x, h_y, 2 * mi / (h_x + h_y)


@register
class Information(Case):
    """Many values; the released way is ARM's, in NumPy, whose memory is not PyTorch's."""

    name = "mutual_information"
    title = "mutual_information"
    kind = "pairs"
    ops = ("joint_entropies",)
    # The range has to be known before the first value is counted.
    passes = 2
    main = True
    workloads = (Workload("pairs_10m", "10⁷ pairs, 30 bins", "pairs", shape=(1, 10**7)),)
    make = staticmethod(ValueInputs)

    def check(self, provider: str, i: ValueInputs, result: Sequence[Any]) -> None:
        """Compares I, H(x), H(y) and 2·I/(H(x) + H(y)) of every problem."""
        want = i.cached("exact", lambda: exact_information(i))
        names = ("information", "entropy of x", "entropy of y", "normalised information")
        for name, got, exact in zip(names, result, want, strict=True):
            close(name, torch.as_tensor(got, device=i.device), exact, TOLERANCE, TOLERANCE)

    def official(self, i: ValueInputs) -> tuple[tuple[float, ...], ...]:
        # One problem after the other; the values are copied at once, which is kind.
        rows = (sequences.arm.host(values).reshape(values.shape) for values in (i.x, i.y))
        found = (sequences.arm.shared(x, y, i.bins) for x, y in zip(*rows, strict=True))
        return tuple(zip(*found, strict=True))

    def foreach(self, i: ValueInputs) -> tuple[Tensor, ...]:
        p = counts_of(bins_of(i.x, i.bins), bins_of(i.y, i.bins), bins=i.bins) / i.x.shape[1]
        h_x, h_y = entropy(p, 2), entropy(p, 1)
        mi = h_x + h_y - entropy(p)
        return mi, h_x, h_y, 2 * mi / (h_x + h_y)

    def compile(self, i: ValueInputs) -> tuple[Tensor, ...]:
        return _shared(i.x, i.y, i.bins)

    def mmfuse(self, i: ValueInputs, backend: str) -> tuple[Tensor, ...]:
        return ops.mutual_information(i.x, i.y, i.bins, backend=backend)


@register
class SampleInformation(Information):
    """Many small problems, which stay in a cache between both passes."""

    name = "sample_information"
    title = "mutual_information of each sample"
    kind = "samples"
    passes = 1
    main = False
    workloads = (
        Workload(
            "samples", "256 samples of 31 logits, 10 bins", "samples", shape=(256, 31), bins=10
        ),
    )
