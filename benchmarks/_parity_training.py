"""The gate of whole training steps, as `_parity`.

A provider's step is compared with a plain pass forwards and backwards, in the inputs' dtype, whose
gradients are regulated in float64: a pass in float64 now and then takes the other side of a ReLU,
which changes early layers' gradients by percents. `plain` is compared with that pass unregulated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from _inputs import AGREEMENT, LAMBDA, Q_BASE, TrainingInputs, new_optimizer
from _networks import AudioVisual
from _parity import PLAIN, ParityError, check_update, close, exact_decision, kept_samples
from _parity_information import exact_arm
from torch import Tensor
from torch.nn import functional as F

from mmfuse.methods.opm import drop_probabilities
from mmfuse.reference import paired_cosine as reference_cosine


@dataclass
class Pass:
    """What a pass forwards and backwards has left, all in float64.

    Attributes:
        model: With its gradients.
        features: Of both modalities.
        logits: The joint ones, then those of both modalities.
    """

    model: AudioVisual
    features: list[Tensor]
    logits: list[Tensor]


Forward = Callable[[AudioVisual], tuple[list[Tensor], list[Tensor], Tensor]]
Strengths = Callable[[Pass], Sequence[Tensor]]


def check_ogm(provider: str, inputs: TrainingInputs, result: object, *, noise: bool) -> None:
    """Compares the convolutions' gradients, then all parameters with those that they lead to.

    Noise as `_parity.check_update` does: with the stream's, or by its statistics.
    """
    seen = inputs.cached("exact OGM", lambda: _backward(inputs, _joint_forward(inputs)))
    k, _ = exact_decision(seen.logits[1:], inputs.labels)
    rows = zip(inputs.model.named_parameters(), seen.model.parameters(), strict=True)
    changed, rounding = [], _training_tolerance(inputs)
    for (name, p), plain in rows:
        modality = _modality(name)
        if modality is None or p.dim() != 4 or provider == PLAIN:
            size = float(plain.grad.square().mean().sqrt())
            close(f"gradient of {name}", p.grad, plain.grad, 0.0, rounding * size)
        else:
            changed.append((plain.grad, p, modality))
    if changed:
        before, params, owners = map(list, zip(*changed, strict=True))
        view = _Gradients(before, params, inputs.state, inputs.dtype, inputs.device)
        std = torch.stack([g.std() for g in before]) + 1e-8 if noise else None
        check_update(provider, view, scale=k[owners], noise_std=std, rounding=rounding)
    _check_parameters(inputs, _stepped(inputs, [p.grad for p in inputs.parameters]))


@dataclass
class _Gradients:
    """What `check_update` looks at."""

    pristine: list[Tensor]
    params: list[Tensor]
    state: Tensor
    dtype: torch.dtype
    device: torch.device

    def results(self) -> list[Tensor]:
        """The gradients as a provider has left them."""
        return [p.grad for p in self.params]


def check_opm(provider: str, inputs: TrainingInputs, result: Sequence[Tensor] | None) -> None:
    """Compares who was dropped, and the parameters after a step with the same ones dropped."""
    if provider == PLAIN:
        _check_parameters(inputs, _exact_step(inputs, _joint_forward(inputs)))
        return
    seen = inputs.cached("exact OPM", lambda: _backward(inputs, _joint_forward(inputs)))
    _, rho = exact_decision(seen.logits[1:], inputs.labels)
    q = drop_probabilities(rho, Q_BASE, LAMBDA)
    if any(len(feature) != len(inputs.labels) for feature in result):
        raise ParityError("a sample was removed, though one modality is never dropped")
    keep = kept_samples(provider, result, q, inputs.state)
    factors = (keep.unsqueeze(2) / (1 - q.mean())).to(inputs.dtype)

    def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
        features = model.features(inputs.audio, inputs.visual)
        dropped = [f * factor for f, factor in zip(features, factors, strict=True)]
        loss = F.cross_entropy(model.fc(torch.cat(dropped, dim=1)), inputs.labels)
        return dropped, [], loss

    _check_parameters(inputs, _exact_step(inputs, forward))


def check_arm(provider: str, inputs: TrainingInputs, result: object) -> None:
    """Compares the parameters after a step with weights from the reference's counts."""
    regulated = provider != PLAIN
    exact = inputs.cached(("exact ARM", regulated), lambda: exact_arm_step(inputs, regulated))
    _check_parameters(inputs, exact)


def exact_arm_step(inputs: TrainingInputs, regulated: bool = True) -> list[Tensor]:
    """The parameters after a step of ARM's released rules."""

    def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
        a, v = model.features(inputs.audio, inputs.visual)
        weights = torch.ones(2, dtype=inputs.dtype, device=inputs.device)
        if regulated:
            with torch.no_grad():
                c = model.neck(torch.cat([v, a], dim=1))
                p_a, p_v, p_c = (
                    _true_class(model.fc(x).double(), inputs.labels).mean() for x in (a, v, c)
                )
                nmi_a, nmi_v, ncmi_a, ncmi_v = exact_arm(
                    (a, v, c), inputs.workload.bins, released=True
                )
                gain_a = p_c * nmi_a + p_v * (nmi_a - ncmi_a)
                gain_v = p_c * nmi_v + p_a * (nmi_v - ncmi_v)
                weights = torch.stack([gain_v / gain_a, gain_a / gain_v]).to(inputs.dtype)
        joint = torch.cat([weights[1] * v, weights[0] * a], dim=1)
        return [a, v], [], F.cross_entropy(model.fc(model.fc_out(joint)), inputs.labels)

    return _exact_step(inputs, forward)


