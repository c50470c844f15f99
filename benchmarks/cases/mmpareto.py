"""MMPareto: its own part of a step, and a whole training step."""

from __future__ import annotations

from typing import Any

import torch
from engine import eager, sequences
from engine.case import Case, register
from engine.gate import UPDATE_TOLERANCE, check_windows
from engine.gradients import GradientInputs, in_memory, taken_anew
from engine.networks import AudioVisual, ThreeHeads
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, own_heads_step
from engine.training_gate import backward, modality_of, stepped
from engine.windows import windows
from engine.workloads import Workload
from torch import Tensor
from torch.nn import functional as F

import mmfuse
from mmfuse.loop.stage import take_step
from mmfuse.ops._eager import Eager

#: How much longer the combined gradient is made.
GAMMA = 1.5


def _combined(joint: list[Tensor], unimodal: list[Tensor]) -> list[Tensor]:
    """One encoder's gradients by the released rule."""

    def product(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return sum((a * b).sum() for a, b in zip(x, y, strict=True))

    between = product(joint, unimodal)
    n1, n2 = product(joint, joint), product(unimodal, unimodal)
    if between > 0:
        first = torch.tensor(0.5)
    elif between >= n1:
        first = torch.tensor(0.999)
    elif between >= n2:
        first = torch.tensor(0.001)
    else:
        first = (n2 - between) / (n1 + n2 - 2 * between)
    out = []
    for g1, g2 in zip(joint, unimodal, strict=True):
        h = 2 * first * g1 + 2 * (1 - first) * g2
        ratio = (g1 + g2).norm() / h.norm()
        out.append(GAMMA * h * ratio if ratio > 1 else GAMMA * h)
    return out


class TwoGradients(GradientInputs):
    """The joint loss's gradients, in `grads`, and the unimodal ones, which partly disagree."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device, **k: Any):
        super().__init__(workload, dtype, device, **k)
        self.unimodal = [
            torch.empty_like(g).normal_(0, 5e-4, generator=self._generator).sub_(g)
            for g in self.pristine
        ]
        self.flat_unimodal = [in_memory(g) for g in self.unimodal]

    @torch.no_grad()
    def restore(self, *, replaced: bool = False) -> None:
        """The released code finds the gradients of all losses, as its fourth pass leaves them."""
        super().restore(replaced=replaced)
        if replaced:
            torch._foreach_add_([p.grad for p in self.params], self.unimodal)


@register
class Combination(Case):
    """Weights from both gradients' products, and the longer sum: all but the backward passes."""

    name = "mmpareto_step"
    title = "MMPareto: the combined gradient"
    kind = "gradients"
    ops = ("grad_stats", "update_grads_")
    passes = 5
    encoders = 2
    # The released solver adds up its products in the gradients' dtype.
    half = False
    make = staticmethod(TwoGradients)

    def check(self, provider: str, i: TwoGradients, result: object) -> None:
        places = windows([g.numel() for g in i.pristine])
        want = []
        for rows in zip(i.by_encoder(i.pristine), i.by_encoder(i.unimodal), strict=True):
            want += _combined(*([g.double() for g in row] for row in rows))
        want, got = (
            [tensors[t].detach().flatten()[start:end].double() for t, start, end in places]
            for tensors in (want, i.results())
        )
        # Two gradients that conflict add up to less than either, with the errors of both.
        check_windows(places, got, want, 2 * UPDATE_TOLERANCE[i.dtype])

    @torch.no_grad()
    def official(self, i: TwoGradients) -> None:
        rows = zip(
            i.encoder_params, i.by_encoder(i.pristine), i.by_encoder(i.unimodal), strict=True
        )
        for params, *lists in rows:
            joint, unimodal = (_kept(grads) for grads in lists)
            _, weights = sequences.mmpareto.weigh(joint, unimodal)
            for n, p in enumerate(params):
                sequences.mmpareto.combine(p, joint[str(n)], unimodal[str(n)], weights)

    def foreach(self, i: TwoGradients) -> None:
        # The sums nearly cancel: `_foreach_norm` is off by 6e-5 in float32, and slow in float64.
        joint_grads, unimodal = i.flat_grads, i.flat_unimodal
        between = eager.dots(i, joint_grads, unimodal)
        n1, n2 = (eager.dots(i, x, x) for x in (joint_grads, unimodal))
        sums = torch.zeros_like(i.coefficients)
        joint, both, other = (sums.index_add(0, i.modality_index, x) for x in (n1, between, n2))
        inner = (other - both) / (joint + other - 2 * both)
        k = torch.where(both >= joint, 0.999, torch.where(both >= other, 0.001, inner))
        k = torch.where(both > 0, 0.5, k)[i.modality_index]
        first, second = 2 * k, 2 - 2 * k
        combined = first.square() * n1 + 2 * first * second * between + second.square() * n2
        longer = GAMMA * ((n1 + 2 * between + n2) / combined).sqrt().clamp(min=1)
        scale, pull = ((longer * x).to(i.dtype).unbind() for x in (first, second))
        torch._foreach_mul_(i.grads, list(scale))
        torch._foreach_addcmul_(i.grads, i.unimodal, list(pull))

    @torch.no_grad()
    def mmfuse(self, i: TwoGradients, backend: str) -> None:
        method = i.cached(
            ("MMPareto", backend),
            lambda: mmfuse.MMPareto.official(
                dict(zip("av", i.encoder_params, strict=True)), gamma=GAMMA, backend=backend
            ),
        )
        taken_anew(method)
        take_step(method, Eager(backend), None, i.unimodal, None, None)


def _kept(grads: list[Tensor]) -> dict[str, Tensor]:
    """Copies, tensor by tensor and as one row, as the released code has them."""
    rows = {str(n): g.clone() for n, g in enumerate(grads)}
    return {**rows, "concat": torch.cat([row.flatten() for row in rows.values()])}


@register
class Training(TrainingCase):
    """Two backward passes, where the released step has four."""

    name = "mmpareto_training"
    title = "MMPareto: a whole training step"
    method = "MMPareto"
    network = ThreeHeads
    ops = ("grad_stats", "update_grads_")
    # Two gradients that conflict add up to less than either, with the errors of both.
    slack = 2.0

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        def gradients(*wanted: int) -> list[tuple[str, Tensor | None]]:
            def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
                a, v, out = model(i.audio, i.visual)
                logits = [out, model.head_audio(a), model.head_visual(v)]
                loss = sum(F.cross_entropy(logits[n], i.labels) for n in wanted)
                return [a, v], logits, loss

            return backward(i, forward).named_gradients()

        together = gradients(0, 1, 2)
        grads = [grad for _, grad in together]
        if regulated:
            joint, unimodal = gradients(0), gradients(1, 2)
            for modality in range(2):
                mine = [n for n, (name, _) in enumerate(together) if modality_of(name) == modality]
                rows = [[side[n][1] for n in mine] for side in (joint, unimodal)]
                for n, combined in zip(mine, _combined(*rows), strict=True):
                    grads[n] = combined
        return stepped(i, grads)

    def plain(self, i: TrainingInputs) -> None:
        own_heads_step(i)

    def official(self, i: TrainingInputs) -> None:
        def start() -> sequences.mmpareto.Training:
            made = sequences.mmpareto.Training(i.model, i.optimizer)
            made.start_epoch()
            return made

        i.cached("official MMPareto", start).step(i.audio, i.visual, i.labels)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        method = i.cached(
            ("MMPareto", backend),
            lambda: mmfuse.MMPareto.official(i.model.encoders, gamma=GAMMA, backend=backend),
        )
        i.optimizer.zero_grad()
        a, v, out = i.model(i.audio, i.visual)
        logits = {"audio": i.model.head_audio(a), "visual": i.model.head_visual(v)}
        losses = {name: F.cross_entropy(z, i.labels) for name, z in logits.items()}
        method.backward(F.cross_entropy(out, i.labels), unimodal_losses=losses)
        i.optimizer.step()
