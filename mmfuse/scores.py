"""Scores of your own for `step(scores=...)`: regression, and several tasks at once.

A method that balances modalities needs one positive number of each that says how well it does
alone, higher is better. For classes the methods take it from logits; for other tasks it is made
here, or by you.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ._numbers import real
from .ops._arguments import check_sequence
from .ops._tensors import FLOATING, check_dense

__all__ = ["combined", "error_ratios", "inverse_error"]

Error = Literal["squared", "absolute"]


def inverse_error(
    predictions: Mapping[str, Tensor],
    target: Tensor,
    *,
    error: Error = "squared",
    eps: float = 1e-12,
) -> dict[str, Tensor]:
    """s_m = 1 / (mean error of modality m's own prediction + eps): for regression.

    Equivalent to, for each modality's prediction z::

        1 / ((z - target).square().mean() + eps)      # or .abs() with error="absolute"

    The ratio of two such scores is the inverse ratio of the errors, which MLB (BMVC 2024) compares
    where there are two modalities; for more give it `error_ratios`. Averaged over micro-batches the
    scores are the means of these numbers.

    Args:
        predictions: Name → prediction of each modality alone, of the target's shape.
        target: Floating tensor.
        error: "squared" or "absolute".
        eps: Keeps the score finite where the error is 0.

    Returns:
        Name → 0-d tensor, detached, in float32 at least.

    Raises:
        TypeError: `predictions` is no mapping, or a tensor is not floating.
        ValueError: a shape differs from the target's, there is no such error, or `eps` is negative.
    """
    if not 0 <= real("eps", eps) < math.inf:
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")
    errors = _errors(predictions, target, error)
    return {name: 1 / (value + eps) for name, value in errors.items()}


def error_ratios(
    predictions: Mapping[str, Tensor], target: Tensor, *, error: Error = "squared"
) -> dict[str, Tensor]:
    """rho_m = mean error of m / mean of the others' errors: MLB's ratio for ``ratios=``.

    A modality whose error is NaN is missing: it does not count among the others.

    Above 1 the modality is behind, as in MLB's formula for classes. (OGM's and OPM's ratio is above
    1 for a modality that is ahead; give them `inverse_error` as ``scores=``.)

    Args:
        predictions: As in `inverse_error`, of M ≥ 2 modalities.
        target: As there.
        error: As there.

    Returns:
        Name → 0-d tensor, detached.

    Raises:
        TypeError: as `inverse_error`.
        ValueError: as `inverse_error`, or there is one modality only.
    """
    errors = _errors(predictions, target, error)
    if len(errors) < 2:
        raise ValueError(f"balancing needs at least two modalities, got {list(errors)}")
    total = torch.stack(list(errors.values()))
    ratios = {}
    for m, (name, value) in enumerate(errors.items()):
        others = torch.cat([total[:m], total[m + 1 :]])
        ratios[name] = value / others.nanmean()
    return ratios


def combined(
    *tasks: Mapping[str, Tensor | float], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """s_m = prod over tasks of s_m,t ** (w_t / sum of w): one score from those of several tasks.

    The geometric mean: the ratio of two modalities is the mean ratio over the tasks, whatever the
    unit of each task's score.

    Args:
        *tasks: Name → positive score of each modality, one mapping for each task; such as
            `inverse_error` returns, or ``dict(zip(names, modality_scores(...).prob))``.
        weights: One positive number for each task; None for equal ones.

    Returns:
        Name → 0-d tensor, in float32 at least; NaN for a modality that is NaN in a task, which
        methods take for one that is missing.

    Raises:
        ValueError: there is no task, names differ, weights are not one positive number each, or, on
            the CPU, a score is negative, whose mean would be NaN as well.
    """
    if not tasks:
        raise ValueError("combined needs the scores of at least one task")
    for t, task in enumerate(tasks):
        if not isinstance(task, Mapping):
            raise TypeError(f"tasks[{t}] must map names to scores, got {type(task).__name__}")
    names = list(tasks[0])
    for t, task in enumerate(tasks):
        if set(task) != set(names):
            raise ValueError(f"tasks[{t}] names {list(task)}, tasks[0] names {names}")
    if weights is None:
        weights = [1.0] * len(tasks)
    check_sequence("weights", weights, "numbers")
    shares = [real(f"weights[{t}]", w) for t, w in enumerate(weights)]
    if len(shares) != len(tasks) or not all(0 < w < math.inf for w in shares):
        raise ValueError(f"weights must be {len(tasks)} positive numbers, got {weights}")
    found = {}
    for name in names:
        scores = [_score(f"tasks[{t}][{name!r}]", task[name]) for t, task in enumerate(tasks)]
        if len({s.device for s in scores if s.dim() or s.device.type != "cpu"}) > 1:
            devices = ", ".join(str(s.device) for s in scores)
            raise ValueError(f"the scores of {name!r} are on several devices: {devices}")
        logs = [s.log() * w for s, w in zip(scores, shares, strict=True)]
        total = sum(logs[1:], logs[0])
        found[name] = (total / sum(shares)).exp()
    return found


def _score(what: str, value: Tensor | float) -> Tensor:
    """0-d; a number in float64, whatever PyTorch's default is."""
    if not isinstance(value, Tensor):
        value = torch.tensor(real(what, value), dtype=torch.float64)
    elif value.dtype not in FLOATING and (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{what} must be a number, got {value.dtype}")
    check_dense(what, value)
    found = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    if found.device.type == "cpu" and not torch.compiler.is_compiling() and bool((found < 0).any()):
        raise ValueError(f"{what} must be positive, got {value}")
    return found


def _errors(predictions: Mapping[str, Tensor], target: Tensor, error: str) -> dict[str, Tensor]:
    """Each modality's mean error."""
    if error not in ("squared", "absolute"):
        raise ValueError(f"error must be 'squared' or 'absolute', got {error!r}")
    if not isinstance(predictions, Mapping):
        raise TypeError(f"predictions must map names to tensors, got {type(predictions).__name__}")
    found = {}
    for name, z in (("target", target), *predictions.items()):
        what = name if z is target else f"predictions[{name!r}]"
        if not isinstance(z, Tensor) or z.dtype not in FLOATING:
            kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"{what} must be a floating tensor, got {kind}")
        check_dense(what, z)
        if z.device != target.device:
            raise ValueError(f"{what} is on {z.device}, target on {target.device}")
        if z.shape != target.shape:  # broadcasting would compare every sample with every other
            raise ValueError(f"{what} is {list(z.shape)}, target {list(target.shape)}")
    for name, z in predictions.items():
        dtype = torch.promote_types(torch.promote_types(z.dtype, target.dtype), torch.float32)
        away = z.detach().to(dtype) - target.detach().to(dtype)
        found[name] = (away.square() if error == "squared" else away.abs()).mean()
    return found
