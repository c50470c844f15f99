"""update_grads_: every optional part there and not, in every dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tolerances
import torch
from torch import Tensor

from mmfuse import NoiseStream, ops
from mmfuse.ops._eager import Eager
from mmfuse.ops.update_grads import update_checked_

from ._inputs import DTYPES, NARROW, Inputs, Samples, Small, mirrors, table_of


def arguments(device: str) -> Samples:
    g = [torch.randn(5, 3, device=device), torch.randn(0, device=device), torch.randn(9).to(device)]
    w, w0 = [torch.randn_like(t) for t in g], [torch.randn_like(t) for t in g]
    three = torch.rand(3, device=device)
    flag = torch.ones((), dtype=torch.bool, device=device)
    state = NoiseStream(3, device).state
    return {
        "update_grads_": [
            (g, three, [], [], None, None, None, [], [], None, None),
            (g, three, w, w0, three, three, state, [0, 1, 2], [0, 0, 5], flag, None),
            (g, three, w, [], three, three, state, [0, 1, 2], [0, 0, 5], flag, None),
            (g, three, w, w0, three, None, None, [], [], flag, torch.ones_like(three)),
            (g, three, [], [], None, three, state, [0, 1, 2], [0, 0, 5], None, three.double()),
        ]
    }


def small(device: str) -> Small:
    grads = [torch.randn(n, device=device) for n in (33, 9, 5)]
    # Ones and a little noise: the numbers stay of the same size however often it is called.
    scale, std = torch.ones(3, device=device), torch.full((3,), 1e-3, device=device)
    stream = NoiseStream(3, device)
    return lambda: ops.update_grads_(grads, scale, noise_std=std, stream=stream)


def short(device: str) -> Small:
    grads = [torch.randn(1000, device=device) for _ in range(100)]
    scale, std = torch.ones(100, device=device), torch.full((100,), 1e-3, device=device)
    stream = NoiseStream(3, device)

    def call() -> None:
        ops.update_grads_(grads, scale * 0.5, params=grads, anchors=grads, pull=std)
        ops.update_grads_(grads, scale, noise_std=std, stream=stream)

    return call


def case(inputs: Inputs) -> list[Tensor]:
    """A chunk has 8,192 elements."""
    written = []
    sizes = (37,) if inputs.interpreted else (1, 37, 47, 1027, 0, 2 * 8192 + 37)
    for offset in (0, 1):
        for grads, params, anchors in mirrors(inputs, sizes, offset):
            count = len(grads)
            # A scale below 1, so that no float16 overflows in the course of the updates.
            factors = [inputs.normal(count).tanh(), inputs.normal(count), inputs.normal(count)]
            for beside in ((), (params,), (params, anchors)):
                for with_noise in (False, True):
                    flag = torch.ones((), dtype=torch.bool, device=inputs.device)
                    ops.update_grads_(
                        grads,
                        factors[0],
                        **_pulled(factors[1], *beside),
                        noise_std=factors[2].abs() if with_noise else None,
                        stream=inputs.stream(count if offset else None) if with_noise else None,
                        finite=flag,
                    )
                    written.append(flag)
                    written.append(_sq_norms(grads, factors, *beside))
            written += grads
    written += _in_channels_last(inputs)
    written += _taking_the_stream_on(inputs)
    unchanged = [inputs.normal(n) for n in (5, 1027)]
    flag = torch.ones((), dtype=torch.bool, device=inputs.device)
    ops.update_grads_(unchanged, inputs.vector(1.0, 1.0), finite=flag)
    written.append(torch.empty(2, device=inputs.device))
    ops.update_grads_(unchanged, inputs.vector(1.0, 1.0), sq_norm=written[-1])
    for dtype in NARROW:
        grads, params, anchors = inputs.beyond_short(dtype)
        factors = [inputs.normal(len(grads)).tanh(), *(inputs.normal(len(grads)) for _ in "ab")]
        for beside in ((), (params,), (params, anchors)):
            pulled = _pulled(factors[1], *beside)
            noise = {"noise_std": factors[2].abs(), "stream": inputs.stream()}
            ops.update_grads_(grads, factors[0], **pulled)
            ops.update_grads_(grads, factors[0], **pulled, **noise)
            written.append(_sq_norms(grads, factors, *beside))
        written += grads
    # More than one table of parameters holds: about 1,160, or 540 with anchors and noise.
    many = inputs.many(40 if inputs.interpreted else 1400)
    factors = inputs.normal(len(many))
    ops.update_grads_(many, factors)
    ops.update_grads_(
        many,
        factors,
        params=inputs.many(len(many)),
        anchors=inputs.many(len(many)),
        pull=factors,
        noise_std=factors.abs(),
        stream=inputs.stream(),
    )
    # More than a table of the sums' kernel holds, which is 2,000.
    many += inputs.many(0 if inputs.interpreted else 700)
    squares = torch.empty(len(many), dtype=torch.float64, device=inputs.device)
    ones = torch.ones(len(many), device=inputs.device)
    ops.update_grads_(many, ones, noise_std=ones, stream=inputs.stream(), sq_norm=squares)
    return [*written, squares, *unchanged, *many]


def _taking_the_stream_on(inputs: Inputs) -> list[Tensor]:
    """Updates as a step does: the update itself advances the stream, if it can read a table.

    Blocks of several launches, which the last one to be done advances it for, and a launch.
    """
    written = []
    wide = torch.channels_last
    for counted in (False, True):
        grads = [*inputs.many(5), inputs.normal(2, 520, 3, 3).to(memory_format=wide)]
        grads += [inputs.normal(9, dtype=dtype) for dtype in NARROW]
        grads += [] if inputs.interpreted else [inputs.normal(2 * 8192 + 37)]
        stream, count = inputs.stream(), len(grads)
        flag = torch.ones((), dtype=torch.bool, device=inputs.device)
        half, one = (torch.full((count,), x, device=inputs.device) for x in (0.5, 1.0))
        advanced = update_checked_(
            Eager(""),
            grads[0].device,
            grads,
            half,
            flag,
            None,
            noise_std=one,
            state=stream.state,
            ids=range(count),
            table=table_of(grads),
            advance=True,
            done=torch.zeros(1, dtype=torch.int32, device=inputs.device) if counted else None,
        )
        if not advanced:
            stream.state[1] += flag
        written += [*grads, flag, stream.state]
    return written


def _pulled(pull: Tensor, *beside: list[Tensor]) -> dict[str, Any]:
    """Arguments for no params, for params alone, and for params and anchors."""
    return (
        {"pull": pull, **dict(zip(("params", "anchors"), beside, strict=False))} if beside else {}
    )


def _in_channels_last(inputs: Inputs) -> list[Tensor]:
    """Noise by the logical index; rows of four channels or not, cut into tiles or not.

    More than a table of parameters holds, which is 128.
    """
    shapes = [(3, 4, 3, 3), (2, 3, 1, 2, 2)]
    if not inputs.interpreted:
        shapes += [(1, 4, 1, 2)] * 128
        shapes += [(9, 64, 3, 3), (2, 520, 3, 3), (2, 12, 20, 30), (2, 3, 70, 71)]
    written = []
    for shift, dtype in enumerate(DTYPES):
        other = DTYPES[(shift + 1) % len(DTYPES)]
        for beside in ((), (dtype,), (dtype, dtype), (other, dtype)):
            grads, *lists = (
                [_channels_last(inputs, shape, of) for shape in shapes] for of in (dtype, *beside)
            )
            factors = [inputs.normal(len(shapes)).tanh() for _ in range(3)]
            flag = torch.ones((), dtype=torch.bool, device=inputs.device)
            ops.update_grads_(
                grads,
                factors[0],
                **_pulled(factors[1], *lists),
                noise_std=factors[2].abs(),
                stream=inputs.stream(len(shapes) if shift % 2 else None),
                finite=flag,
            )
            written += [flag, *grads]
    return written


def _channels_last(inputs: Inputs, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers in that format, by a view: copying would be a kernel of its own."""
    rows, channels, *spatial = shape
    return inputs.normal(rows, *spatial, channels, dtype=dtype).movedim(-1, 1)


