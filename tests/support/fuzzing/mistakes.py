"""Mistakes in arguments: one value of them is replaced by another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmfuse import NoiseStream

Ways = dict[str, Callable[[Any], Any]]


def _with(x: Tensor, value: float) -> Tensor:
    out = x.detach().clone(memory_format=torch.contiguous_format)
    if out.numel() and (out.is_floating_point() or out.is_complex()):
        out.view(-1)[out.numel() // 2] = value
    return out


def _longer(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1] if x.shape[0] else x.new_zeros(1, *x.shape[1:])]) if x.dim() else x


ANYTHING: Ways = {
    "None": lambda _: None,
    "a text": lambda _: "text",
    "3": lambda _: 3,
    "-1": lambda _: -1,
    "2.5": lambda _: 2.5,
    "NaN": lambda _: float("nan"),
    "[]": lambda _: [],
    "{}": lambda _: {},
    "a list of it": lambda x: [x],
    "an object": lambda _: object(),
}
OF_TENSORS: Ways = {
    "a dimension more": lambda x: x.unsqueeze(0),
    "flat": lambda x: x.reshape(-1),
    "its sum": lambda x: x.sum(),
    "empty": lambda x: x.reshape(-1)[:0],
    "one row less": lambda x: x[:-1] if x.dim() else x,
    "one row more": _longer,
    "a last dimension more": lambda x: x.unsqueeze(-1),
    "one column": lambda x: x[..., :1] if x.dim() else x,
    "int64": lambda x: x.to(torch.int64),
    "int32": lambda x: x.to(torch.int32),
    "uint8": lambda x: x.to(torch.uint8),
    "bool": lambda x: x.to(torch.bool),
    "complex64": lambda x: x.to(torch.complex64),
    "float16": lambda x: x.to(torch.float16),
    "float32": lambda x: x.to(torch.float32),
    "float64": lambda x: x.to(torch.float64),
    "float8": lambda x: x.to(torch.float32).to(torch.float8_e4m3fn),
    "on meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.detach().to_sparse(),
    "a NaN in it": lambda x: _with(x, torch.nan),
    "an Inf in it": lambda x: _with(x, torch.inf),
    "an -Inf in it": lambda x: _with(x, -torch.inf),
    "a huge number in it": lambda x: _with(x, 1e4),
    "zeros": lambda x: torch.zeros_like(x),
    "negated": lambda x: ~x if x.dtype is torch.bool else -x.to(_signed(x)),
    "plus 100": lambda x: x.to(_signed(x)) + 100,
    "requires grad": lambda x: x.detach().clone().requires_grad_() if x.is_floating_point() else x,
    "detached": lambda x: x.detach(),
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() and x.shape[0] else x,
    "an inference tensor": lambda x: _inference(x),
    "a list of numbers": lambda x: x.detach().tolist(),
    "an array": lambda x: x.detach().double().numpy(),
    "a parameter": lambda x: nn.Parameter(x.detach().clone(), x.is_floating_point()),
}
OF_NUMBERS: Ways = {
    "0": lambda _: 0,
    "one more": lambda x: x + 1,
    "negated": lambda x: -x,
    "true": lambda _: True,
    "Inf": lambda _: float("inf"),
    "1e300": lambda _: 1e300,
    "2^31": lambda _: 2**31,
    "2^40": lambda _: 2**40,
    "2^70": lambda _: 2**70,
    "a tensor": lambda x: torch.tensor(x),
    "an int64 tensor": lambda _: torch.tensor(2),
    "a bool tensor": lambda _: torch.tensor(True),
    "a complex number": lambda x: complex(x, 1),
    "a vector": lambda x: torch.tensor([x, x]),
}
OF_TEXTS: Ways = {"nothing": lambda _: "", "bytes": lambda x: x.encode()}
OF_LISTS: Ways = {
    "one less": lambda x: x[:-1],
    "one more": lambda x: x + x[-1:],
    "an iterator": iter,
    "a set of positions": lambda x: set(range(len(x))),
    "the other way round": lambda x: x[::-1],
    "the first one": lambda x: x[0] if x else x,
}
OF_MAPPINGS: Ways = {
    "one less": lambda x: dict(list(x.items())[:-1]),
    "one more": lambda x: {**x, "another": next(iter(x.values()), None)},
    "another name": lambda x: {f"{k}?": v for k, v in x.items()},
    "numbers as names": lambda x: dict(enumerate(x.values())),
    "in another order": lambda x: dict(reversed(x.items())),
    "its values": lambda x: list(x.values()),
    "None as a name": lambda x: {**dict(list(x.items())[:-1]), None: next(iter(x.values()), None)},
}
OF_STREAMS: Ways = {
    "its state": lambda x: x.state,
    "placed for five": lambda x: x.place(range(5)),
    "on meta": lambda x: x.to("meta"),
    "with a short state": lambda x: _state(x, x.state[:1]),
    "with a floating state": lambda x: _state(x, x.state.double()),
    "its class": type,
}
OF_NOTHING: Ways = {
    "a tensor": lambda _: torch.ones(2),
    "a number in a tensor": lambda _: torch.tensor(1.5),
    "tensors": lambda _: [torch.ones(2), torch.ones(3)],
    "True": lambda _: True,
    "a module": lambda _: nn.Identity(),
}
OF_MODULES: Ways = {
    "another module": lambda _: nn.Identity(),
    "its parameters": lambda x: list(x.parameters()),
    "a generator of its parameters": lambda x: x.parameters(),
    "its class": type,
}


def _signed(x: Tensor) -> torch.dtype:
    return torch.int64 if x.dtype in (torch.bool, torch.uint8) else x.dtype


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.detach().clone()


def _state(stream: NoiseStream, state: Tensor) -> NoiseStream:
    made = stream.place(stream.ids or range(2))
    made.state, made.ids = state, stream.ids
    return made


def ways(value: Any) -> Ways:
    """The mistakes that can be made with a value."""
    kinds: tuple[tuple[Any, Ways], ...] = (
        (Tensor, OF_TENSORS),
        ((bool, int, float), OF_NUMBERS),
        (str, OF_TEXTS),
        ((list, tuple), OF_LISTS),
        (dict, OF_MAPPINGS),
        (NoiseStream, OF_STREAMS),
        (nn.Module, OF_MODULES),
        (type(None), OF_NOTHING),
    )
    own = next((found for kind, found in kinds if isinstance(value, kind)), {})
    return {**own, **ANYTHING}


def places(tree: Any) -> Iterator[tuple[Any, ...]]:
    """The paths to all values within the arguments."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (key,)
        if isinstance(value, (dict, list)) or type(value) is tuple:
            yield from ((key, *path) for path in places(value))


def spoil(arguments: dict[str, Any], where: int, how: int) -> tuple[dict[str, Any], str]:
    """The arguments with a mistake, and its name; as they are, where it cannot be made.

    Args:
        arguments: By name.
        where: Which of all values; counted on from the first one again.
        how: Which of the mistakes that suit it, likewise.
    """
    paths = list(places(arguments))
    if not paths:
        return arguments, "nothing to spoil"
    path = paths[where % len(paths)]
    value: Any = arguments
    for key in path:
        value = value[key]
    found = ways(value)
    name = list(found)[how % len(found)]
    try:
        wrong = found[name](value)
    except Exception:
        return arguments, "nothing"
    return _replaced(arguments, path, wrong), f"{'.'.join(map(str, path))} := {name}"


def _replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    first, *rest = path
    if isinstance(tree, dict):
        return {k: _replaced(v, tuple(rest), value) if k == first else v for k, v in tree.items()}
    parts = [_replaced(v, tuple(rest), value) if i == first else v for i, v in enumerate(tree)]
    return type(tree)(parts)
