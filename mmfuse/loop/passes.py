"""Further passes through a user's modules, which leave no trace in them.

A method sometimes needs a module's output for another input than the training's. Such a pass must
not move batch norm's statistics, training flags or PyTorch's random state, nor leave parameters
gathered that FSDP2 had sharded: after an optimizer's step they would be the old ones. A user's
forward hooks run in it as in any other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import register_module_forward_pre_hook

# Device types whose generators `fork_rng` keeps, or that have none.
_KEPT = ("cpu", "cuda", "meta")


@contextmanager
def scoring(call: Callable[..., object], device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, and the random state and training flags as before.

    In evaluation mode batch norm leaves its statistics alone. A module's flags are switched one by
    one, for `train(True)` afterwards would also wake those that a user has frozen. The
    modules of a plain callable are only known once it calls them, so that each is switched then.

    Args:
        call: The module or callable that will be called.
        device: Its device; that one's random generator is kept as well.
    """
    with torch.no_grad(), _evaluation(call, device, lambda module: not _of_pytorch(module)):
        yield


@contextmanager
def evaluating(call: Callable[..., object], device: torch.device) -> Iterator[None]:
    """The same with gradients, for passes in evaluation mode that a loss goes through.

    The graph of such a pass keeps batch norm's statistics for the backward pass, before which the
    next training pass may change them in place: so all buffers are copies meanwhile.

    Args:
        call: The module or callable that will be called.
        device: Its device; that one's random generator is kept as well.
    """
    with _evaluation(call, device, lambda module: True):
        yield


@contextmanager
def _evaluation(
    call: Callable[..., object], device: torch.device, copies: Callable[[nn.Module], bool]
) -> Iterator[None]:
    """Evaluation mode; modules that `copies` says so of have copies of their buffers."""
    switched: list[nn.Module] = []
    kept = _Kept()

    def switch(module: nn.Module, *_: object) -> None:
        for each in module.modules():
            if each.training:
                each.training = False
                switched.append(each)
            if copies(each):
                kept.replace(each)

    with _on_the_way_in(call, switch), _random_state(device):
        try:
            yield
        finally:
            kept.restore()
            for module in switched:
                module.training = True


def _of_pytorch(module: nn.Module) -> bool:
    """One of PyTorch's own, which change no buffers in evaluation mode; no unit of FSDP2 is."""
    return type(module).__module__.startswith("torch.nn.modules.")


@contextmanager
def training(call: Callable[..., object], device: torch.device) -> Iterator[None]:
    """The modules' own mode, for passes that a loss goes through; buffers are copies meanwhile.

    Writing the old values back afterwards would not do: `backward` refuses buffers that have been
    changed in place. So the modules have other tensors while they run, and get theirs back.

    Args:
        call: The module or callable that will be called.
        device: Its device; that one's random generator is kept as well.
    """
    kept = _Kept()

    def copy(module: nn.Module, *_: object) -> None:
        for each in module.modules():
            kept.replace(each)

    with _on_the_way_in(call, copy), _random_state(device):
        try:
            yield
        finally:
            kept.restore()


def check_made(what: str, module: nn.Module) -> None:
    """Checks that no module is lazy still: a pass of ours would give it its first weights.

    Raises:
        ValueError: one is.
    """
    if any(isinstance(each, LazyModuleMixin) for each in module.modules()):
        raise ValueError(f"the {what} is lazy and has no weight yet: call the model once first")


class _Kept:
    """Modules whose buffers are copies for a while, and FSDP2's parameters as they were."""

    def __init__(self) -> None:
        self._kept: dict[nn.Module, dict[str, Tensor | None]] = {}
        # A unit of `fully_shard`; nothing is one where nobody has imported it.
        self._unit: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
        self._units: dict[nn.Module, list[Tensor | None]] = {}

    def replace(self, module: nn.Module) -> None:
        """Gives a module copies, once, and keeps what parameters a unit has."""
        if isinstance(module, self._unit) and module not in self._units:
            self._units[module] = _parameters_of(module, self._unit)
        if module._buffers and module not in self._kept:
            before = self._kept[module] = dict(module._buffers)
            for name, buffer in before.items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    def restore(self) -> None:
        """Gives every module its own back; what the passes have gathered is sharded again."""
        for module, before in self._kept.items():
            module._buffers.update(before)
        for unit, parameters in self._units.items():
            # A unit that was gathered before, as between forward and backward pass, stays so.
            if any(map(is_not, parameters, _parameters_of(unit, self._unit))):
                unit.reshard()  # type: ignore[operator]


def _parameters_of(unit: nn.Module, kind: type) -> list[Tensor | None]:
    """A unit's own parameters, which are other objects while FSDP2 has gathered them."""
    found: list[Tensor | None] = []
    modules = [unit]
    while modules:
        module = modules.pop()
        found += module._parameters.values()
        modules += [each for each in module.children() if not isinstance(each, kind)]
    return found


@contextmanager
def _on_the_way_in(call: Callable[..., object], do: Callable[..., None]) -> Iterator[None]:
    """Does it to a module now, or to every module that a plain callable calls."""
    if isinstance(call, nn.Module):
        do(call)
        yield
        return
    owner = getattr(call, "__self__", None)
    if isinstance(owner, getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())):
        do(owner)  # as of register_fsdp_forward_method: gathered before any module is called
    hook: Any = register_module_forward_pre_hook(do)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """PyTorch's random state as it was, afterwards.

    Not in a compiled graph, which cannot keep it: there a pass that draws random numbers, as
    dropout does in training, moves it on.
    """
    if torch.compiler.is_dynamo_compiling():
        yield
        return
    # A generator cannot be read while a CUDA graph is recorded.
    on_gpu = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    with torch.random.fork_rng([device] if on_gpu else []):
        if device.type in _KEPT:
            yield
        else:
            with _generator_of(device):
                yield


@contextmanager
def _generator_of(device: torch.device) -> Iterator[None]:
    """The random generator of an `xpu`, an `mps` or another device as it was, afterwards."""
    module: Any = torch.get_device_module(device)
    if not module.is_available():
        yield
        return
    which = () if device.type == "mps" else (device,)  # of which there is one
    state = module.get_rng_state(*which)
    try:
        yield
    finally:
        module.set_rng_state(state, *which)
