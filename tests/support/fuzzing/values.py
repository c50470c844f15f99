"""Arguments as plain data, from which each backend gets its own: their printed form can be run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import mmfuse
from mmfuse import NoiseStream, ops

FLOATS = ("float32", "float64", "float16", "bfloat16")
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 17, 33, 65, 129)


def _gaps(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x


def _offset(x: Tensor) -> Tensor:
    whole = x.new_zeros(x.numel() + 3)
    whole[1 : 1 + x.numel()] = x.flatten()
    return whole[1 : 1 + x.numel()].view(x.shape)


def _reversed(x: Tensor) -> Tensor:
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x


def _padded_rows(x: Tensor) -> Tensor:
    if not x.dim():
        return x
    wide = torch.cat([x, x[..., :1]], -1) if x.shape[-1] else x
    return wide[..., : x.shape[-1]]


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.dim() and x.shape[0] else x


def _negative_bit(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):
        return x
    return torch.complex(torch.zeros_like(x), -x).conj().imag


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "gaps": _gaps,
    "offset": _offset,
    "reversed": _reversed,
    "channels last": _channels_last,
    "padded rows": _padded_rows,
    "expanded": _expanded,
    "negative bit": _negative_bit,
}
KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": lambda s, g: torch.randn(s, generator=g, dtype=torch.float64),
    "share": lambda s, g: torch.rand(s, generator=g, dtype=torch.float64),
    "positive": lambda s, g: torch.rand(s, generator=g, dtype=torch.float64) + 0.25,
    "whole": lambda s, g: torch.randint(-3, 4, s, generator=g).double(),
    "constant": lambda s, g: torch.ones(s, dtype=torch.float64),
}


@dataclass(frozen=True)
class T:
    """A tensor. `kind` is one of KINDS, or the number of classes that its integers name."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    seed: int = 0
    kind: str | int = "normal"
    grad: bool = False

    def build(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if isinstance(self.kind, int):
            values = torch.randint(0, max(self.kind, 1), self.shape, generator=generator)
        else:
            values = KINDS[self.kind](self.shape, generator)
        if self.dtype == "bool":
            values = values > 0
        made = LAYOUTS[self.layout](values.to(getattr(torch, self.dtype)))
        return made.detach().requires_grad_(self.grad and made.is_floating_point())


@dataclass(frozen=True)
class Made:
    """The result of a function in MAKERS."""

    name: str
    args: tuple[Any, ...] = ()

    def build(self) -> Any:
        return MAKERS[self.name](*build(self.args))


def _stream(seed: int, step: int, count: int | None) -> NoiseStream:
    stream = NoiseStream(seed)
    stream.advance(step)
    if count is None:
        return stream
    return stream.place([7 + i for i in range(count)], [3 * i for i in range(count)])


def _stats(*given: Any) -> Any:
    return ops.grad_stats(*given, backend="reference")


def _linear(inputs: int, outputs: int, seed: int = 0) -> nn.Module:
    made = nn.Linear(inputs, outputs)
    for i, p in enumerate(made.parameters()):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)))
    return made


def _with_gradients(*encoders: nn.Module) -> dict[str, nn.Module]:
    for net in encoders:
        for p in net.parameters():
            p.grad = p.detach().sin()
    return {f"m{i}": net for i, net in enumerate(encoders)}


class _Sum(nn.Module):
    """A model of named inputs [B, D], of one mapping or one by one."""

    def forward(self, inputs: dict[str, Tensor] | None = None, **named: Tensor) -> Tensor:
        inputs = named if inputs is None else inputs
        return torch.stack([x.cos().sum(1) for x in inputs.values()]).sum(0).unsqueeze(1) * 0.5


#: Objects that plain data cannot describe, by name.
MAKERS: dict[str, Callable[..., Any]] = {
    "stream": _stream,
    "stats": _stats,
    "state": lambda *fields: ops.RedundancyState(*fields),
    "linear": _linear,
    "encoders": _with_gradients,
    "sum": _Sum,
    "list": nn.ModuleList,
    "cross entropy": nn.CrossEntropyLoss,
    "binary": nn.BCEWithLogitsLoss,
    "ogm result": lambda c: mmfuse.OGMResult(c, c, c, torch.ones((), dtype=torch.bool)),
    "nothing": lambda *_: lambda *_: None,
    "optimizer": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
    "scaler": lambda enabled: torch.amp.GradScaler("cpu", enabled=enabled),
}


def build(spec: Any) -> Any:
    """The arguments themselves, new ones at each call."""
    if isinstance(spec, (T, Made)):
        return spec.build()
    if isinstance(spec, dict):
        return {name: build(value) for name, value in spec.items()}
    if isinstance(spec, (list, tuple)):
        return type(spec)(build(value) for value in spec)
    return spec


class Drawer:
    """Draws parts of arguments; what comes first among several is what a shrunk example has."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw = draw
        self._seed = draw(st.integers(0, 50))

    def of(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def maybe(self, one_in: int = 2) -> bool:
        return bool(self.draw(st.integers(0, one_in - 1)) == one_in - 1)

    def whole(self, least: int, most: int) -> int:
        return int(self.draw(st.integers(least, most)))

    def size(self) -> int:
        return int(self.of(*SIZES)) if not self.maybe(40) else int(self.of(1025, 4097, 20_001))

    def shape(self, most: int = 4) -> tuple[int, ...]:
        """A shape of 0 to `most` dimensions, of which the first alone may be long."""
        dims = self.whole(0, most)
        return tuple(self.size() if not i else self.whole(0, 5) for i in range(dims))

    def tensor(
        self,
        *shape: int,
        kind: str | int = "normal",
        dtypes: tuple[str, ...] = FLOATS,
        grad: bool = False,
        plain: bool = False,
    ) -> T:
        self._seed += 1
        layout = "contiguous" if plain or not self.maybe() else self.of(*LAYOUTS)
        wants = grad and self.maybe()
        return T(tuple(shape), self.of(*dtypes), layout, self._seed, kind, wants)

    def stream(self, count: int) -> Made:
        return Made("stream", (self.whole(0, 3), self.whole(0, 3), self.of(None, count)))
