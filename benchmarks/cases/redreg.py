"""RedReg: statistics and update, a whole training step, and what its monitor costs."""

from __future__ import annotations

from functools import partial

import torch
from engine import eager, sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import PLAIN, ParityError, check_update
from engine.gradients import BETA, GradientInputs
from engine.inputs import SEED
from engine.networks import AudioVisual, ThreeHeads
from engine.training import TrainingInputs
from engine.training_case import TrainingCase, own_heads_step
from engine.training_gate import Pass, pulled_step, true_class
from torch import Tensor
from torch.nn import functional as F

import mmfuse
from mmfuse import ops
from mmfuse.ops import GradStats
from mmfuse.reference import grad_stats as reference_stats
from mmfuse.reference import paired_cosine as reference_cosine
from mmfuse.reference import update_grads as reference_update

from .paired_cosine import AGREEMENT

#: The length of its training run.
EPOCHS = 80
_MONITOR = ("noisy_views", "redundancy_ratio", "co_information_gate")
_OPS = ("modality_scores", "grad_stats", "update_grads_", *_MONITOR)


@compiled(dynamic=True)
def _pull_orthogonally(grad: Tensor, param: Tensor, anchor: Tensor, beta: Tensor) -> None:
    numel, moments = reference_stats.grad_stats([grad], [param], [anchor])
    stats = GradStats(numel, *moments.unbind())
    scale = 1 - beta * stats.dot / (stats.sq_norm + 1e-12)
    reference_update.update_grads_(
        [grad], scale, [param], [anchor], beta.expand(1), None, None, [], [], None, None
    )


@register
class OrthogonalPull(Case):
    """Statistics, then the part of the displacement that is orthogonal to the gradient."""

    name = "redreg"
    title = "RedReg: grad_stats, update_grads_"
    kind = "gradients"
    ops = ("grad_stats", "update_grads_")
    passes = 7
    main = True
    make = staticmethod(partial(GradientInputs, anchored=True))

    def check(self, provider: str, i: GradientInputs, result: object) -> None:
        stats = i.exact_stats
        scale = 1 - BETA * stats.dot / (stats.sq_norm + 1e-12)
        check_update(provider, i, scale=scale, pull=BETA * i.ones)

    def official(self, i: GradientInputs) -> None:
        for p, anchor in zip(i.params, i.anchors, strict=True):
            part = sequences.redreg.orthogonal(p - anchor, p.grad)
            sequences.redreg.pull(p, part, BETA)

    def foreach(self, i: GradientInputs) -> None:
        eager.pull_orthogonally(i)

    def compile(self, i: GradientInputs) -> None:
        for row in zip(i.flat_grads, i.flat_params, i.flat_anchors, strict=True):
            _pull_orthogonally(*row, i.beta)

    def mmfuse(self, i: GradientInputs, backend: str) -> None:
        stats = ops.grad_stats(i.grads, i.params, i.anchors, backend=backend)
        scale = 1 - i.beta * stats.dot / (stats.sq_norm + 1e-12)
        ops.update_grads_(
            i.grads,
            scale,
            params=i.params,
            anchors=i.anchors,
            pull=i.beta.expand_as(scale),
            backend=backend,
        )


