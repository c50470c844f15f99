"""InfoReg: Fisher trace and pull, and a whole training step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from engine import eager, sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import STATS_TOLERANCE, check_update, close
from engine.gradients import PULL, GradientInputs
from engine.networks import AudioVisual
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, take_step
from engine.training_gate import Pass, joint_forward, pulled_step, split_logits, true_class
from torch import Tensor
from torch.nn import functional as F

import mmfuse
from mmfuse import ops
from mmfuse.reference import update_grads as reference_update

from .update_grads import released_pull


@compiled(dynamic=True)
def _pull_with_trace(
    grad: Tensor, param: Tensor, anchor: Tensor, one: Tensor, weight: Tensor
) -> Tensor:
    square = torch.empty_like(one)
    reference_update.update_grads_(
        [grad], one, [param], [anchor], weight, None, None, [], [], None, square
    )
    return square


def check_traces(i: GradientInputs, result: Tensor | Sequence[Tensor | None], pull: float) -> None:
    """Compares ‖g + pull (w − w₀)‖², or sums of the squares where elements are kept."""
    stats = i.exact_stats
    want = stats.sq_norm + 2 * pull * stats.dot + pull**2 * stats.disp_sq
    if isinstance(result, Tensor):
        kept = range(len(want))
        got = result.double()
    else:
        kept = [t for t, squares in enumerate(result) if squares is not None]
        got = torch.stack([result[t].double().sum() for t in kept]) if kept else want[:0]
    tolerance = STATS_TOLERANCE + 2 * torch.finfo(i.dtype).eps
    close("Fisher traces", got, want[list(kept)], tolerance)


@register
class TraceAndPull(Case):
    """The squares come with the update's read."""

    name = "inforeg"
    title = "InfoReg: Fisher trace, update_grads_"
    kind = "gradients"
    ops = ("update_grads_",)
    passes = 4
    main = True
    make = staticmethod(partial(GradientInputs, anchored=True))

    def check(
        self, provider: str, i: GradientInputs, result: Tensor | Sequence[Tensor | None]
    ) -> None:
        check_update(provider, i, scale=i.ones, pull=i.pull)
        # The released code takes the trace of what the pull has left.
        check_traces(i, result, PULL if provider == "official" else 0.0)

    def official(self, i: GradientInputs) -> list[Tensor | None]:
        released_pull(i)
        # By their shapes these are the weights of convolutional and linear layers.
        weights = [p for p in i.params if p.dim() in (2, 4)]
        whole, encoder = i.cached(
            "Fisher", lambda: [[torch.zeros_like(w) for w in weights] for _ in range(2)]
        )
        for sums in (whole, encoder):
            for total, w in zip(sums, weights, strict=True):
                sequences.inforeg.accumulate_squares(total, w.grad)
        own = iter(encoder)
        return [next(own) if p.dim() in (2, 4) else None for p in i.params]

    def foreach(self, i: GradientInputs) -> Tensor:
        squares = eager.squares(i)
        eager.add_displacement(i)
        return squares

    def compile(self, i: GradientInputs) -> Tensor:
        vectors = (v.split(1) for v in (i.ones, i.pull))
        rows = zip(i.flat_grads, i.flat_params, i.flat_anchors, *vectors, strict=True)
        return torch.cat([_pull_with_trace(*row) for row in rows])

    def mmfuse(self, i: GradientInputs, backend: str) -> Tensor:
        squares = torch.empty(len(i.grads), dtype=torch.float64, device=i.device)
        ops.update_grads_(
            i.grads,
            i.ones,
            params=i.params,
            anchors=i.anchors,
            pull=i.pull,
            sq_norm=squares,
            backend=backend,
        )
        return squares


@register
class Training(TrainingCase):
    """A step of the first epoch."""

    name = "inforeg_training"
    title = "InfoReg: a whole training step"
    method = "InfoReg"
    ops = ("modality_scores", "grad_stats", "update_grads_")

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
            features, logits, _ = joint_forward(i)(model)
            return features, logits, sum(F.cross_entropy(z, i.labels) for z in logits)

        def strengths(seen: Pass) -> list[Tensor]:
            a, v = (true_class(z, i.labels).sum() for z in seen.logits[1:])
            return [
                torch.where(a > v, 0.95 * torch.exp(torch.tanh(a - v)), 0.0),
                torch.where(v > a, 0.1 * torch.exp(torch.tanh(v - a)), 0.0),
            ]

        return pulled_step(i, forward, strengths if regulated else None)

    def plain(self, i: TrainingInputs) -> None:
        def losses(model: AudioVisual) -> Sequence[Tensor]:
            a, v, out = model(i.audio, i.visual)
            return [F.cross_entropy(z, i.labels) for z in (out, *split_logits(model, a, v))]

        take_step(i, losses)

    def official(self, i: TrainingInputs) -> None:
        def start() -> sequences.inforeg.Training:
            made = sequences.inforeg.Training(i.model, i.optimizer)
            with i.at_start():
                made.start_epoch()
            return made

        i.cached("official InfoReg", start).step(i.audio, i.visual, i.labels)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        def start() -> mmfuse.InfoReg:
            made = mmfuse.InfoReg.official(i.model.encoders, backend=backend)
            with i.at_start():
                made.set_epoch(0)
            return made

        method = i.cached(("InfoReg", backend), start)
        i.optimizer.zero_grad()
        a, v, out = i.model(i.audio, i.visual)
        logits = mmfuse.unimodal_logits(i.model.fc, {"audio": a, "visual": v})
        sum(F.cross_entropy(z, i.labels) for z in (out, *logits.values())).backward()
        method.step(logits, i.labels)
        i.optimizer.step()