def check_inforeg(provider: str, inputs: TrainingInputs, result: object) -> None:
    """Compares the parameters after a step with those of a plain one, regulated in float64."""
    regulated = provider != PLAIN
    key = ("exact InfoReg", regulated)
    _check_parameters(inputs, inputs.cached(key, lambda: exact_inforeg_step(inputs, regulated)))


def check_redreg(provider: str, inputs: TrainingInputs, result: object) -> None:
    """As `check_inforeg`.

    The first step of an epoch is regulated whatever the monitor's noise is: its moving average is a
    tenth of the redundancy, and the gain counts as growing for ten steps, so that the phase is
    10 − 0.6; later it is 1 − 0.6 or, when the gain no longer grows, 1, all above 0.15.
    """
    regulated = provider != PLAIN
    key = ("exact RedReg", regulated)
    _check_parameters(inputs, inputs.cached(key, lambda: exact_redreg_step(inputs, regulated)))


def _check_parameters(inputs: TrainingInputs, exact: Sequence[Tensor]) -> None:
    names = [name for name, _ in inputs.model.named_parameters()]
    rounding, tolerance = torch.finfo(inputs.dtype).eps, _training_tolerance(inputs)
    for name, p, want in zip(names, inputs.parameters, exact, strict=True):
        size = (want - inputs.pristine[name].double()).square().mean().sqrt()
        close(name, p, want, rounding, tolerance * float(size))


def _training_tolerance(inputs: TrainingInputs) -> float:
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


def exact_inforeg_step(inputs: TrainingInputs, regulated: bool = True) -> list[Tensor]:
    """The parameters after a step of InfoReg's released rules."""

    def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
        features, logits, _ = _joint_forward(inputs)(model)
        return features, logits, sum(F.cross_entropy(z, inputs.labels) for z in logits)

    def strengths(seen: Pass) -> list[Tensor]:
        a, v = (_true_class(z, inputs.labels).sum() for z in seen.logits[1:])
        return [
            torch.where(a > v, 0.95 * torch.exp(torch.tanh(a - v)), 0.0),
            torch.where(v > a, 0.1 * torch.exp(torch.tanh(v - a)), 0.0),
        ]

    return _exact_step(inputs, forward, strengths if regulated else None)


def exact_redreg_step(inputs: TrainingInputs, regulated: bool = True) -> list[Tensor]:
    """The parameters after a step of RedReg's released rules."""

    def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
        # Nothing is dropped: so the seed was chosen.
        a, v, out = model(inputs.audio, inputs.visual)
        logits = [out, model.head_audio(a), model.head_visual(v)]
        return [a, v], logits, sum(F.cross_entropy(z, inputs.labels) for z in logits)

    def strengths(seen: Pass) -> list[Tensor]:
        a, v = (_true_class(z, inputs.labels).mean() for z in seen.logits[1:])
        agree = (reference_cosine.paired_cosine(*seen.features) > AGREEMENT).double()
        return [
            torch.where(one > other, torch.exp(0.9 * torch.tanh(one - other)), 0.0) * agree
            for one, other in ((a, v), (v, a))
        ]

    return _exact_step(inputs, forward, strengths if regulated else None, orthogonal=True)


def _true_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(dim=1).gather(1, labels.unsqueeze(1))


def _modality(name: str) -> int | None:
    """Whose parameter it is, by its name; None for a head's."""
    return {"audio_net": 0, "visual_net": 1}.get(name.split(".")[0])


def _joint_forward(inputs: TrainingInputs) -> Forward:
    """The loss is the joint logits' alone."""

    def forward(model: AudioVisual) -> tuple[list[Tensor], list[Tensor], Tensor]:
        a, v, out = model(inputs.audio, inputs.visual)
        weight_a, weight_v = model.fc.weight.chunk(2, dim=1)
        rows = ((a, weight_a), (v, weight_v))
        logits = [out, *(F.linear(x, w, model.fc.bias / 2) for x, w in rows)]
        return [a, v], logits, F.cross_entropy(out, inputs.labels)

    return forward


def _backward(inputs: TrainingInputs, forward: Forward) -> Pass:
    model = copy.deepcopy(inputs.model)
    model.load_state_dict(inputs.pristine)
    model.zero_grad()
    with torch.enable_grad():
        features, logits, loss = forward(model)
        loss.backward()
    rows = [[x.detach().double() for x in values] for values in (features, logits)]
    return Pass(model.double(), *rows)


@torch.no_grad()
def _exact_step(
    inputs: TrainingInputs,
    forward: Forward,
    strengths: Strengths | None = None,
    orthogonal: bool = False,
) -> list[Tensor]:
    """Parameters after one backward pass, the pull if there is one, and the optimizer's step."""
    seen = _backward(inputs, forward)
    pulls = strengths(seen) if strengths else ()
    rows = zip(seen.model.named_parameters(), inputs.start, strict=True)
    for (name, p), anchor in rows if pulls else ():
        modality = _modality(name)
        if modality is None:
            continue
        d = p - anchor.double()
        if orthogonal and p.grad.abs().sum() > 0:
            d -= (d * p.grad).sum() / (p.grad.square().sum() + 1e-12) * p.grad
        p.grad += pulls[modality] * d
    return _stepped(inputs, [p.grad for p in seen.model.parameters()])


@torch.no_grad()
def _stepped(inputs: TrainingInputs, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Parameters after the optimizer's step with these gradients, in float64."""
    model = copy.deepcopy(inputs.model)
    model.load_state_dict(inputs.pristine)
    model.double()
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = None if grad is None else grad.detach().double()
    new_optimizer(model).step()
    return [p.detach() for p in model.parameters()]
