"""`update_grads_`: g ← scale g + pull (w − w₀) + noise_std N(0, 1), and parts of it."""

from __future__ import annotations

from functools import partial

from engine import eager, sequences
from engine.case import Case, register
from engine.compiled import update
from engine.gate import check_update
from engine.gradients import PULL, GradientInputs

from mmfuse import ops


class Update(Case):
    """Gradients are updated in place; the gate looks at them."""

    kind = "gradients"
    ops = ("update_grads_",)
    make = staticmethod(GradientInputs)


def released_pull(i: GradientInputs) -> None:
    """InfoReg's, tensor by tensor."""
    for p, anchor in zip(i.params, i.anchors, strict=True):
        sequences.inforeg.pull(p, anchor, PULL)


def _compiled_update(i: GradientInputs, *, pull: bool = False, noise: bool = False) -> None:
    scale, weights, stds = (v.split(1) for v in (i.scale, i.pull, i.noise_std))
    params, anchors = i.flat_params, i.flat_anchors
    for t, grad in enumerate(i.flat_grads):
        pulled = (weights[t], params[t], anchors[t]) if pull else None
        update(grad, scale[t], pulled, (stds[t], i.state, t) if noise else None)


@register
class Scale(Update):
    """OGM's update."""

    name = "update_scale"
    title = "OGM: update_grads_(scale)"
    passes = 2
    main = True

    def check(self, provider: str, i: GradientInputs, result: object) -> None:
        check_update(provider, i, scale=i.scale)

    def official(self, i: GradientInputs) -> None:
        for params, k in zip(i.encoder_params, i.coefficients.unbind(), strict=True):
            sequences.ogm.scale(params, k)

    def foreach(self, i: GradientInputs) -> None:
        eager.scale(i, i.coefficients)

    def compile(self, i: GradientInputs) -> None:
        _compiled_update(i)

    def mmfuse(self, i: GradientInputs, backend: str) -> None:
        ops.update_grads_(i.grads, i.scale, backend=backend)


@register
class Noise(Update):
    """An update with noise of a known spread."""

    name = "update_noise"
    title = "update_grads_(scale, noise)"
    passes = 2
    noisy = True

    def check(self, provider: str, i: GradientInputs, result: object) -> None:
        check_update(provider, i, scale=i.scale, noise_std=i.noise_std)

    def official(self, i: GradientInputs) -> None:
        coefficients = i.coefficients.unbind()
        for p, m, std in zip(i.params, i.modality, i.noise_std_host, strict=True):
            p.grad = p.grad * coefficients[m] + sequences.ogm.gaussian(p.grad, std)

    def foreach(self, i: GradientInputs) -> None:
        eager.scale(i, i.coefficients)
        eager.add_noise(i, i.noise_std)

    def compile(self, i: GradientInputs) -> None:
        _compiled_update(i, noise=True)

    def mmfuse(self, i: GradientInputs, backend: str) -> None:
        ops.update_grads_(i.grads, i.scale, noise_std=i.noise_std, stream=i.stream, backend=backend)


@register
class Pull(Update):
    """InfoReg's update without the Fisher trace."""

    name = "update_pull"
    title = "InfoReg: update_grads_(pull)"
    passes = 4
    make = staticmethod(partial(GradientInputs, anchored=True))

    def check(self, provider: str, i: GradientInputs, result: object) -> None:
        check_update(provider, i, scale=i.ones, pull=i.pull)

    def official(self, i: GradientInputs) -> None:
        released_pull(i)

    def foreach(self, i: GradientInputs) -> None:
        eager.add_displacement(i)

    def compile(self, i: GradientInputs) -> None:
        rows = zip(i.pull.split(1), i.flat_params, i.flat_anchors, strict=True)
        for grad, one, row in zip(i.flat_grads, i.ones.split(1), rows, strict=True):
            update(grad, one, row, None)

    def mmfuse(self, i: GradientInputs, backend: str) -> None:
        ops.update_grads_(
            i.grads, i.ones, params=i.params, anchors=i.anchors, pull=i.pull, backend=backend
        )


@register
class AllThree(Update):
    """Every term at once."""

    name = "update_all"
    title = "update_grads_(scale, pull, noise)"
    passes = 4
    noisy = True
    make = staticmethod(partial(GradientInputs, anchored=True))

    def check(self, provider: str, i: GradientInputs, result: object) -> None:
        check_update(provider, i, scale=i.scale, pull=i.pull, noise_std=i.noise_std)

    def official(self, i: GradientInputs) -> None:
        Noise.official(self, i)
        released_pull(i)

    def foreach(self, i: GradientInputs) -> None:
        eager.scale(i, i.coefficients)
        eager.add_displacement(i)
        eager.add_noise(i, i.noise_std)

    def compile(self, i: GradientInputs) -> None:
        _compiled_update(i, pull=True, noise=True)

    def mmfuse(self, i: GradientInputs, backend: str) -> None:
        ops.update_grads_(
            i.grads,
            i.scale,
            params=i.params,
            anchors=i.anchors,
            pull=i.pull,
            noise_std=i.noise_std,
            stream=i.stream,
            backend=backend,
        )
