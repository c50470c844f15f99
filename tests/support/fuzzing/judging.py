"""Finds the fault of a call: its result, its error, or what it has left changed."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import linecache
import re
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tolerances
import torch
from torch import Tensor, nn

import mmfuse

PACKAGE = str(Path(mmfuse.__file__).parent)
#: This file has the models that a user would have written.
OWN = str(Path(__file__).with_name("values.py"))
#: The kinds of errors that the docstrings promise.
PROMISED = (TypeError, ValueError, RuntimeError, ImportError)

#: Objects remember these for speed, so as to warn once, or of the latest batch for other ranks.
CACHES = ("_warned", "_warned_of_mode", "registrations", "_looked", "_paired", "_kind", "_waiting")
#: Their docstrings promise for bad input that results are not finite, and no more.
NON_FINITE = ("ops.grad_stats",)


class Found(Exception):  # noqa: N818
    """Something is wrong.

    Attributes:
        key: The same for everything with one cause.
    """

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"{key}\n{text}")
        self.key = key


class Outcome(NamedTuple):
    """The result or the error of a call."""

    result: Any = None
    error: Exception | None = None


def attempt(call: Callable[[], Any]) -> Outcome:
    """The call's outcome; warnings are no concern here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Outcome(call())
        except Exception as error:
            return Outcome(error=error)


