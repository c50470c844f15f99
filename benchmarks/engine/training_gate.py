"""The gate of whole training steps.

A provider's step is compared with a plain pass forwards and backwards, in the inputs' dtype, whose
gradients are regulated in float64: a pass in float64 now and then takes the other side of a ReLU,
which changes early layers' gradients by percents. `plain` is compared with that pass unregulated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .gate import close
from .networks import AudioVisual
from .training import TrainingInputs, new_optimizer


@dataclass
class Pass:
    """The outcome of a pass forwards and backwards, all in float64.

    Attributes:
        model: With its gradients.
        features: Of both modalities.
        logits: The joint ones, then those of both modalities.
    """

    model: AudioVisual
    features: list[Tensor]
    logits: list[Tensor]

    def named_gradients(self) -> list[tuple[str, Tensor | None]]:
        """The gradients of every parameter, by name."""
        return [(name, p.grad) for name, p in self.model.named_parameters()]


#: Features, logits and loss.
Forward = Callable[[AudioVisual], tuple[list[Tensor], list[Tensor], Tensor]]
Strengths = Callable[[Pass], Sequence[Tensor]]


def true_class(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, 1] probabilities."""
    return logits.softmax(dim=1).gather(1, labels.unsqueeze(1))


def modality_of(name: str) -> int | None:
    """The modality of a parameter, by its name; None for a head's."""
    return {"audio_net": 0, "visual_net": 1}.get(name.split(".")[0])


def split_logits(model: AudioVisual, a: Tensor, v: Tensor) -> list[Tensor]:
    """Each modality's, from its half of the joint head and half of the bias."""
    halves = zip((a, v), model.fc.weight.chunk(2, dim=1), strict=True)
    return [F.linear(x, weight, model.fc.bias / 2) for x, weight in halves]


def joint_forward(inputs: TrainingInputs) -> Forward:
    """The loss is the joint logits' alone."""

    def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
        a, v, out = model(inputs.audio, inputs.visual)
        logits = [out, *split_logits(model, a, v)]
        return [a, v], logits, F.cross_entropy(out, inputs.labels)

    return forward


def backward(inputs: TrainingInputs, forward: Forward) -> Pass:
    """A pass on a copy of the network."""
    model = copy.deepcopy(inputs.model)
    model.load_state_dict(inputs.pristine)
    model.zero_grad()
    with torch.enable_grad():
        features, logits, loss = forward(model)
        loss.backward()
    rows = [[x.detach().double() for x in values] for values in (features, logits)]
    return Pass(model.double(), *rows)


@torch.no_grad()
def pulled_step(
    inputs: TrainingInputs,
    forward: Forward,
    strengths: Strengths | None = None,
    orthogonal: bool = False,
) -> list[Tensor]:
    """Parameters after one backward pass, the pull if there is one, and the optimizer's step."""
    seen = backward(inputs, forward)
    pulls = strengths(seen) if strengths else ()
    rows = zip(seen.model.named_parameters(), inputs.start, strict=True)
    for (name, p), anchor in rows if pulls else ():
        modality = modality_of(name)
        if modality is None:
            continue
        d = p - anchor.double()
        if orthogonal and p.grad.abs().sum() > 0:
            d -= (d * p.grad).sum() / (p.grad.square().sum() + 1e-12) * p.grad
        p.grad += pulls[modality] * d
    return stepped(inputs, [p.grad for p in seen.model.parameters()])


@torch.no_grad()
def stepped(inputs: TrainingInputs, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Parameters after the optimizer's step with these gradients, in float64."""
    model = copy.deepcopy(inputs.model)
    model.load_state_dict(inputs.pristine)
    model.double()
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = None if grad is None else grad.detach().double()
    new_optimizer(model).step()
    return [p.detach() for p in model.parameters()]


def check_parameters(inputs: TrainingInputs, exact: Sequence[Tensor], slack: float = 1.0) -> None:
    """Compares all parameters; `slack` multiplies the tolerance."""
    names = [name for name, _ in inputs.model.named_parameters()]
    rounding = torch.finfo(inputs.dtype).eps
    tolerance = slack * training_tolerance(inputs)
    for name, p, want in zip(names, inputs.parameters, exact, strict=True):
        size = (want - inputs.pristine[name].double()).square().mean().sqrt()
        close(name, p, want, rounding, tolerance * float(size))


def training_tolerance(inputs: TrainingInputs) -> float:
    """How far off an element of an update may be, in units of the update's size.

    A gradient has come through about 20 convolutions, whose errors add up like √20. Each sums up to
    2¹³ products, or for the first one's weights as many as it has outputs, a quarter of the pixels;
    their roundings add up like the root of their number. TF32 rounds their factors, which is more.
    The largest of ten million errors is five times as large as they usually are. RedReg's released
    strength and mmfuse's OPM are float32, whatever the network is; the largest elements, which are
    five times as large as usual too, are off by as much more.
    """
    terms = max(2**13, inputs.workload.pixels / 4)
    each = terms**0.5 * torch.finfo(inputs.dtype).eps / 2
    if inputs.device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        each += 2.0**-11
    return 5 * (20**0.5 * each + 2.0**-23)