def _sq_norms(grads: list[Tensor], factors: Sequence[Tensor], *beside: list[Tensor]) -> Tensor:
    """Updates the gradients once more, with their sums of squares."""
    squares = torch.empty(len(grads), dtype=torch.float64, device=grads[0].device)
    ops.update_grads_(
        grads,
        factors[0],
        **_pulled(factors[1], *beside),
        sq_norm=squares,
    )
    return squares


def compiled(inputs: Inputs) -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for parts, offset, *dtypes in (
        ("", 0, f32),
        ("", 0, bf16),
        ("finite", 1, f32),
        ("noise", 0, f32),
        ("noise finite", 0, f32),
        ("noise finite", 0, bf16),
        ("noise finite", 1, f16),
        ("noise finite", 0, f64),
        ("", 0, f32, f32, f32),
        ("finite", 0, bf16, f32, bf16),
        ("noise finite", 0, f32, f32, f32),
        ("noise finite", 1, f64, f64, f64),
        ("", 0, f32, f32),
        ("finite", 0, bf16, f32),
        ("noise finite", 0, f32, f32),
        ("noise finite", 1, f64, f64),
        ("finite squares", 0, f32),
        ("finite squares", 0, f32, f32, f32),
        ("finite squares", 0, bf16, f32, bf16),
        ("finite squares", 1, f16, f16, f16),
        ("noise finite squares", 0, f32),
        ("noise finite squares", 0, f64, f64, f64),
        ("finite squares", 0, f32, f32),
        ("finite squares", 1, f16, f16),
        ("noise last", 0, f32),
        ("noise finite last", 0, bf16),
        ("noise finite last", 1, f16),
        ("noise finite last", 0, f64),
        ("noise finite last", 0, f32, f32, f32),
        ("noise finite last", 1, bf16, f32),
        ("noise finite squares last", 0, f32),
    ):
        grads, *beside = inputs.lists((36,), len(dtypes), *dtypes, offset=offset)
        if "last" in parts:
            grads, *beside = (
                [t.view(2, 2, 3, 3).movedim(-1, 1) for t in row] for row in (grads, *beside)
            )
        wide = tolerances.accumulation_dtype(dtypes[0])
        factor = inputs.vector(0.5, dtype=wide)
        ops.update_grads_(
            grads,
            factor,
            **_pulled(factor, *beside),
            noise_std=factor if "noise" in parts else None,
            stream=inputs.stream() if "noise" in parts else None,
            finite=torch.ones((), dtype=torch.bool) if "finite" in parts else None,
            sq_norm=torch.empty(1, dtype=wide) if "squares" in parts else None,
        )
