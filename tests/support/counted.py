"""Calls whose cost on the host is counted: a step of each method, and a small call of each op."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial
from inspect import signature
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import samples
import torch
from balancing import IN_FORWARD, KINDS, STEPPING, make, needed, prepare, start
from cuda_on_cpu.launches import counted_launches
from dispatched import launches_of
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse
from mmfuse.ops._registry import OPS

WARM_UP = 20


def _nothing() -> None:
    pass


class Call(NamedTuple):
    """A call that is counted, and another that has to be made before each time.

    Attributes:
        once: The call.
        prepare: Puts back what the call changes.
    """

    once: Callable[[], object]
    prepare: Callable[[], object] = _nothing

    def warm(self) -> None:
        """Calls it until the interpreter, and all that is kept between calls, have settled."""
        for _ in range(WARM_UP):
            self.prepare()
            self.once()
        self.prepare()


class _Networks:
    """Two small encoders and a head, with a batch."""

    def __init__(self) -> None:
        self.encoders = {
            name: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)) for name in ("audio", "visual")
        }
        self.head = nn.Linear(8, 4)
        self.inputs = {name: torch.randn(9, 6) for name in self.encoders}
        self.labels = torch.arange(9) % 4

    def forward(self) -> dict[str, Any]:
        """Everything that a method may look at, under the names of its arguments."""
        features = {name: net(self.inputs[name]) for name, net in self.encoders.items()}
        logits = mmfuse.unimodal_logits(self.head, features)
        return {
            "logits": logits,
            "labels": self.labels,
            "features": features,
            "inputs": self.inputs,
        }

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of all modalities together, and of each one; gradients are those of no step."""
        for net in self.encoders.values():
            net.zero_grad()
        logits = self.forward()["logits"]
        own = {name: F.cross_entropy(z, self.labels) for name, z in logits.items()}
        return F.cross_entropy(sum(logits.values()), self.labels), own


def _on_gradients(kind: str) -> Call:
    """`step` in the third epoch, when every method acts, on the same gradients each time."""
    networks = _Networks()
    method = make(kind, networks.encoders, stream=mmfuse.NoiseStream(3))
    networks.losses()[0].backward()
    parameters = [p for net in networks.encoders.values() for p in net.parameters()]
    gradients = [p.grad.clone() for p in parameters]

    def prepare() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.zero_().copy_(gradient)  # as after zero_grad and a backward pass

    with torch.no_grad():
        seen = networks.forward()
    step = partial(method.step, **needed(method, seen))
    for epoch in range(3):
        method.set_epoch(epoch)
        prepare()
        step()
    prepare()
    return Call(step, prepare)


def _on_losses(kind: str) -> Call:
    """`backward`, with the backward passes that it runs itself."""
    networks = _Networks()
    method = make(kind, networks.encoders)
    start(method)
    given: dict[str, Any] = {}

    def prepare() -> None:
        given["loss"], given["unimodal_losses"] = networks.losses()

    return Call(lambda: method.backward(**given), prepare)


def _in_forward(kind: str) -> Call:
    """The module's forward pass in training."""
    networks = _Networks()
    method = make(kind, networks.encoders)
    start(method)
    features = {name: torch.randn(9, 4).requires_grad_() for name in networks.encoders}
    prepare(method, dict.fromkeys(features, 4), 4, networks.head.weight.detach())
    fused, logits = torch.randn(9, 4), networks.forward()["logits"]
    on_logits = method.card.acts == "logits"
    seen = {
        "features": features,
        "fused": fused,
        "logits": {name: z.detach().requires_grad_(on_logits) for name, z in logits.items()},
    }
    arguments = {name: seen[name] for name in method.card.needs}
    if "fused" in arguments:
        arguments["fused_logits"] = torch.randn(9, 4)
    if "labels" in signature(method.forward).parameters:
        arguments["labels"] = networks.labels
    once = partial(method.forward, **arguments)
    if not on_logits:
        return Call(once)
    # The next step finds what it has seen before: it starts from steps with other labels.
    method.forward(**{**arguments, "labels": networks.labels.flip(0)})
    before = {name: x.clone() for name, x in method.state_dict().items()}
    return Call(once, partial(method.load_state_dict, before))


def _whole_backward() -> Call:
    """`mmfuse.ogm_backward`, with the backward pass in it."""
    networks, stream = _Networks(), mmfuse.NoiseStream(3)
    given: dict[str, Any] = {}

    def prepare() -> None:
        for net in networks.encoders.values():
            net.zero_grad()
        given["logits"] = networks.forward()["logits"]
        given["loss"] = F.cross_entropy(sum(given["logits"].values()), networks.labels)

    def once() -> object:
        return mmfuse.ogm_backward(
            encoders=networks.encoders, labels=networks.labels, stream=stream, **given
        )

    return Call(once, prepare)


def _small(name: str) -> Call:
    return Call(samples.MODULES[name].small("cpu"))


def _of_method(kind: str) -> Callable[[], Call]:
    if kind in IN_FORWARD:
        return partial(_in_forward, kind)
    return partial(_on_gradients if kind in STEPPING else _on_losses, kind)


#: The calls by the name under which the numbers are kept.
CALLS: dict[str, Callable[[], Call]] = {
    **{kind: _of_method(kind) for kind in KINDS},
    "ogm_backward": _whole_backward,
    **{f"ops.{name}": partial(_small, name) for name in samples.MODULES},
}


def made(name: str) -> Call:
    """A call of `CALLS`, warm; the same numbers at every run."""
    torch.manual_seed(3)
    call = CALLS[name]()
    call.warm()
    return call


def frames(name: str) -> int:
    """Python frames of a call; that of a lambda around it does not count."""
    call = made(name).once
    count = 0

    def see(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    gc.disable()  # whose callbacks are frames too
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count - isinstance(call, FunctionType)


def operators(name: str) -> int:
    """Calls that go to PyTorch's dispatcher, views and allocations included."""
    return launches_of(made(name).once).calls


def launches(name: str) -> int:
    """Kernels that a call would launch on a GPU: mmfuse's own in the host shim, and PyTorch's."""
    with mmfuse.use_backend("cuda"):
        call = made(name).once
        with counted_launches() as kernels:
            found = launches_of(call)
    of_pytorch = sum(n for operator, n in found.operators.items() if operator not in OPS)
    return kernels.total() + of_pytorch
