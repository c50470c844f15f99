"""Sequences of calls of a method in a random order, in the CPU's world and in the reference's.

A sequence is plain data, as a call is, so that one kind of report and one way to shrink serve both.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from balancing import KINDS
from hypothesis import strategies as st
from torch import Tensor, nn

from . import judging
from .mistakes import spoil
from .worlds import OTHERS, World

#: These have a training step of their own; beside them stand the other methods.
SEQUENCES = (*KINDS, *OTHERS)


class Step(NamedTuple):
    """One call: its place among the world's actions, a number for it, and mistakes."""

    action: int
    number: int
    mistakes: tuple[tuple[int, int], ...] = ()


class Plan(NamedTuple):
    """A sequence, and the options of the world."""

    double: bool
    update: bool
    steps: tuple[Step, ...]


class Sequence:
    """The method of a kind, as a target."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = f"steps of {kind}"

    def calls(self) -> st.SearchStrategy[Plan]:
        """Up to ten calls; one in three has a mistake."""
        mistake = st.tuples(st.integers(0, 30), st.integers(0, 45))
        mistakes = st.one_of(st.just(()), st.just(()), st.tuples(mistake))
        step = st.builds(Step, st.integers(0, 19), st.integers(0, 40), mistakes)
        steps = st.lists(step, min_size=1, max_size=10).map(tuple)
        return st.builds(Plan, st.booleans(), st.booleans(), steps)

    def describe(self, plan: Plan) -> str:
        """The sequence as it can be read, and as it can be run again."""
        lines = [f"{self.name}", repr(plan)]
        torch.manual_seed(0)
        world = World(self.kind, "reference", plan.double, plan.update)
        for step in plan.steps:
            name = _action(world, step)
            call, arguments = world.actions[name](step.number)
            arguments, said = _spoilt(arguments, step)
            lines.append(f"  {name}({', '.join(arguments)})  {said}")
            judging.attempt(lambda call=call, arguments=arguments: call(**arguments))
        return "\n".join(lines)

    def judge(self, plan: Plan) -> None:
        """Raises `Found` if something is wrong."""
        torch.manual_seed(0)
        one, other = (World(self.kind, b, plan.double, plan.update) for b in ("cpu", "reference"))
        for step in plan.steps:
            name = f"{self.name}: {_action(one, step)}"
            found, expected = (self._act(name, world, step) for world in (one, other))
            judging.compare_errors(name, found, expected)
            if found.error is None:
                judging.compare(name, found.result, expected.result, "the result")
            judging.compare(name, _gradients(one), _gradients(other), "the gradient")

    def _act(self, name: str, world: World, step: Step) -> judging.Outcome:
        call, arguments = world.actions[_action(world, step)](step.number)
        arguments, _ = _spoilt(arguments, step)
        trees = (world.method, world.encoders, world.head, arguments)
        before = judging.snapshot(*trees)
        outcome = judging.attempt(lambda: call(**arguments))
        if outcome.error is not None:
            # PyTorch's own `load_state_dict` of a module takes over what fits, in its own words.
            if isinstance(world.method, nn.Module) and "state_dict" in arguments:
                return outcome
            judging.check_unchanged(name, before, *trees, why="though it raised an error")
            takes = inspect.signature(call).parameters
            judging.check_error(name, outcome.error, [*takes, *arguments, *WORDS])
        elif isinstance(getattr(outcome.result, "features", None), dict):
            self._backward(name, outcome.result)
        return outcome

    def _backward(self, name: str, result: Any) -> None:
        """Back-propagates through what a module passes on."""
        roots = [x for x in result.features.values() if x.requires_grad]
        if not roots:
            return
        total = torch.stack([x.double().sum() for x in roots]).sum()
        outcome = judging.attempt(lambda: total.backward(retain_graph=True))
        if outcome.error is not None:
            judging.check_error(f"{name}'s backward", outcome.error, WORDS)


#: Errors may name these beside arguments.
WORDS = ("gradient", "parameter", "parameters", "encoders", "inputs", "features", "logits", "state")


def _action(world: World, step: Step) -> str:
    names = list(world.actions)
    return names[step.action % len(names)]


def _spoilt(arguments: dict[str, Any], step: Step) -> tuple[dict[str, Any], list[str]]:
    said = []
    if set(arguments) & {"number", "mode", "epoch"}:
        return arguments, said
    for where, how in step.mistakes:
        arguments, what = spoil(arguments, where, how)
        said.append(what)
    return arguments, said


def _gradients(world: World) -> list[Tensor | None]:
    nets = (*world.encoders.values(), world.head)
    return [p.grad for net in nets for p in net.parameters()]
