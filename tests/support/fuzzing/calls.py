"""A random call of a public function, judged."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

import mmfuse

from . import judging
from .mistakes import spoil
from .values import Drawer, build


class Call(NamedTuple):
    """Arguments as plain data, the mistakes made in them, and the backends beside the CPU's."""

    arguments: dict[str, Any]
    mistakes: tuple[tuple[int, int], ...] = ()
    also: str | None = None
    recording: bool = True


class Function(NamedTuple):
    """A public function under test.

    Attributes:
        name: As a user says it.
        function: Itself.
        driver: Draws usual arguments.
        compared: True where the reference backend is to have the same result.
    """

    name: str
    function: Callable[..., Any]
    driver: Callable[[Drawer], dict[str, Any]]
    compared: bool = True

    def calls(self) -> st.SearchStrategy[Call]:
        """Calls, most of them with a mistake."""

        @st.composite
        def drawn(draw: Any) -> Call:
            arguments = self.driver(Drawer(draw))
            mistake = st.tuples(st.integers(0, 40), st.integers(0, 45))
            found = draw(st.lists(mistake, max_size=2))
            also = draw(st.sampled_from([None] * 28 + ["cuda", "cuda", "triton"]))
            return Call(arguments, tuple(found), also, draw(st.integers(0, 3)) > 0)

        return drawn()

    def made(self, call: Call) -> tuple[dict[str, Any], list[str]]:
        """The arguments, new ones, and the names of the mistakes."""
        arguments, said = build(call.arguments), []
        for where, how in call.mistakes:
            arguments, what = spoil(arguments, where, how)
            said.append(what)
        return arguments, said

    def describe(self, call: Call) -> str:
        """The call as it can be read and run again."""
        return f"{self.name}\n{call!r}\nmistakes: {self.made(call)[1]}"

    def run(self, call: Call, backend: str | None) -> Any:
        """Calls it, judges errors, and returns the arguments, outcome and gradients."""
        arguments, _ = self.made(call)
        takes = inspect.signature(self.function).parameters
        more = {"backend": backend} if "backend" in takes and backend is not None else {}
        if "backend" in arguments:
            more = {}
        before = judging.snapshot(arguments)
        with torch.set_grad_enabled(call.recording):
            outcome = judging.attempt(lambda: self.function(**arguments, **more))
        if outcome.error is not None:
            judging.check_unchanged(self.name, before, arguments, why="though it raised an error")
            judging.check_error(self.name, outcome.error, [*takes, *arguments])
            return arguments, outcome, []
        kept = {k: v for k, v in arguments.items() if k not in judging.in_place(self.name)}
        if len(kept) == len(arguments):
            judging.check_unchanged(self.name, before, arguments, why="of its arguments")
        gradients: list[Any] = []
        if call.recording and judging.tensors_with_graph(outcome.result):
            derived = judging.attempt(lambda: judging.differentiate(outcome.result, arguments))
            if derived.error is not None:
                judging.check_error(f"{self.name}'s backward", derived.error, takes)
            gradients = derived.result or []
        return arguments, outcome, gradients

    def judge(self, call: Call) -> None:
        """Raises `Found` if something is wrong."""
        try:
            arguments, found, gradients = self.run(call, "cpu" if self.compared else None)
            if not self.compared:
                return
            expected = self.run(call, "reference")
            self._compare("cpu", (arguments, found, gradients), expected)
            if call.also is not None and _small(arguments):
                self._compare(call.also, self.run(call, call.also), expected)
        finally:
            mmfuse.use_backend(None)

    def _compare(self, backend: str, one: Any, other: Any) -> None:
        name = f"{self.name} on {backend}"
        judging.compare_errors(name, one[1], other[1])
        if one[1].error is not None:
            return
        judging.compare(name, one[1].result, other[1].result, "the result")
        judging.compare(name, one[2], other[2], "the gradient")
        written = judging.in_place(self.name)
        if written:
            judging.compare(
                name,
                {k: v for k, v in one[0].items() if k in written},
                {k: v for k, v in other[0].items() if k in written},
                "what is written to",
            )


def _small(arguments: Any) -> bool:
    """True where an interpreter is done in no time."""
    tensors = [x for _, x in judging.leaves(arguments) if isinstance(x, torch.Tensor)]
    return len(tensors) <= 8 and sum(x.numel() for x in tensors) <= 600
