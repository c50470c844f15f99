"""The methods of the catalogue, made to act in most of a few steps, and a step with any of them.

A test that says `KINDS`, or a part of it by what a method needs, has every method that is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
import ways
from epochs import next_epoch
from networks import start_third_epoch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfuse import METHODS, GradientMethod, NoiseStream, unimodal_logits

Encoders = dict[str, nn.Module]
Make = Callable[..., GradientMethod]

ACTING: dict[str, dict[str, Any]] = {
    "InfoReg": {"threshold": -1e30},
    "RedReg": {"epochs": 3, "threshold": -1e9, "agreement": (-2.0, -2.0), "window": 2},
    "OPM": {"q_base": 0.7},
    "ARM": {"bins": 8},
    "PMR": {"mu": 0.5},
}
# How an epoch begins in which a method acts, where `next_epoch` does not suffice.
STARTS: dict[str, Callable[[Any], None]] = {"InfoReg": start_third_epoch}
# The methods that have two forms, by the names of these.
FORMS: dict[str, dict[str, dict[str, Any]]] = {"OGM": {"OGM": {"noise": False}, "OGM-GE": {}}}


class Kind(NamedTuple):
    """A method of the catalogue, or a form of one."""

    method: str
    options: dict[str, Any]


#: Those that have a part in every training step.
KINDS: dict[str, Kind] = {
    kind: Kind(name, options)
    for name, made in METHODS.items()
    if made.card.acts not in ("head", "parameter")
    for kind, options in FORMS.get(name, {name: {}}).items()
}
ON_GRADIENTS = [k for k in KINDS if METHODS[KINDS[k].method].card.acts == "gradient"]
#: Modules that are called in the forward pass, and those of them that pass features on.
IN_FORWARD = [k for k in KINDS if k not in ON_GRADIENTS]
ON_FEATURES = [k for k in KINDS if METHODS[KINDS[k].method].card.acts == "feature"]
#: Controls on gradients, whose coefficients are constants.
CONSTANT = [k for k in ON_GRADIENTS if METHODS[KINDS[k].method].card.official == ()]
#: Those of which a paper says that they go together: the first in the forward pass.
COMBINED = ["OPM + OGM-GE"]
#: Methods on gradients that need nothing but logits, by the catalogue's names.
LOGITS_ONLY = [n for n, m in METHODS.items() if m.card[1:3] == ("gradient", ("logits",))]
#: Modules that decide nothing by all ranks' samples: fixed rates, a schedule, a loss of each part.
FIXED = [
    kind
    for kind in IN_FORWARD
    if not getattr(METHODS[KINDS[kind].method], "decides_over_ranks", True)
]
#: Those that do, in one reduction over the ranks.
LOOKING = [kind for kind in IN_FORWARD if kind not in FIXED]
#: Those that draw numbers in the forward pass, of each rank's own samples, and those of them that
#: draw one for each.
SHUFFLING = [k for k in IN_FORWARD if "stream" in signature(METHODS[KINDS[k].method]).parameters]
DROPPING = [k for k in SHUFFLING if k in ON_FEATURES]


def make(
    kind: str, encoders: Mapping[str, Any], *, stream: NoiseStream | None = None, **changes: Any
) -> Any:
    """The method on encoders; with the stream, if it draws from one."""
    name, options = KINDS[kind]
    options = {**ACTING.get(name, {}), **options, **changes}
    if kind in ON_GRADIENTS:
        method: Any = METHODS[name](encoders, **options)
        if stream is not None and method.rule.need.stream:
            method.stream = stream
        return method
    if stream is not None and "stream" in signature(METHODS[name]).parameters:
        options["stream"] = stream
    return METHODS[name](**options)  # type: ignore[call-arg]


_two: Encoders = {name: nn.Linear(1, 1) for name in ("audio", "visual")}
NEEDS = {kind: make(kind, _two).rule.need for kind in ON_GRADIENTS}
#: Those that make the backward passes themselves, and those that act after one.
TWO_GRADIENTS = [kind for kind in ON_GRADIENTS if NEEDS[kind].second == "unimodal"]
STEPPING = [kind for kind in ON_GRADIENTS if kind not in TWO_GRADIENTS]
#: Those that compare modalities with each other.
COMPARING = [kind for kind in STEPPING if kind not in CONSTANT]
ANCHORED = [kind for kind in ON_GRADIENTS if NEEDS[kind].anchors]
#: Those whose noise has a gradient's standard deviation.
NOISY = [kind for kind in ON_GRADIENTS if NEEDS[kind].noise is not None]
#: Those that draw from their stream.
DRAWING = [kind for kind in ON_GRADIENTS if kind in NOISY or NEEDS[kind].draws]
#: Those of which a step leaves something for the next.
STATEFUL = [
    kind for kind in ON_GRADIENTS if kind in DRAWING or make(kind, _two).state_dict()["state"]
]
#: Those that look at the encoders' inputs, and pass them through the encoders once more.
MONITORING = [kind for kind in STEPPING if "inputs" in NEEDS[kind].inputs]
#: Those that can change an optimizer's update in place of the gradients.
ON_UPDATES = [kind for kind in ON_GRADIENTS if NEEDS[kind].scales]


#: Modules that keep numbers of each modality, in the order of the names that a step shows first.
NAMED = [kind for kind in IN_FORWARD if hasattr(make(kind, {}), "names_state")]
#: Those that learn the names in a forward pass, so that the second one is compiled once more.
LEARNING = [kind for kind in NAMED if not hasattr(make(kind, {}), "update_prototypes")]


def start(method: Any) -> None:
    """Begins an epoch in which the method acts."""
    STARTS.get(type(method).__name__, next_epoch)(method)


def see(
    head: nn.Module,
    features: dict[str, Tensor],
    inputs: dict[str, Tensor],
    labels: Tensor,
    logits: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Everything that a method may look at, by the names of its arguments.

    The head is that of concatenated features; each modality's logits are its share, or as given.
    """
    # A fused representation like the features, and what the head makes of it.
    fused = torch.stack(list(features.values())).sum(0)
    return {
        "logits": unimodal_logits(head, features) if logits is None else logits,
        "labels": labels,
        "features": features,
        "inputs": inputs,
        "fused": fused,
        "fused_logits": head(torch.cat([fused] * len(features), 1)),
    }


