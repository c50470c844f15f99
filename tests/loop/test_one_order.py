"""Modalities in one order on all ranks: their numbers are averaged by it, so that it is checked.

A dict that was made from a set of names has another order in each process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from balancing import KINDS, NAMED, STEPPING, TWO_GRADIENTS, make, start
from ranks import ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import mmfuse

NAMES = ("audio", "visual", "text")
ROWS, WIDTH, CLASSES = 6, 4, 3


def in_order(rank: int, given: dict[str, Any], alike: bool) -> dict[str, Any]:
    """The second rank's dict has another order, if not alike."""
    return given if alike or not rank else {name: given[name] for name in reversed(given)}


def nets_of() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(WIDTH, CLASSES) for name in NAMES})


def error_of(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Counted:
    """How often the ranks compare their names."""

    def __enter__(self) -> list[int]:
        self.original, found = dist.all_gather, []

        def all_gather(*given: Any, **more: Any) -> Any:
            found.append(1)
            return self.original(*given, **more)

        dist.all_gather = all_gather
        return found

    def __exit__(self, *_: object) -> None:
        dist.all_gather = self.original


def on_gradients(rank: int, kind: str, alike: bool) -> tuple[list[str], int, list[Tensor]]:
    """Errors of two steps, how often names were compared in two more, and the gradients."""
    nets = nets_of()
    replica = DistributedDataParallel(nets["audio"])  # one that reduces in the backward pass
    method = make(kind, in_order(rank, dict(nets.items()), alike))
    start(method)
    x, labels = torch.randn(ROWS, WIDTH), torch.arange(ROWS) % CLASSES

    def step() -> None:
        nets.zero_grad()
        inputs = dict.fromkeys(NAMES, x)
        logits = {name: (replica if name == "audio" else nets[name])(x) for name in NAMES}
        loss = F.cross_entropy(sum(logits.values()), labels)
        if kind in TWO_GRADIENTS:
            losses = mmfuse.unimodal_losses(logits, labels)
            method.backward(loss, unimodal_losses=losses)
            return
        seen = {"features": logits, "inputs": inputs}
        more = {name: seen[name] for name in method.rule.need.inputs}
        loss.backward()
        method.step({name: z.detach() for name, z in logits.items()}, labels, **more)

    with Counted() as compared:
        errors = [error_of(step) for _ in range(2)]
    return errors, len(compared), [p.grad for p in nets.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", [*STEPPING, *TWO_GRADIENTS])
def test_of_encoders(kind: str) -> None:
    first, second = ranks(2).run(on_gradients, kind, False)
    for rank, (errors, compared, _) in enumerate((first, second)):
        own = list(NAMES)[:: 1 - 2 * rank]
        for text in errors:
            assert text.startswith("ValueError: the ranks have other modalities, or the same ones")
            assert f"rank {rank} has {own}" in text and "sorted(...)" in text
        assert compared == 2
    for errors, compared, _ in ranks(2).run(on_gradients, kind, True):
        assert errors == ["", ""] and compared == 1


def in_forward(rank: int, kind: str, alike: bool) -> tuple[list[str], int, dict[str, Tensor]]:
    torch.manual_seed(1)
    method = make(kind, {}, num_modalities=3)
    start(method)
    before = {name: x.clone() for name, x in method.state_dict().items()}

    def step() -> None:
        values = {name: torch.randn(ROWS, WIDTH) for name in NAMES}
        given = in_order(rank, values, alike)
        logits = in_order(rank, {n: torch.randn(ROWS, CLASSES) for n in NAMES}, alike)
        labels, fused = torch.arange(ROWS) % CLASSES, torch.randn(ROWS, WIDTH)
        if isinstance(method, mmfuse.PMR):
            method.update_prototypes([(given, labels)])
        elif isinstance(method, mmfuse.AGM):
            method(logits, labels)
        elif isinstance(method, mmfuse.ARM):
            method(given, fused, logits, fused[:, :CLASSES], labels)
        else:
            method(given, logits, labels)

    with Counted() as compared:
        errors = [error_of(step) for _ in range(2)]
    after = method.state_dict()
    changed = [n for n, x in before.items() if not torch.equal(x, after[n])]
    return errors, len(compared), changed


@pytest.mark.parametrize("kind", NAMED)
def test_of_modules(kind: str) -> None:
    for rank, (errors, compared, changed) in enumerate(ranks(2).run(in_forward, kind, False)):
        own = list(NAMES)[:: 1 - 2 * rank]
        assert all(f"rank {rank} has {own}" in text for text in errors)
        assert compared == 2 and changed == []
    for errors, compared, changed in ranks(2).run(in_forward, kind, True):
        assert errors == ["", ""] and compared == 1 and changed


def relearnt(rank: int, alike: bool) -> str:
    nets = nets_of()
    method = mmfuse.ReLearning(in_order(rank, dict(nets.items()), alike))
    features = {name: torch.randn(ROWS, WIDTH) for name in NAMES}
    labels = torch.arange(ROWS) % CLASSES
    given = (features, labels, features, labels)
    return error_of(lambda: method.weights(*given, cluster=lambda x: torch.zeros(len(x)).long()))


def test_of_relearning() -> None:
    assert ranks(2).run(relearnt, True) == ["", ""]
    for rank, text in enumerate(ranks(2).run(relearnt, False)):
        assert f"rank {rank} has {list(NAMES)[:: 1 - 2 * rank]}" in text


def functional(rank: int) -> list[int]:
    """`ogm_backward` makes another object in each call, and compares once all the same."""
    nets, found = nets_of(), []
    for _ in range(3):
        x, labels = torch.randn(ROWS, WIDTH), torch.arange(ROWS) % CLASSES
        nets.zero_grad()
        logits = {name: net(x) for name, net in nets.items()}
        loss = F.cross_entropy(sum(logits.values()), labels)
        with Counted() as compared:
            mmfuse.ogm_backward(loss, dict(nets.items()), logits, labels, noise=False)
        found.append(len(compared))
    return found


def test_the_functional_form_compares_once() -> None:
    first, second = ranks(2).run(functional)
    assert first == second and first[1:] == [0, 0]


def test_all_methods_with_an_order_are_here() -> None:
    """The others decide nothing by all ranks' samples, or draw numbers of each rank's own."""
    rest = set(KINDS) - {*STEPPING, *TWO_GRADIENTS, *NAMED}
    assert not any(getattr(mmfuse.METHODS[k], "decides_over_ranks", True) for k in rest)
