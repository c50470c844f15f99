"""RedReg's monitor: how redundant each encoder's representation is, unnoticed by the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from .._numbers import real
from ..loop._parameters import Encoders
from ..loop.passes import scoring
from ..noise import NoiseStream
from ..ops.noisy_views import noisy_views
from ..ops.redundancy_ratio import redundancy_ratio

Noise = Callable[[Tensor], Tensor]
Forward = Callable[[Tensor], Tensor]


class Monitor:
    """Passes two noisy views of its input through every encoder; see `mmfuse.RedReg`.

    Args:
        encoders: Name → encoder.
        forward: Name → what to call instead of the encoder.
        sigma: Standard deviation of the noise, or one for each name.
        clamp: Names whose views are clamped to [0, 1].
        noise: Makes standard normal noise like a tensor, in place of the stream.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: there is nothing to call for an encoder.
        ValueError: unknown names, or a sigma that is not positive and finite.
    """

    def __init__(
        self,
        encoders: Encoders,
        forward: Mapping[str, Forward],
        sigma: float | Mapping[str, float],
        clamp: Collection[str],
        noise: Noise | None,
        backend: str | None,
    ) -> None:
        self.names: tuple[str, ...] = tuple(encoders)
        if not isinstance(forward, Mapping):
            kind = type(forward).__name__
            raise TypeError(f"forward must map names of encoders to callables, got {kind}")
        for what, given in (("forward", forward), ("clamp", clamp)):
            _check_names(what, given, self.names)
        self.forward: dict[str, Forward] = {
            name: _callable(name, encoders, forward) for name in self.names
        }
        self.sigma: list[float] = _sigmas(sigma, self.names)
        self.clamp: frozenset[str] = frozenset(clamp)
        self.noise = noise
        self.backend = backend

    def __call__(
        self,
        inputs: Sequence[Tensor],
        stream: NoiseStream,
        first_row: int = 0,
        present: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The redundancy of every modality's representation, and the views' mean |x1 - x2|².

        Args:
            inputs: One for each modality.
            stream: The random stream.
            first_row: Which row of the whole batch, over all ranks, is the inputs' first.
            present: [M, B] bool, which modalities each sample has; None if all have all.

        Returns:
            Two lists of M 0-d tensors.
        """
        ratios, squares = [], []
        for m, (name, x) in enumerate(zip(self.names, inputs, strict=True)):
            x1, x2, input_sq = self._views(m, x, stream, first_row)
            if name in self.clamp:
                x1, x2 = x1.clamp(0.0, 1.0), x2.clamp(0.0, 1.0)
                input_sq = (x1 - x2).square().mean()
            encoder = self.forward[name]
            with scoring(encoder, x.device):
                z1, z2 = _representation(name, encoder, x1), _representation(name, encoder, x2)
            if present is not None:
                x1, x2, z1, z2 = (_only(x, present[m]) for x in (x1, x2, z1, z2))
                input_sq = (x1 - x2).square().mean()
            ratios.append(redundancy_ratio(z1, z2, input_sq, backend=self.backend))
            squares.append(input_sq)
        return ratios, squares

    def _views(
        self, m: int, x: Tensor, stream: NoiseStream, first_row: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.noise is None:
            offset = first_row * math.prod(x.shape[1:])
            placed = stream.place([2 * m, 2 * m + 1], [offset, offset])
            return noisy_views(x, self.sigma[m], placed, backend=self.backend)
        x1, x2 = (x + self.sigma[m] * self.noise(x) for _ in range(2))
        return x1, x2, (x1 - x2).square().mean()


def _only(x: Tensor, present: Tensor) -> Tensor:
    """The rows that are present; 0 for the others, which then add nothing to either mean."""
    return torch.where(present.view(-1, *[1] * (x.dim() - 1)), x, 0.0)


def _representation(name: str, encoder: Forward, x: Tensor) -> Tensor:
    try:
        z = encoder(x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise RuntimeError(
            f"the encoder of {name!r} cannot take its input, {x.dtype} {list(x.shape)} with noise: "
            f"{error}. If training calls it in another way, give forward={{{name!r}: callable}}, "
            "which maps the input to its representation"
        ) from error
    if not isinstance(z, Tensor):
        raise TypeError(
            f"the encoder of {name!r} returned {type(z).__name__}; give `forward` a callable for "
            "it that returns one tensor"
        )
    return z


def _check_names(what: str, given: Collection[str], names: Sequence[str]) -> None:
    if isinstance(given, (str, Tensor)) or not hasattr(given, "__iter__"):
        raise TypeError(f"{what} must hold names of encoders, got {type(given).__name__}")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"{what} names {unknown}; the encoders are {list(names)}")


def _callable(name: str, encoders: Encoders, forward: Mapping[str, Forward]) -> Forward:
    found = forward.get(name, encoders[name])
    if isinstance(found, nn.parallel.DistributedDataParallel):
        found = found.module  # without gradients there is nothing to synchronise
    if not callable(found):
        raise TypeError(
            f"encoders[{name!r}] is no module: give forward={{{name!r}: callable}}, which maps its "
            "input to its representation"
        )
    return found


def _sigmas(sigma: float | Mapping[str, float], names: Sequence[str]) -> list[float]:
    if isinstance(sigma, Mapping):
        _check_names("sigma", sigma, names)
        missing = [name for name in names if name not in sigma]
        if missing:
            raise ValueError(f"sigma lacks {missing}; give every encoder's, or one number for all")
        values = [real(f"sigma[{name!r}]", sigma[name]) for name in names]
    else:
        values = [real("sigma", sigma)] * len(names)
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"sigma must be positive and finite, got {sigma}")
    return values
