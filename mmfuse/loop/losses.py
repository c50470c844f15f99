"""The unimodal losses: each modality's own, beside the joint one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .given import Loss, check_present

Criterion = Callable[[Tensor, Tensor], Tensor]
Weights = Mapping[str, Tensor | float] | float

#: Made once: a module that is made within a compiled function is none to `isinstance` there.
CROSS_ENTROPY = nn.CrossEntropyLoss()


def unimodal_losses(
    logits: Mapping[str, Tensor],
    labels: Tensor,
    *,
    criterion: Loss | Criterion = None,
    weights: Weights = 1.0,
    present: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The loss of each modality alone, to be added to the joint one.

    Training on CE(z) + Σ_m CE(z^m) instead of CE(z) gives every encoder a gradient that no other
    modality can take away: the baseline that a balanced method has to beat, and a part of many of
    them (MMPareto: Wei & Hu, ICML 2024, Eq. 1; MLB; ARL; InfoReg's release). It takes no second
    forward pass::

        features = {"audio": audio_net(audio), "visual": visual_net(visual)}
        logits = mmfuse.unimodal_logits(head, features)              # the joint head's shares, or
        logits = {n: heads[n](f) for n, f in features.items()}       # heads of their own
        losses = mmfuse.unimodal_losses(logits, labels)
        loss = F.cross_entropy(joint, labels) + sum(losses.values())

    With the shares of the joint head the unimodal losses train this head as well (InfoReg's release
    of November 2025, ARL, DGL), with heads of their own they do not (MMPareto, InfoReg's release of
    March 2025): two baselines, which differ.

    Equivalent to ``{name: weights[name] * criterion(z, labels) for name, z in logits.items()}``;
    with `present`, each over the samples that have the modality.

    Args:
        logits: Name → outputs of each modality, as `criterion` takes them; by default [B, C] or
            [B, C, d1, …].
        labels: Their targets, the same for all.
        criterion: ``nn.CrossEntropyLoss`` or ``nn.BCEWithLogitsLoss`` as the joint loss has it,
            label smoothing and class weights included; None for ``nn.CrossEntropyLoss()``. Or a
            callable that makes a 0-d loss of outputs and labels, such as ``F.mse_loss``.
        weights: Factor of all losses, or name → factor of each; finite and not negative.
        present: Name → [B] bool, which samples have the modality. The loss of one that no sample
            has is 0, with a gradient of 0.

    Returns:
        Name → 0-d loss, in the order of `logits`: as `MMPareto.backward` takes them.

    Raises:
        TypeError: `logits` maps no names to tensors, `criterion` cannot be called, a mask is no
            bool tensor, or `present` comes with a criterion that is none of PyTorch's two.
        ValueError: there are no logits, a weight is out of range, a loss is no scalar, or the names
            or lengths of `weights` or `present` do not fit.
    """
    _check(logits, labels, criterion)
    names = list(logits)
    factors = _factors(names, weights)
    loss_of = CROSS_ENTROPY if criterion is None else criterion
    if present is None:
        found = [_loss(loss_of, name, z, labels) for name, z in logits.items()]
    else:
        if not isinstance(loss_of, (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)):
            raise TypeError(
                "present goes with nn.CrossEntropyLoss or nn.BCEWithLogitsLoss; another criterion "
                "has to leave out the samples that are missing by itself"
            )
        if not labels.dim():
            raise ValueError("with present, labels must have one entry for each sample, got none")
        masks = check_present(names, present, len(labels), labels.device)
        found = [
            _loss(partial(loss_of_present, loss_of), name, z, labels, mask)
            for (name, z), mask in zip(logits.items(), masks, strict=True)
        ]
    losses = {}
    for name, loss, factor in zip(names, found, factors, strict=True):
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"criterion must make a 0-d loss of logits[{name!r}], got {got}: take its mean "
                'or sum (reduction="mean")'
            )
        losses[name] = loss if isinstance(factor, float) and factor == 1 else factor * loss
    return losses


def _loss(loss_of: Callable[..., Any], name: str, *given: Tensor) -> Any:
    """The loss; PyTorch's errors, which know no names, with the modality's."""
    if torch.compiler.is_compiling():
        return loss_of(*given)
    try:
        return loss_of(*given)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, (NotImplementedError, TypeError)) else ValueError
        raise kind(f"the criterion fails on logits[{name!r}] and labels: {error}") from error


def _check(logits: object, labels: object, criterion: object) -> None:
    if not isinstance(logits, Mapping):
        raise TypeError(f"logits must map names to tensors, got {type(logits).__name__}")
    if not logits:
        raise ValueError("logits must hold at least one modality")
    for name, z in logits.items():
        if not isinstance(z, Tensor):
            raise TypeError(f"logits[{name!r}] is not a tensor but {type(z).__name__}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if criterion is not None and not callable(criterion):
        raise TypeError(
            "criterion must be a loss such as nn.CrossEntropyLoss() or a callable on outputs and "
            f"labels, got {type(criterion).__name__}"
        )


def _factors(names: Sequence[str], weights: Weights) -> list[Tensor | float]:
    """One factor for each name."""
    if not isinstance(weights, Mapping):
        return [_factor("weights", weights)] * len(names)
    if set(weights) != set(names):
        raise ValueError(f"weights must name the modalities {names}, got {list(weights)}")
    return [_factor(f"weights[{name!r}]", weights[name]) for name in names]


def _factor(what: str, value: object) -> Tensor | float:
    if isinstance(value, Tensor) and not value.dim():
        return value  # of the device, where looking would wait for it
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and value >= 0:
            return float(value)
        raise ValueError(f"{what} must be a finite number of at least 0, got {value}")
    raise TypeError(f"{what} must be a number or a 0-d tensor, got {type(value).__name__}")


def loss_of_present(
    loss: nn.CrossEntropyLoss | nn.BCEWithLogitsLoss, z: Tensor, labels: Tensor, mask: Tensor
) -> Tensor:
    """The loss over the samples that are there, and 0 if there are none.

    Args:
        loss: Its reduction is a sum, or else a mean.
        z: [B, …] outputs; of a sample that is not there they may be anything.
        labels: Their targets.
        mask: [B] bool, which samples are there.
    """
    weight = loss.weight
    # Missing logits may be NaN, and so would their gradient be: they are 0 before the loss.
    known = torch.where(mask.view(-1, *[1] * (z.dim() - 1)), z, 0)
    if isinstance(loss, nn.CrossEntropyLoss) and not labels.is_floating_point():
        there = mask.view(-1, *[1] * (labels.dim() - 1))
        kept = torch.where(there, labels, loss.ignore_index).long()
        total = F.cross_entropy(
            known,
            kept,
            weight,
            ignore_index=loss.ignore_index,
            label_smoothing=loss.label_smoothing,
            reduction="sum",
        )
        rows = kept != loss.ignore_index
        shares = 1 if weight is None else weight[torch.where(rows, kept, 0)]
        count = torch.where(rows, shares, 0).sum()
    else:
        if isinstance(loss, nn.BCEWithLogitsLoss):
            each = F.binary_cross_entropy_with_logits(
                known, labels.to(known.dtype), weight, pos_weight=loss.pos_weight, reduction="none"
            )
        else:
            each = F.cross_entropy(
                known, labels, weight, label_smoothing=loss.label_smoothing, reduction="none"
            )
        there = mask.view(-1, *[1] * (each.dim() - 1)).expand_as(each)
        total, count = torch.where(there, each, 0).sum(), there.sum()
    if loss.reduction == "sum":
        return total
    return total / torch.where(count > 0, count, 1)
