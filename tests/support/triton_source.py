"""The reads and writes in the source of Triton kernels, and kernels without the mask of one."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from triton.runtime.interpreter import FunctionRewriter, InterpretedFunction

_ACCESSES = ("load", "store", "atomic_")


class Access(NamedTuple):
    """A `tl.load`, `tl.store` or `tl.atomic_...`.

    Attributes:
        module: Its module's name.
        function: Whose source it is in.
        index: Its place among the function's.
        lines: The first and the last one.
        text: Its source.
        masked: It has a mask.
    """

    module: str
    function: str
    index: int
    lines: range
    text: str
    masked: bool

    def __str__(self) -> str:
        file = self.module.rpartition(".")[2]
        return f"{file}.py:{self.lines.start} {self.function}: {' '.join(self.text.split())}"


def _calls(tree: ast.AST) -> list[ast.Call]:
    """The calls in the order in which they stand."""
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "tl"
        and node.func.attr.startswith(_ACCESSES)
    ]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def _masks(call: ast.Call) -> list[ast.keyword]:
    """A mask, and what is read where it is false, which goes with it."""
    return [keyword for keyword in call.keywords if keyword.arg in ("mask", "other")]


def accesses(module: ModuleType) -> Iterator[Access]:
    """The accesses of all functions of a module."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            for index, call in enumerate(_calls(function)):
                lines = range(call.lineno, (call.end_lineno or call.lineno) + 1)
                text = ast.get_source_segment(source, call) or ""
                yield Access(module.__name__, function.name, index, lines, text, bool(_masks(call)))


class _Dropped:
    """The interpreter's reading of a function's source, without a mask of it."""

    def __init__(self, index: int) -> None:
        self._index = index

    def visit(self, tree: ast.AST) -> Any:
        call = _calls(tree)[self._index]
        masks = _masks(call)
        assert masks, f"there is no mask in {ast.unparse(call)}"
        call.keywords = [keyword for keyword in call.keywords if keyword not in masks]
        return FunctionRewriter.ast_transformer.visit(tree)


@contextmanager
def dropped_mask(module: str, function: str, index: int) -> Iterator[None]:
    """Removes the mask of a function's access at this place, in the interpreter, for the block."""
    target = getattr(importlib.import_module(module), function)
    with mock.patch.object(target.rewriter, "ast_transformer", _Dropped(index)):
        rewritten = target.rewriter.rewrite_ast()
    with mock.patch.dict(InterpretedFunction.rewritten_fn, {target.fn: rewritten}):
        yield