@register
class Training(TrainingCase):
    """A step of the first epoch.

    The first step of an epoch is regulated whatever the monitor's noise is: its moving average is a
    tenth of the redundancy, and the gain counts as growing for ten steps, so that the phase is
    10 − 0.6; later it is 1 − 0.6 or, when the gain no longer grows, 1, all above 0.15.
    """

    name = "redreg_training"
    title = "RedReg: a whole training step"
    method = "RedReg"
    network = ThreeHeads
    ops = _OPS

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
            # Nothing is dropped: so the seed was chosen.
            a, v, out = model(i.audio, i.visual)
            logits = [out, model.head_audio(a), model.head_visual(v)]
            return [a, v], logits, sum(F.cross_entropy(z, i.labels) for z in logits)

        def strengths(seen: Pass) -> list[Tensor]:
            a, v = (true_class(z, i.labels).mean() for z in seen.logits[1:])
            agree = (reference_cosine.paired_cosine(*seen.features) > AGREEMENT).double()
            return [
                torch.where(one > other, torch.exp(0.9 * torch.tanh(one - other)), 0.0) * agree
                for one, other in ((a, v), (v, a))
            ]

        return pulled_step(i, forward, strengths if regulated else None, orthogonal=True)

    def plain(self, i: TrainingInputs) -> None:
        own_heads_step(i)

    def official(self, i: TrainingInputs) -> None:
        def start() -> sequences.redreg.Training:
            made = sequences.redreg.Training(i.model, i.optimizer, EPOCHS, uniform=i.uniform)
            with i.at_start():
                made.start_epoch(0)
            return made

        i.cached("official RedReg", start).step(i.audio, i.visual, i.labels)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        def start() -> mmfuse.RedReg:
            # The views' noise from the stream: what it is decides nothing here.
            made = mmfuse.RedReg.official(
                i.model.encoders,
                epochs=EPOCHS,
                noise=None,
                stream=mmfuse.NoiseStream(SEED, i.device),
                backend=backend,
            )
            with i.at_start():
                made.set_epoch(0)
            return made

        method = i.cached(("RedReg", backend), start)
        i.optimizer.zero_grad()
        inputs = {"audio": i.audio, "visual": i.visual}
        seen = method.drop_inputs(inputs, i.uniform())
        a, v, out = i.model(seen["audio"], seen["visual"])
        logits = {"audio": i.model.head_audio(a), "visual": i.model.head_visual(v)}
        sum(F.cross_entropy(z, i.labels) for z in (out, *logits.values())).backward()
        method.step(logits, i.labels, {"audio": a, "visual": v}, inputs)
        i.optimizer.step()


#: A turn of training: as many steps as the rarest monitor needs for one.
TURN = 4


class Monitored(TrainingCase):
    """Four steps of training with the monitor in some of them; `plain` are four without any method.

    A backward pass takes as long as two forward passes, of which the monitor adds two: a turn is
    expected to take 1 + 2 / (3 every) times as long as a plain one.
    """

    method = "RedReg"
    network = ThreeHeads
    ops = _OPS
    named_only = True
    every: int

    def check(self, provider: str, i: TrainingInputs, result: int) -> None:
        """Counts the passes of the monitor, and looks that the network has been trained.

        A step's numbers are `redreg_training`'s to check: from the second on the noise decides.
        """
        want = 0 if provider == PLAIN else TURN // self.every
        if result != want:
            raise ParityError(f"the monitor has run {result} times, not {want}")
        moved = [not torch.equal(p, i.pristine[name]) for name, p in i.model.named_parameters()]
        if not all(moved) or not all(p.isfinite().all() for p in i.parameters):
            raise ParityError("the network has not been trained")

    def plain(self, i: TrainingInputs) -> int:
        for _ in range(TURN):
            own_heads_step(i)
        return 0

    def mmfuse(self, i: TrainingInputs, backend: str) -> int:
        def start() -> tuple[mmfuse.RedReg, list[int]]:
            passes = [0]
            made = mmfuse.RedReg(
                i.model.encoders, epochs=EPOCHS, monitor_every=self.every, backend=backend
            )
            made.set_epoch(0)
            # An encoder's passes are its training step's, and two of each monitor.
            i.model.audio_net.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
            return made, passes

        method, passes = i.cached(("monitored", backend, self.every), start)
        before = passes[0]
        inputs = {"audio": i.audio, "visual": i.visual}
        for _ in range(TURN):
            i.optimizer.zero_grad()
            a, v, out = i.model(i.audio, i.visual)
            logits = {"audio": i.model.head_audio(a), "visual": i.model.head_visual(v)}
            sum(F.cross_entropy(z, i.labels) for z in (out, *logits.values())).backward()
            method.step(logits, i.labels, {"audio": a, "visual": v}, inputs)
            i.optimizer.step()
        return (passes[0] - before - TURN) // 2


@register
class MonitoredAlways(Monitored):
    """A monitor in every step."""

    name = "redreg_monitor_1"
    title = "RedReg: four steps, monitor in each"
    every = 1


@register
class MonitoredTwice(Monitored):
    """A monitor in every second step."""

    name = "redreg_monitor_2"
    title = "RedReg: four steps, monitor in two"
    every = 2


@register
class MonitoredOnce(Monitored):
    """A monitor in every fourth step."""

    name = "redreg_monitor_4"
    title = "RedReg: four steps, monitor in one"
    every = 4
