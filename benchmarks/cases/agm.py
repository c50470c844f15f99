"""AGM: its own part of a step, and a whole training step."""

from __future__ import annotations

import math

import torch
from engine import sequences
from engine.case import Case, register
from engine.gate import close
from engine.inputs import ALPHA, LogitsInputs
from engine.networks import AudioVisual
from engine.training import TrainingInputs
from engine.training_case import TrainingCase
from engine.training_gate import backward, stepped
from engine.workloads import Workload
from torch import Tensor
from torch.nn import functional as F

import mmfuse


class Responses(LogitsInputs):
    """Logits that a gradient goes through, and what reaches them."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        self.arriving = [self._randn(z.shape, 1.0) for z in self.logits]
        for z in self.logits:
            z.requires_grad_()

    def gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        """The gradients of the logits, below the operations on them."""
        return list(torch.autograd.grad(outputs, self.logits, self.arriving))


def _factors(losses: Tensor) -> Tensor:
    """[M] k_m of a first step, in which what is usual is 1."""
    count = len(losses)
    return torch.exp(ALPHA * (1 - torch.exp((losses.mean() - losses) * count / (count - 1))))


@register
class Step(Case):
    """The path from responses to their gradients, in the first step of a run."""

    name = "agm_step"
    title = "AGM: scores, and gradients of the responses"
    kind = "logits"
    ops = ("modality_scores", "scale_grad_backward")
    autograd = True
    make = staticmethod(Responses)

    def check(self, provider: str, i: Responses, result: list[Tensor]) -> None:
        losses = [F.cross_entropy(z.detach().double(), i.labels) for z in i.logits]
        rows = zip(result, i.arriving, _factors(torch.stack(losses)), strict=True)
        # The released sum over the batch rounds to the logits' dtype, once for every sample.
        rounding = len(i.labels) * torch.finfo(i.dtype).eps
        for got, grad, k in rows:
            close("gradient of a response", got, k * grad.double(), 1e-5 + rounding)

    def official(self, i: Responses) -> list[Tensor]:
        outputs, k = [z.view_as(z) for z in i.logits], []
        for m, r in enumerate(outputs):
            r.register_hook(lambda grad, m=m: grad * k[m])
        with torch.no_grad():
            scores = [sequences.agm.mean_score(r, i.labels, 1e-8) for r in outputs]
        now, usual = sequences.agm.ratios(scores), sequences.agm.ratios([0.0] * len(scores))
        k += [math.exp(ALPHA * (b - a)) for a, b in zip(now, usual, strict=True)]
        return i.gradients(outputs)

    def foreach(self, i: Responses) -> list[Tensor]:
        outputs = [z.view_as(z) for z in i.logits]
        with torch.no_grad():
            losses = torch.stack([F.cross_entropy(r, i.labels) for r in outputs])
            k = _factors(losses.to(torch.promote_types(i.dtype, torch.float32)))
        for r, factor in zip(outputs, k.unbind(), strict=True):
            r.register_hook(lambda grad, factor=factor: grad * factor)
        return i.gradients(outputs)

    def mmfuse(self, i: Responses, backend: str) -> list[Tensor]:
        names = [str(m) for m in range(len(i.logits))]
        made = i.cached(
            ("AGM", backend),
            lambda: mmfuse.AGM(ALPHA, None, num_modalities=len(names), backend=backend),
        )
        made.running_scores.zero_()  # as before a first step
        made.running_steps.zero_()
        out = made(dict(zip(names, i.logits, strict=True)), i.labels)
        return i.gradients(list(out.logits.values()))


def _outputs(model: AudioVisual, i: TrainingInputs) -> list[Tensor]:
    """The joint logits of both modalities in training mode, then of each alone in evaluation's."""
    found = [model(i.audio, i.visual)[-1]]
    model.eval()
    found += [
        model(i.audio, torch.zeros_like(i.visual))[-1],
        model(torch.zeros_like(i.audio), i.visual)[-1],
    ]
    model.train()
    return found


def _responses(model: AudioVisual, i: TrainingInputs) -> list[Tensor]:
    both, a, v = _outputs(model, i)
    return [(both + a - v) / 2, (both + v - a) / 2]


@register
class Training(TrainingCase):
    """The first step of a run, in which what is usual is 1.

    `plain` has the same forward passes and loss. The release goes through the network once more,
    with neither modality, for outputs that it does not use. No gradient is clipped in this step.
    """

    name = "agm_training"
    title = "AGM: a whole training step"
    method = "AGM"
    ops = ("modality_scores", "sample_scores", "scale_grad_backward")

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
            found = _responses(model, i)
            if regulated:
                losses = torch.stack(
                    [F.cross_entropy(r.detach().double(), i.labels) for r in found]
                )
                factors = torch.exp(ALPHA * (1 - torch.exp(losses.flip(0) - losses)))
                for r, k in zip(found, factors.tolist(), strict=True):
                    r.register_hook(lambda grad, k=k: grad * k)
            return [], found, F.cross_entropy(sum(found), i.labels)

        return stepped(i, [grad for _, grad in backward(i, forward).named_gradients()])

    def plain(self, i: TrainingInputs) -> None:
        i.optimizer.zero_grad()
        F.cross_entropy(sum(_responses(i.model, i)), i.labels).backward()
        i.optimizer.step()

    def official(self, i: TrainingInputs) -> None:
        script = sequences.agm.TWO._replace(clip=math.inf)
        training = sequences.agm.Training(i.model, i.optimizer, alpha=ALPHA, script=script)
        training.step(i.audio, i.visual, i.labels)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        def start() -> mmfuse.AGM:
            made = mmfuse.AGM.official(ALPHA, None, backend=backend).to(i.device)
            made.set_epoch(0)
            return made

        method = i.cached(("AGM", backend), start)
        method.reset_parameters()  # for a first step again
        i.optimizer.zero_grad()
        inputs = {"audio": i.audio, "visual": i.visual}
        responses = mmfuse.shapley_responses(i.model, inputs, output=lambda out: out[-1])
        out = method(responses, i.labels)
        F.cross_entropy(sum(out.logits.values()), i.labels).backward()
        i.optimizer.step()
