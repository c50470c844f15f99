"""`drop_modalities`: OPM's drop of samples' features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import OWN_NOISE, close
from engine.inputs import SEED, Inputs
from engine.workloads import Workload
from torch import Tensor

from mmfuse import NoiseStream, ops
from mmfuse.reference import drop_modalities as reference
from mmfuse.reference import noise as reference_noise

#: The modality that is behind loses nothing.
PROBABILITIES = (0.5, 0.0)


class DropInputs(Inputs):
    """Features of two modalities, of which the first loses samples, and what reaches them."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.width)
        self.features = [self._randn(shape, 1.0).requires_grad_() for _ in PROBABILITIES]
        self.grad_outputs = [self._randn(shape, 1.0) for _ in self.features]
        self.q = torch.tensor(PROBABILITIES, device=device)
        self.stream = NoiseStream(SEED, device)
        self.nbytes = sum(feature.nbytes for feature in self.features)


def kept_samples(provider: str, out: Sequence[Tensor], q: Tensor, state: Tensor) -> Tensor:
    """[M, B], true where a sample has kept a modality: by the stream, or a share 1 − q of them."""
    batch = len(out[0])
    if provider not in OWN_NOISE:
        draws = [reference_noise.standard_uniform(state, batch, m) for m in range(len(out))]
        return torch.stack(draws) > q.unsqueeze(1)
    keep = torch.stack([(o.detach() != 0).any(dim=1) for o in out])
    for m, (kept, rate) in enumerate(zip(keep, q.tolist(), strict=True)):
        error = 6 * (rate * (1 - rate) / batch) ** 0.5
        what = f"share of samples without modality {m}"
        close(what, 1 - kept.double().mean(), q[m].double(), 0.0, error)
    return keep


@compiled(dynamic=False)
def _drop(features: list[Tensor], q: Tensor, state: Tensor) -> list[Tensor]:
    ids = list(range(len(features)))
    return reference.drop_modalities(features, q, state, ids, [0] * len(ids), None)[0]


@register
class Drop(Case):
    """Forward."""

    name = "drop_modalities"
    title = "OPM: drop_modalities"
    kind = "features"
    ops = ("drop_modalities",)
    passes = 2
    noisy = True
    make = staticmethod(DropInputs)

    def floor_bytes(self, inputs: DropInputs) -> int:
        """Dropped rows are written, and need no read: of a pass's bytes a read is half."""
        rows = zip(inputs.features, PROBABILITIES, strict=True)
        moved = sum(feature.nbytes * (2 - q) for feature, q in rows)
        return round(self.passes / 2 * moved)

    def check(self, provider: str, i: DropInputs, result: Sequence[Tensor]) -> None:
        """Compares who lost a modality, what is left, and the gradients if there are any."""
        count = len(i.features)
        out, grads = result[:count], result[count:]
        keep = kept_samples(provider, out, i.q, i.stream.state)
        # The released code divides by what modalities of one width keep on average.
        scale = 1 / (1 - float(i.q.mean())) if provider == "official" else 1.0
        pairs = [("feature", out, i.features)]
        if grads:
            pairs.append(("gradient", grads, i.grad_outputs))
        for what, got, before in pairs:
            for m in range(count):
                want = scale * keep[m].unsqueeze(1) * before[m].detach().double()
                close(f"{what} {m}", got[m], want, 2 * torch.finfo(i.dtype).eps)

    def official(self, i: DropInputs) -> Sequence[Tensor]:
        return sequences.opm.drop(i.features, i.q).features

    def foreach(self, i: DropInputs) -> Sequence[Tensor]:
        shape = (len(i.features), i.workload.batch, 1)
        keep = torch.rand(shape, device=i.device) > i.q.view(-1, 1, 1)
        return [feature * kept for feature, kept in zip(i.features, keep, strict=True)]

    def compile(self, i: DropInputs) -> Sequence[Tensor]:
        return _drop(i.features, i.q, i.stream.state)

    def mmfuse(self, i: DropInputs, backend: str) -> Sequence[Tensor]:
        return ops.drop_modalities(i.features, i.q, i.stream, backend=backend).features


@register
class DropGradients(Drop):
    """Forward and backward."""

    name = "drop_modalities_grad"
    title = "drop_modalities: forward and backward"
    ops = ("drop_modalities", "drop_modalities_backward")
    passes = 4
    autograd = True

    def _with_gradients(self, i: DropInputs, out: Sequence[Tensor]) -> Sequence[Tensor]:
        return *out, *torch.autograd.grad(out, i.features, i.grad_outputs)

    def official(self, i: DropInputs) -> Sequence[Tensor]:
        return self._with_gradients(i, super().official(i))

    def foreach(self, i: DropInputs) -> Sequence[Tensor]:
        return self._with_gradients(i, super().foreach(i))

    def compile(self, i: DropInputs) -> Sequence[Tensor]:
        return self._with_gradients(i, super().compile(i))

    def mmfuse(self, i: DropInputs, backend: str) -> Sequence[Tensor]:
        return self._with_gradients(i, super().mmfuse(i, backend))
