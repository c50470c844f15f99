"""grad_stats: everything the methods need to know about a list of gradients, in one read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._eager import Eager
from ._lists import read_lists
from ._registry import Op
from ._tensors import by_device, check_list, check_pairs, index_tensor, kernel_layout


class GradStats(NamedTuple):
    """Statistics of T tensors, each field [T].

    Attributes:
        numel: int64, number of elements n.
        mean: Mean of g; 0 for an empty tensor.
        m2: Σ(g − mean)².
        dot: ⟨w − w₀, g⟩, or ⟨w, g⟩ without anchors; None when no params were given.
        disp_sq: ‖w − w₀‖², or ‖w‖² without anchors; None when no params were given.
    """

    numel: Tensor
    mean: Tensor
    m2: Tensor
    dot: Tensor | None = None
    disp_sq: Tensor | None = None

    @property
    def std(self) -> Tensor:
        """Unbiased standard deviation, √(m2 / (n − 1)); 0 where n < 2."""
        return (self.m2 / (self.numel - 1).clamp_(min=1)).sqrt_()

    @property
    def sq_norm(self) -> Tensor:
        """‖g‖² = m2 + n·mean²."""
        return self.m2 + self.mean * self.mean * self.numel

    def merge(self, other: GradStats) -> GradStats:
        """Statistics of each tensor's elements here and in `other` together, e.g. of two shards.

        Chan, Golub & LeVeque's pairwise update, so that nothing cancels.

        Raises:
            ValueError: one of the two has displacement statistics and the other has not.
        """
        numel = self.numel + other.numel
        share = other.numel / numel.clamp(min=1).to(self.mean.dtype)
        delta = other.mean - self.mean
        mean = self.mean + delta * share
        m2 = self.m2 + other.m2 + delta * delta * (self.numel * share)
        if self.dot is None or self.disp_sq is None:
            if other.dot is not None:
                raise ValueError("cannot merge statistics with and without params")
            return GradStats(numel, mean, m2)
        if other.dot is None or other.disp_sq is None:
            raise ValueError("cannot merge statistics with and without params")
        return GradStats(numel, mean, m2, self.dot + other.dot, self.disp_sq + other.disp_sq)


def _fake(
    grads: Sequence[Tensor], params: Sequence[Tensor], anchors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    wide = any(g.dtype == torch.float64 for g in grads)
    dtype = torch.float64 if wide else torch.float32
    count = len(grads)
    device = grads[0].device if grads else None
    numel = torch.empty(count, dtype=torch.int64, device=device)
    return numel, torch.empty(4 if params else 2, count, dtype=dtype, device=device)


_op = Op(
    "grad_stats",
    "(Tensor[] grads, Tensor[] params, Tensor[] anchors) -> (Tensor, Tensor)",
    _fake,
    table="(Tensor table, Tensor like, bool displaced) -> Tensor[]",
)


def grad_stats(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] | None = None,
    anchors: Sequence[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> GradStats:
    """Mean, centred second moment and, with params, displacement products of T gradients.

    One read of every tensor. The sums are formed blockwise and merged pairwise (Chan, Golub &
    LeVeque 1979), so that a large mean does not cancel the variance; they do not depend on the
    number of threads. Not differentiable: the results are constants.

    Equivalent to, for each tensor g with parameter w and anchor w₀::

        g.numel(), g.mean(), (g - g.mean()).square().sum(), ((w - w0) * g).sum(),
        (w - w0).square().sum()

    Without anchors w₀ is 0, and nothing is read for it. Of two gradients of the same tensors,
    `grad_stats(g1, g2)` gives ⟨g₂, g₁⟩ as `dot` and ‖g₂‖² as `disp_sq`, and ‖g₁‖² as `sq_norm`: the
    Gram matrix of MMPareto (Wei & Hu, ICML 2024).

    Args:
        grads: T tensors of any shapes; float16, bfloat16, float32 and float64 may be mixed.
        params: T tensors w, shaped like `grads`, e.g. second gradients; their dtype may differ.
        anchors: T tensors w₀, shaped like `grads`; their dtype may differ, e.g. bfloat16 snapshots.
            They need params. None for 0.
        backend: Name of a backend; None for the best one.

    Returns:
        `GradStats`. The moments are float64 if a gradient is, otherwise float32. Tensors with a NaN
        or an Inf have non-finite moments, and only they. With gradients on several devices the
        result is on the first one's.

    Raises:
        TypeError: a tensor is sparse, integer or complex.
        ValueError: params or anchors do not mirror grads, or anchors come without params.
    """
    eager = not torch.compiler.is_compiling()
    listed = read_lists(_op, backend, grads, params, anchors) if eager else None
    if listed is not None:
        with torch._C._AutoDispatchBelowAutograd():
            return GradStats(*listed.kernel(listed.table, grads[0], params is not None))
    check_list("grads", grads)
    params, anchors = check_pairs(grads, params, anchors)
    groups = by_device(grads)
    if len(groups) > 1:
        return _on_several_devices(groups, grads, params, anchors, backend)
    if not grads:  # without a tensor PyTorch's dispatcher has no device to choose
        return GradStats(torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0))
    device = grads[0].device
    layout = kernel_layout(grads, params, anchors, any_order=True)
    return stats_of_checked(backend, device, layout.grads, layout.params, layout.anchors)


def stats_of_checked(
    backend: str | None,
    device: torch.device,
    grads: list[Tensor],
    params: Sequence[Tensor] = (),
    anchors: Sequence[Tensor] = (),
    table: Tensor | None = None,
) -> GradStats:
    """`grad_stats` of tensors of floating dtypes on one device, at least one.

    They are contiguous or in channels_last, params and anchors as their gradients are. `table` is
    what `mmfuse._native.read_gradients` has made of `grads`, and of params and anchors, which are
    then both given or neither.
    """
    kernel = None
    if table is not None and type(backend) is Eager:
        kernel = _op.of_table(backend, device)
    if kernel is not None:
        with torch._C._AutoDispatchBelowAutograd():
            return GradStats(*kernel(table, grads[0], bool(params)))
    numel, moments = _op(backend, device, grads, params, anchors)
    return GradStats(numel, *moments.unbind(0))


def _on_several_devices(
    groups: dict[torch.device, list[int]],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    backend: str | None,
) -> GradStats:
    home = next(iter(groups))
    parts, order = [], []
    for index in groups.values():
        pick = [[row[i] for i in index] if row else None for row in (grads, params, anchors)]
        parts.append(grad_stats(pick[0] or [], pick[1], pick[2], backend=backend))
        order += index
    places = sorted(range(len(order)), key=order.__getitem__)
    back = index_tensor(tuple(places), home)
    columns = []
    for fields in zip(*parts, strict=True):
        present = [f for f in fields if f is not None]
        together = torch.cat([f.to(home) for f in present]) if present else None
        columns.append(None if together is None else together.index_select(0, back))
    numel, mean, m2, dot, disp_sq = columns
    assert numel is not None and mean is not None and m2 is not None
    return GradStats(numel, mean, m2, dot, disp_sq)
