"""The gate of whole training steps, as `_parity`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from _inputs import AGREEMENT, TrainingInputs, new_optimizer
from _networks import AudioVisual
from _parity import close
from torch import Tensor
from torch.nn import functional as F

from mmfuse.reference import paired_cosine as reference_cosine


def check_inforeg(provider: str, inputs: TrainingInputs, result: object) -> None:
    """Compares the parameters after a step with those of a plain one, regulated in float64."""
    _check_parameters(inputs, inputs.cached("exact InfoReg", lambda: exact_inforeg_step(inputs)))


def check_redreg(provider: str, inputs: TrainingInputs, result: object) -> None:
    """As `check_inforeg`.

    The first step of an epoch is regulated whatever the monitor's noise is: its moving average is a
    tenth of the redundancy, and the gain counts as growing for ten steps, so that the phase is
    10 − 0.6; later it is 1 − 0.6 or, when the gain no longer grows, 1, all above 0.15.
    """
    _check_parameters(inputs, inputs.cached("exact RedReg", lambda: exact_redreg_step(inputs)))


def _check_parameters(inputs: TrainingInputs, exact: Sequence[Tensor]) -> None:
    names = [name for name, _ in inputs.model.named_parameters()]
    rounding, tolerance = torch.finfo(inputs.dtype).eps, _training_tolerance(inputs)
    for name, p, want in zip(names, inputs.parameters, exact, strict=True):
        size = (want - inputs.pristine[name].double()).square().mean().sqrt()
        close(name, p, want, rounding, tolerance * float(size))


def _training_tolerance(inputs: TrainingInputs) -> float:
    """How far off an element of an update may be, in units of the update's size.

    A gradient has come through about 20 convolutions, whose errors add up like √20. Each sums up to
    2¹³ products, whose roundings add up like √2¹³; TF32 rounds their factors, which is more. The
    largest of ten million errors is five times as large as they usually are. RedReg's released
    strength is float32, whatever the network is.
    """
    tf32 = inputs.device.type == "cuda" and torch.backends.cudnn.allow_tf32
    each = 2.0**-11 if tf32 else 2**6.5 * torch.finfo(inputs.dtype).eps / 2
    return 5 * 20**0.5 * each + 2.0**-23


def exact_inforeg_step(inputs: TrainingInputs) -> list[Tensor]:
    """The parameters after a step of InfoReg's released rules."""

    def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor]]:
        a, v, out = model(inputs.audio, inputs.visual)
        weight_a, weight_v = model.fc.weight.chunk(2, dim=1)
        rows = ((a, weight_a), (v, weight_v))
        return [a, v], [out, *(F.linear(x, w, model.fc.bias / 2) for x, w in rows)]

    def strengths(features: list[Tensor], logits: list[Tensor]) -> list[Tensor]:
        a, v = (_true_class(z, inputs.labels).sum() for z in logits)
        return [
            torch.where(a > v, 0.95 * torch.exp(torch.tanh(a - v)), 0.0),
            torch.where(v > a, 0.1 * torch.exp(torch.tanh(v - a)), 0.0),
        ]

    return _exact_step(inputs, forward, strengths, orthogonal=False)


def exact_redreg_step(inputs: TrainingInputs) -> list[Tensor]:
    """The parameters after a step of RedReg's released rules."""

    def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor]]:
        # Nothing is dropped: so the seed was chosen.
        a, v, out = model(inputs.audio, inputs.visual)
        return [a, v], [out, model.head_audio(a), model.head_visual(v)]

    def strengths(features: list[Tensor], logits: list[Tensor]) -> list[Tensor]:
        a, v = (_true_class(z, inputs.labels).mean() for z in logits)
        agree = (reference_cosine.paired_cosine(*features) > AGREEMENT).double()
        return [
            torch.where(one > other, torch.exp(0.9 * torch.tanh(one - other)), 0.0) * agree
            for one, other in ((a, v), (v, a))
        ]

    return _exact_step(inputs, forward, strengths, orthogonal=True)


def _true_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(dim=1).gather(1, labels.unsqueeze(1))


def _exact_step(
    inputs: TrainingInputs,
    forward: Callable[[AudioVisual], tuple[list[Tensor], list[Tensor]]],
    strengths: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    orthogonal: bool,
) -> list[Tensor]:
    """Parameters after one backward pass of all losses, the pull, and the optimizer's step.

    The pass is in the inputs' dtype, all that follows in float64: a forward pass in float64 now and
    then takes the other side of a ReLU, which changes early layers' gradients by percents.
    """
    model = copy.deepcopy(inputs.model)
    model.load_state_dict(inputs.pristine)
    start = [w.double() for w in inputs.start]
    with torch.enable_grad():
        features, logits = forward(model)
        sum(F.cross_entropy(z, inputs.labels) for z in logits).backward()
    model.double()
    with torch.no_grad():
        pulls = strengths([x.double() for x in features], [z.double() for z in logits[1:]])
        rows = zip(model.named_parameters(), start, strict=True)
        for (name, p), anchor in rows:
            modality = name.split(".")[0]
            if modality not in ("audio_net", "visual_net"):
                continue
            d = p - anchor
            if orthogonal and p.grad.abs().sum() > 0:
                d -= (d * p.grad).sum() / (p.grad.square().sum() + 1e-12) * p.grad
            p.grad += pulls[modality == "visual_net"] * d
        new_optimizer(model).step()
    return [p.detach() for p in model.parameters()]