def _ways(kind: str) -> tuple[str, ...]:
    """The ways to tell it more; a module whose forward pass has `present` alone takes masks.

    A loss of each part may have a criterion. None of those that decide nothing: ModalityDropout's
    tests have its masks.
    """
    made = METHODS[KINDS[kind].method]
    if kind in FIXED and made.card.acts != "loss":
        return ()
    if kind in ON_GRADIENTS:
        return ("present",) if kind in TWO_GRADIENTS else ways.WAYS
    taken, options = (signature(f).parameters for f in (made.forward, made))
    if "more" in taken:
        return ways.WAYS
    return tuple(way for way in ("present", "criterion") if way in taken or way in options)


#: Every method with every way to tell it more that it takes.
WITH_MORE = [(kind, way) for kind in KINDS for way in _ways(kind)]


def prepare(method: Any, widths: Mapping[str, int], classes: int, like: Tensor) -> None:
    """Gives a method the prototypes that it has to have before its first step; else nothing.

    The same ones on every rank, without a reduction.
    """
    if not hasattr(method, "update_prototypes") or method._ready:
        return
    generator = torch.Generator().manual_seed(7)
    features = {n: torch.randn(classes, d, generator=generator).to(like) for n, d in widths.items()}
    group, method.process_group = method.process_group, False
    method.update_prototypes([(features, torch.arange(classes).to(like.device))])
    method.process_group = group


_LOOKS_AT = {
    made: tuple(
        name
        for name, taken in signature(made.forward).parameters.items()
        if name != "self" and taken.kind is Parameter.POSITIONAL_OR_KEYWORD
    )
    for made in METHODS.values()
    if issubclass(made, nn.Module)
}


def arguments(method: Any, seen: Mapping[str, Any]) -> dict[str, Any]:
    """The method's arguments in its forward pass, or in `step` and `observe`."""
    if isinstance(method, nn.Module):
        widths = {name: x[0].numel() for name, x in seen["features"].items()}
        if "logits" in seen:
            classes = max([2, *next(iter(seen["logits"].values())).shape[1:2]])
            prepare(method, widths, classes, next(iter(seen["features"].values())))
        names = _LOOKS_AT[type(method)]
    else:
        names = ("logits", "labels", *method.rule.need.inputs)
    found = {name: seen[name] for name in names}
    return ways.arguments(seen["way"], found, seen) if seen.get("way") else found


class Shown(NamedTuple):
    """A forward pass's results as a method gets them.

    Attributes:
        loss: The joint loss.
        unimodal_losses: Of each modality alone.
        seen: As `see` gives it.
        out: The result of a method that acts in the forward pass.
    """

    loss: Tensor
    unimodal_losses: dict[str, Tensor]
    seen: dict[str, Any]
    out: Any = None


def show(method: Any, head: nn.Module, seen: dict[str, Any], reduction: str = "mean") -> Shown:
    """The rest of the forward pass, through the method if it acts there."""
    out = method(**arguments(method, seen)) if isinstance(method, nn.Module) else None
    loss = joint_loss(method, head, seen, out, reduction)
    return Shown(loss, unimodal_losses(seen, reduction), seen, out)


