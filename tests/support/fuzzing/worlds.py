"""Two encoders, a head and a method, and what can be done with them: one world for each backend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

import balancing
import torch
from balancing import KINDS
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse
from mmfuse import METHODS, NoiseStream

NAMES = ("audio", "visual")
CLASSES, WIDTH, FEATURES = 5, 3, 4
#: Methods of which a training step has no part in `balancing.KINDS`.
OTHERS = tuple(name for name, made in METHODS.items() if made.card.acts in ("head", "parameter"))
#: The arguments of `set_epoch`.
EPOCHS: tuple[Any, ...] = (0, 1, 2, 3, -1, 1.5, "1", None, True, 10**6, 2**70, torch.tensor(1))
Action = Callable[..., Any]


def _network(inputs: int, outputs: int, seed: int, dtype: torch.dtype) -> nn.Module:
    net = nn.Linear(inputs, outputs, dtype=dtype)
    for i, p in enumerate(net.parameters()):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)))
    return net


class World:
    """A method on a backend, with the networks that it is for.

    Attributes:
        actions: By name, a function without arguments that gives a call and its arguments.
    """

    def __init__(self, kind: str, backend: str, double: bool, update: bool) -> None:
        dtype = torch.float64 if double else torch.float32
        self.kind, self.backend, self.dtype = kind, backend, dtype
        self.encoders = {n: _network(WIDTH, FEATURES, i, dtype) for i, n in enumerate(NAMES)}
        self.head = _network(2 * FEATURES, CLASSES, 9, dtype)
        self.seen: dict[str, Any] = {}
        self.losses: tuple[Tensor, dict[str, Tensor]] | None = None
        self.saved: Any = None
        self.way: str | None = None
        update = update and kind in balancing.ON_UPDATES
        self.method = self._made(update)
        if update:
            both = [*self.encoders["audio"].parameters(), *self.encoders["visual"].parameters()]
            self.optimizer = torch.optim.SGD(both, lr=0.1)
            self.method.attach(self.optimizer)
        self.actions = self._actions()

    def _made(self, update: bool) -> Any:
        more: dict[str, Any] = {"backend": self.backend, "process_group": False}
        if self.kind == "MLA":
            self.head = _network(FEATURES, CLASSES, 9, self.dtype)
            return mmfuse.MLA(self.head, **more)
        if self.kind == "ReLearning":
            return mmfuse.ReLearning(self.encoders, num_classes=CLASSES, **more)
        name = KINDS[self.kind].method
        takes = signature(METHODS[name]).parameters
        if self.kind not in balancing.ON_GRADIENTS:
            more = {k: v for k, v in more.items() if k in takes}
        if update:
            more["apply_to"] = "update"
        return balancing.make(self.kind, self.encoders, stream=NoiseStream(5), **more)

    def _actions(self) -> dict[str, Callable[[int], tuple[Action, dict[str, Any]]]]:
        method = self.method
        found: dict[str, Callable[[int], tuple[Action, dict[str, Any]]]] = {
            "pass": lambda n: (self._pass, {"number": n % 7}),
            "set_epoch": lambda n: (method.set_epoch, {"epoch": EPOCHS[n % len(EPOCHS)]}),
            "spoil": lambda n: (self._spoil, {"number": n}),
            "freeze": lambda n: (self._freeze, {"number": n}),
        }
        if hasattr(method, "state_dict"):
            found["save"] = lambda _: (self._save, {})
            found["load"] = lambda _: (method.load_state_dict, {"state_dict": self._saved()})
        if hasattr(method, "begin"):
            found["begin"] = lambda _: (method.begin, {})
        if hasattr(method, "forget"):
            found["forget"] = lambda _: (method.forget, {})
        if self.kind == "MLA":
            return found | {
                "step": lambda n: (method.step, self._turn(n)),
                "fuse": lambda n: (method.fuse, self._fused(n)),
            }
        if self.kind == "ReLearning":
            return found | {
                "due": lambda n: (method.due, {"epoch": EPOCHS[n % len(EPOCHS)]}),
                "weights": lambda n: (method.weights, self._purity(n)),
                "reset": lambda _: (method.reset, {"weights": torch.tensor([0.2, 0.7])}),
            }
        if isinstance(method, nn.Module):
            found |= {
                "forward": lambda n: (method.forward, self._shown(n)),
                "train": lambda n: (method.train, {"mode": bool(n % 3)}),
                "reset_parameters": lambda _: (method.reset_parameters, {}),
            }
            if hasattr(method, "update_prototypes"):
                batch = lambda: [(self._features(), self._labels())]  # noqa: E731
                found["update_prototypes"] = lambda _: (
                    method.update_prototypes,
                    {"batches": batch()},
                )
            return found
        found["backward"] = lambda n: (method.backward, self._losses(n))
        if self.kind not in balancing.TWO_GRADIENTS:
            found["observe"] = lambda n: (method.observe, self._shown(n))
            found["step"] = lambda n: (method.step, self._shown(n) if n % 4 else {})
        return found

    # The actions' calls and arguments -------------------------------------------------------------

    def _labels(self) -> Tensor:
        return self.seen["labels"] if self.seen else torch.arange(6) % CLASSES

    def _features(self) -> dict[str, Tensor]:
        if not self.seen:
            self._pass(0)
        return dict(self.seen["features"])

    def _pass(self, number: int) -> None:
        """Forward and backward; the gradients are new."""
        generator = torch.Generator().manual_seed(number)
        rows = 6 + number
        inputs = {n: torch.randn(rows, WIDTH, generator=generator, dtype=self.dtype) for n in NAMES}
        labels = torch.randint(0, CLASSES, (rows,), generator=generator)
        for net in (*self.encoders.values(), self.head):
            net.zero_grad()
        features = {n: net(inputs[n]) for n, net in self.encoders.items()}
        if self.kind == "MLA":
            self.seen = {"features": features, "labels": labels}
            F.cross_entropy(self.head(features["audio"]), labels).backward()
            return
        self.seen = balancing.see(self.head, features, inputs, labels)
        logits = self.seen["logits"]
        own = {n: F.cross_entropy(z, labels) for n, z in logits.items()}
        self.losses = F.cross_entropy(sum(logits.values()), labels), own
        if any(p.requires_grad for net in self.encoders.values() for p in net.parameters()):
            self.losses[0].backward(retain_graph=True)

    def _shown(self, number: int) -> dict[str, Any]:
        """The arguments of `step`, `observe` or a forward pass, told in one of the ways."""
        if not self.seen:
            self._pass(0)
        ways = [None, *[way for kind, way in balancing.WITH_MORE if kind == self.kind]]
        way = ways[number % len(ways)]
        seen = {**self.seen, "way": way if way != "criterion" else None}
        return balancing.arguments(self.method, seen)

    def _losses(self, number: int) -> dict[str, Any]:
        if self.losses is None:
            self._pass(0)
        assert self.losses is not None
        found: dict[str, Any] = {"loss": self.losses[0], "retain_graph": True}
        if self.kind in balancing.TWO_GRADIENTS:
            return {**found, "unimodal_losses": self.losses[1]}
        return found | self._shown(number)

    def _fused(self, number: int) -> dict[str, Any]:
        logits = {n: self.head(x).detach() for n, x in self._features().items()}
        rows = len(self._labels())
        present = {n: torch.arange(rows) % 3 != i for i, n in enumerate(NAMES)}
        return {"logits": logits, "present": present} if number % 2 else {"logits": logits}

    def _turn(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = {"features": self._features()["audio"]}
        return {**found, "present": self._labels() < number % 4} if number % 2 else found

    def _purity(self, number: int) -> dict[str, Any]:
        features = {n: x.detach() for n, x in self._features().items()}
        labels = self._labels()
        return {
            "train_features": features,
            "train_labels": labels,
            "val_features": features,
            "val_labels": labels,
            "cluster": lambda x: (x.sum(1) > 0).long(),
            "val_present": {n: labels != i for i, n in enumerate(features)} if number % 2 else None,
        }

    def _spoil(self, number: int) -> None:
        """Does to a gradient what training may do to it."""
        parameters = [p for net in self.encoders.values() for p in net.parameters()]
        p = parameters[number % len(parameters)]
        if p.grad is None:
            return
        values = [torch.nan, torch.inf, 0.0, None, 1e30]
        value = values[number % len(values)]
        if value is None:
            p.grad = None
        else:
            p.grad = torch.full_like(p.grad, value)

    def _freeze(self, number: int) -> None:
        parameters = [p for net in self.encoders.values() for p in net.parameters()]
        p = parameters[number % len(parameters)]
        p.requires_grad_(not p.requires_grad)
        p.grad = None

    def _save(self) -> None:
        self.saved = copy.deepcopy(self.method.state_dict())

    def _saved(self) -> Any:
        return copy.deepcopy(self.saved if self.saved is not None else self.method.state_dict())