def leaves(tree: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """All values within containers, dataclasses and objects of this package, with their places."""
    yield from _leaves(tree, path, set())


def _leaves(tree: Any, path: str, seen: set[int]) -> Iterable[tuple[str, Any]]:
    if isinstance(tree, Tensor):
        yield path, tree
        return
    own = type(tree).__module__.startswith(("mmfuse.", "mmfuse"))
    holds = isinstance(tree, (dict, list, tuple, nn.Module)) or own
    if not holds or inspect.isclass(tree) or inspect.isroutine(tree):
        yield path, tree
        return
    if id(tree) in seen:
        return
    seen.add(id(tree))
    for key, value in _parts(tree):
        yield from _leaves(value, f"{path}.{key}", seen)


def _parts(tree: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(tree, dict):
        return list(tree.items())
    if isinstance(tree, (list, tuple)):
        return enumerate(tree)
    if isinstance(tree, nn.Module):
        named = [*tree.named_parameters(), *tree.named_buffers()]
        own = type(tree).__module__.startswith("mmfuse")
        plain = [
            (k, v)
            for k, v in vars(tree).items()
            if own and k not in ("_parameters", "_buffers", "_modules", *CACHES)
        ]
        return [*named, ("training", tree.training), *plain]
    if dataclasses.is_dataclass(tree):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    fields = dict(getattr(tree, "__dict__", {}))
    for kind in type(tree).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if hasattr(tree, name):
                fields[name] = getattr(tree, name)
    return [(k, v) for k, v in fields.items() if k not in CACHES]


def bits(x: Tensor) -> Any:
    """All that a caller can see of a tensor, and the memory around it."""
    about = (x.dtype, tuple(x.shape), x.device.type, x.requires_grad)
    if x.device.type != "cpu" or x.layout is not torch.strided:
        return about
    with torch.no_grad(), contextlib.suppress(RuntimeError, NotImplementedError):
        memory = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
        return *about, x.stride(), memory.numpy().tobytes()
    return about


def snapshot(*trees: Any) -> dict[str, Any]:
    """Every tensor, gradient, number and text within, and the state of PyTorch's generator."""
    found: dict[str, Any] = {"PyTorch's generator": bits(torch.get_rng_state())}
    found["grad mode"] = torch.is_grad_enabled()
    for i, tree in enumerate(trees):
        for path, leaf in leaves(tree, str(i)):
            if isinstance(leaf, Tensor):
                found[path] = bits(leaf)
                if leaf.is_leaf:
                    grad = leaf.grad
                    found[f"{path}'s gradient"] = None if grad is None else bits(grad)
            elif isinstance(leaf, (bool, int, float, str, bytes, torch.dtype)) or leaf is None:
                found[path] = repr(leaf)
    return found


def check_unchanged(name: str, before: dict[str, Any], *trees: Any, why: str) -> None:
    """Raises `Found` for the first thing that is no longer what it was."""
    after = snapshot(*trees)
    changed = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    if changed:
        place = re.sub(r"\d+", "0", changed[0])
        raise Found(f"{name}: changed {place} {why}", f"changed: {changed[:8]}")


def own_raise(error: Exception) -> str | None:
    """The line of mmfuse that has raised it by a `raise`; None for an accident within."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    if last is None or not last.filename.startswith(PACKAGE):
        return None
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return line if line.startswith("raise") or "refuse" in line else None


def place_of(error: Exception) -> str:
    """The innermost line of mmfuse that the error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(PACKAGE)]
    return f"{Path(own[-1].filename).name}:{own[-1].name}: {own[-1].line}" if own else "outside"


def from_users_code(error: Exception) -> bool:
    """True for what a user's model, called by mmfuse, has raised on its own."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = max((i for i, file in enumerate(files) if file.startswith(PACKAGE)), default=-1)
    return ours >= 0 and OWN in files[ours + 1 :]


def check_error(name: str, error: Exception, names: Iterable[str]) -> None:
    """Raises `Found` for an error of a kind that is not promised, or that names no argument."""
    if from_users_code(error):
        return
    text = "".join(traceback.format_exception(error))
    kind = type(error).__name__
    if not isinstance(error, PROMISED) or type(error) is NotImplementedError:
        raise Found(f"{name}: {kind} at {place_of(error)}", text) from error
    said = any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", str(error)) for word in names)
    last = traceback.extract_tb(error.__traceback__)[-1:]
    said = said or any(f.filename == OWN for f in last)
    # PyTorch's own words, which say what to do: a tensor of inference mode, a loss's target.
    said = said or any(word in str(error) for word in ("nference tensor", "arget"))
    if own_raise(error) is None and not said:
        raise Found(f"{name}: {kind} names no argument, at {place_of(error)}", text) from error


def difference(found: Tensor, expected: Tensor, *, non_finite: bool = True) -> str | None:
    """How a result differs by more than `tolerances.whole_case` allows, or None.

    Without `non_finite` one number that is not finite is as good as another.
    """
    if found.dtype != expected.dtype or found.shape != expected.shape:
        what = f"{found.dtype} {list(found.shape)}"
        return f"is {what} instead of {expected.dtype} {list(expected.shape)}"
    if found.device.type == "meta" or not found.numel():
        return None
    found, expected = (x.detach().to_dense() for x in (found, expected))
    if not (found.is_floating_point() or found.is_complex()):
        return None if torch.equal(found, expected) else "is not the reference's"
    same = (found == expected) | (found.isnan() & expected.isnan())
    if not non_finite:
        same |= ~(found.isfinite() | expected.isfinite())
    plain = torch.where(expected.isfinite(), expected, 0.0)
    near = (found.double() - expected.double()).abs() <= tolerances.whole_case(plain)
    wrong = ~(same | (near & expected.isfinite()))
    if not wrong.any():
        return None
    i = int(wrong.flatten().nonzero()[0])
    x, y = found.flatten()[i].item(), expected.flatten()[i].item()
    return f"{int(wrong.sum())} of {wrong.numel()} differ; [{i}] is {x:.8g} instead of {y:.8g}"


def compare(name: str, found: Any, expected: Any, what: str) -> None:
    """Raises `Found` where two trees of results differ in a tensor."""
    one, other = (dict(leaves(tree)) for tree in (found, expected))
    if one.keys() != other.keys():
        raise Found(f"{name}: {what} has other parts", f"{sorted(one)} and {sorted(other)}")
    for path, x in one.items():
        y = other[path]
        if isinstance(x, Tensor) != isinstance(y, Tensor):
            raise Found(f"{name}: {what}{path} is of another kind", f"{x!r} and {y!r}")
        exact = not name.startswith(NON_FINITE)
        why = difference(x, y, non_finite=exact) if isinstance(x, Tensor) else None
        if why is not None:
            raise Found(f"{name}: {what}{re.sub(r'[0-9]+', '0', path)} differs", why)


def compare_errors(name: str, found: Outcome, expected: Outcome) -> None:
    """Raises `Found` where one backend raises an error and another none, or one of another kind."""
    kinds = [type(o.error).__name__ if o.error else "no error" for o in (found, expected)]
    if kinds[0] != kinds[1]:
        shown = [o.error for o in (found, expected) if o.error]
        text = "".join("".join(traceback.format_exception(e)) for e in shown)
        raise Found(f"{name}: {kinds[0]} where the reference has {kinds[1]}", text)


def tensors_with_graph(tree: Any) -> list[Tensor]:
    """The tensors of a result that can be differentiated."""
    return [x for _, x in leaves(tree) if isinstance(x, Tensor) and x.requires_grad]


def differentiate(result: Any, arguments: Any) -> list[Tensor | None]:
    """Gradients of the sum of all results, by all arguments that want one."""
    wanted = [x for _, x in leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]
    wanted = [x for x in wanted if x.is_leaf]
    roots = [x for x in tensors_with_graph(result) if x.numel() and not x.is_meta]
    if not wanted or not roots:
        return []
    total = torch.stack([x.double().sum() for x in roots]).sum()
    return list(torch.autograd.grad(total, wanted, allow_unused=True))


def in_place(name: str) -> set[str]:
    """The arguments that a function writes to, by their names."""
    written = {
        "update_grads_": {"grads", "finite", "sq_norm"},
        "keep_state_": {"state"},
        "ogm_backward": {"loss", "encoders", "stream"},
    }
    return written.get(name.rpartition(".")[2], set())