def joint_loss(
    method: Any, head: nn.Module, seen: Mapping[str, Any], out: Any, reduction: str = "mean"
) -> Tensor:
    """The loss from a method in the forward pass, `out` being its result; None without one."""
    passed = getattr(out, "features", seen["features"])
    joint = head(torch.cat(list(passed.values()), 1))
    if hasattr(out, "logits"):  # the joint ones are their sum
        joint = torch.stack(list(out.logits.values())).sum(0)
    loss = F.cross_entropy(joint, seen["labels"], reduction=reduction)
    if not hasattr(out, "loss"):
        return loss
    own = out.loss if reduction == "mean" else int((seen["labels"] != -100).sum()) * out.loss
    return own if getattr(method, "replaces_joint_loss", False) else loss + own


def unimodal_losses(seen: dict[str, Any], reduction: str = "mean") -> dict[str, Tensor]:
    """The last one goes against the joint loss, so that its encoder's gradients conflict."""
    logits = dict(seen["logits"])
    last = list(logits)[-1]
    logits[last] = -logits[last]
    labels = seen["labels"]
    return {n: F.cross_entropy(z, labels, reduction=reduction) for n, z in logits.items()}


def balance(
    method: Any,
    shown: Shown,
    *,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    between: Callable[[], dict[str, Any]] | None = None,
    **more: Any,
) -> Any:
    """Backward pass and method, in the order in which the method wants them; its result.

    `scale` is what a GradScaler does to a loss. `between` is called after a backward pass that is
    not the method's own. It returns further arguments of `step`, beside `more`.
    """
    if not isinstance(method, nn.Module) and method.rule.need.second == "unimodal":
        losses = {name: scale(loss) for name, loss in shown.unimodal_losses.items()}
        if shown.seen.get("way") == "present":
            more["present"] = ways.present(shown.seen)
        return method.backward(scale(shown.loss), unimodal_losses=losses, **more)
    scale(shown.loss).backward()
    if between is not None:
        more |= between()
    if isinstance(method, nn.Module):
        return shown.out
    return method.step(**arguments(method, shown.seen), **more)


def strength(method: Any, seen: Mapping[str, Any], out: Any) -> float:
    """The difference between a step with and without the method; 0 if it has changed nothing."""
    if isinstance(method, nn.Module) and hasattr(out, "features"):
        pairs = zip(out.features.values(), seen["features"].values(), strict=True)
        away = sum(float((a - b).abs().sum().detach()) for a, b in pairs)
        if away or not hasattr(out, "coefficients"):
            return away
    if isinstance(method, nn.Module) and not hasattr(out, "coefficients"):
        return float(out.loss.detach().abs())
    if isinstance(method, nn.Module):  # the forward pass is what it was, or there is a loss more
        # The neutral element is 0 for a loss, and 1 for a factor of a gradient.
        neutral = 0.0 if method.card.acts == "loss" else 1.0
        return float((out.coefficients - neutral).abs().nan_to_num(1.0).sum().detach())
    if method.card.official == ():  # a control, which does the same in every step
        return float(method._acting)
    away = (out.coefficients - method.rule.need.neutral).abs()
    return float(away.nan_to_num(1.0).sum())


def maker(name: str) -> Make:
    """A callable that makes the method from encoders, with a stream of its own if it draws."""

    def with_stream(encoders: Encoders, **changes: Any) -> GradientMethod:
        made: GradientMethod = make(name, encoders, **{"stream": NoiseStream(3), **changes})
        return made

    with_stream.__name__ = name
    return with_stream


#: Methods for which a framework's own backward pass suffices, by the catalogue's names.
MAKERS: dict[str, Make] = {
    KINDS[kind].method: maker(kind) for kind in STEPPING if not KINDS[kind].options
}
ogm_ge, inforeg, redreg = MAKERS["OGM"], MAKERS["InfoReg"], MAKERS["RedReg"]


def needed(method: GradientMethod, seen: dict[str, Any]) -> dict[str, Any]:
    """All arguments but the features and inputs that the method does not look at."""
    more = {"features", "inputs", "way"}.difference(method.rule.need.inputs)
    found = {name: value for name, value in seen.items() if name not in more}
    return ways.arguments(seen["way"], found, seen) if seen.get("way") else found


def acted(method: GradientMethod, results: list[Any]) -> bool:
    """True if a step has modulated anything, as a control does in every one."""
    if method.card.official == ():
        return bool(results)
    idle = method.rule.need.neutral
    return any(bool((r.coefficients != idle).any()) for r in results)
