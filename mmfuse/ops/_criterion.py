"""How outputs and targets are compared, in the terms of PyTorch's losses, and the checks of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._devices import WIDE
from .._numbers import flag, whole
from ..reference.modality_scores import IGNORED_LABEL
from ._tensors import FLOATING, check_dense, why_unsupported


class Criterion(NamedTuple):
    """The keywords of `F.cross_entropy` and `F.binary_cross_entropy_with_logits`.

    Attributes:
        weight: [C], of each class or label.
        ignore_index: Rows with this class index do not count.
        multilabel: Each output says yes or no to a label of its own.
        pos_weight: [L], of each label's yes; with `multilabel` only.
    """

    weight: Tensor | None = None
    ignore_index: int = IGNORED_LABEL
    multilabel: bool = False
    pos_weight: Tensor | None = None


PLAIN = Criterion()

#: The schema of these arguments, in the operators that score; `checked` makes the values.
ARGUMENTS = (
    "Tensor[] logits, Tensor labels, Tensor? weight, Tensor? pos_weight, int ignore_index, "
    "bool multilabel"
)


def checked(
    names: Sequence[str], logits: Sequence[Tensor], labels: Tensor, criterion: Criterion
) -> tuple[Any, ...]:
    """The operator's arguments, from the public op's.

    Args:
        names: The names of the logits in errors.
        logits: [N, C, d1, …] each.
        labels: Their targets.
        criterion: How they are compared.

    Returns:
        Logits [N, C] or [N, C, D], labels, weight, pos_weight, ignore_index, multilabel.

    Raises:
        TypeError: an input has an unsupported type.
        ValueError: the shapes or devices do not fit.
    """
    if not logits:
        raise ValueError("logits must hold at least one modality")
    for name, z in zip(names, logits, strict=True):
        if not isinstance(z, Tensor) or z.layout is not torch.strided or z.dtype not in FLOATING:
            raise TypeError(f"{name} {why_unsupported(z)}")
    if not isinstance(labels, Tensor):
        kind = type(labels).__name__
        raise TypeError(f"labels must be an integer tensor of class indices, got {kind}")
    # Calls into PyTorch that are not needed are left out: together they cost what the op does.
    indices = labels.dtype is torch.int64
    if criterion is not PLAIN:
        flag("multilabel", criterion.multilabel)
    if criterion.multilabel or (not indices and labels.dtype in FLOATING):
        return _with_floating_targets(names, logits, labels, criterion)
    whole_numbers = indices or not (labels.is_complex() or labels.is_floating_point())  # float8
    if not whole_numbers or labels.layout is not torch.strided:
        raise TypeError(
            "labels must be an integer tensor of class indices or a floating one of probabilities, "
            f"got {labels.dtype}, {labels.layout}"
        )
    rows, device = labels.shape, labels.device
    dense = []
    for name, z in zip(names, logits, strict=True):
        shape = z.shape
        if len(shape) == 2 and len(rows) == 1 and shape[0] == rows[0] and shape[1] > 1:
            if z.device != device:
                _check_shape(name, z, labels)
            dense.append(z if z.is_contiguous() else readable(z))
        else:
            _check_shape(name, z, labels)
            dense.append(readable(z))
    labels = labels if indices else class_indices(labels)
    labels = labels if len(rows) < 3 else labels.flatten(1)
    labels = labels if labels.is_contiguous() else labels.contiguous()
    if criterion is PLAIN:
        return dense, labels, None, None, IGNORED_LABEL, False
    if criterion.pos_weight is not None:
        raise ValueError(
            "pos_weight is for multilabel=True; give weight, one number for each class"
        )
    ignored = whole("ignore_index", criterion.ignore_index)
    weight = _of_each_class("weight", criterion.weight, names, logits)
    return dense, labels, weight, None, ignored, False


def _check_shape(name: str, z: Tensor, labels: Tensor) -> None:
    """Raises a ValueError if class indices do not fit the logits."""
    if z.dim() < 2 or z.shape[1] < 2:
        raise ValueError(_too_few_classes(name, z))
    if z.dim() == 2 and labels.dim() == 1 and z.shape[0] != labels.shape[0]:
        raise ValueError(f"{name} has {z.shape[0]} rows, labels {labels.shape[0]}")
    if z.shape[:1] + z.shape[2:] != labels.shape:
        raise ValueError(_other_rows(name, z, labels))
    if z.device != labels.device:
        raise ValueError(f"{name} is on {z.device}, labels on {labels.device}")


def _with_floating_targets(
    names: Sequence[str], logits: Sequence[Tensor], labels: Tensor, criterion: Criterion
) -> tuple[Any, ...]:
    """Probabilities of the classes, or a yes or no for each label."""
    multilabel = criterion.multilabel
    if labels.dtype not in FLOATING or labels.layout is not torch.strided:
        raise TypeError(
            "labels must be floating, of the logits' shape, with multilabel=True, "
            f"got {labels.dtype}, {labels.layout}"
        )
    _check_constant("labels", labels)
    least = 1 if multilabel else 2
    for name, z in zip(names, logits, strict=True):
        if z.shape != labels.shape:
            if not multilabel and labels.shape == z.shape[:1] + z.shape[2:]:
                raise TypeError(
                    f"labels must be an integer tensor of class indices, got {labels.dtype} "
                    f"{list(labels.shape)}; probabilities have the shape of {name}, {list(z.shape)}"
                )
            raise ValueError(
                f"floating labels must have the shape of {name}, {list(z.shape)}, "
                f"got {list(labels.shape)}"
            )
        if z.dim() < 2 - multilabel or (z.dim() > 1 and z.shape[1] < least):
            raise ValueError(_too_few_classes(name, z) if not multilabel else _no_labels(name, z))
        if z.device != labels.device:
            raise ValueError(f"{name} is on {z.device}, labels on {labels.device}")
    if not multilabel and criterion.pos_weight is not None:
        raise ValueError(
            "pos_weight is for multilabel=True; give weight, one number for each class"
        )
    if criterion.ignore_index != IGNORED_LABEL:
        raise ValueError("ignore_index is for class indices; floating labels have no such value")
    weight = _of_each_class("weight", criterion.weight, names, logits)
    pos_weight = _of_each_class("pos_weight", criterion.pos_weight, names, logits)
    targets = labels.unsqueeze(1) if labels.dim() == 1 else labels
    targets = targets if targets.dim() < 4 else targets.flatten(2)
    dense = [readable(z) for z in logits]
    return dense, targets.detach(), weight, pos_weight, IGNORED_LABEL, multilabel


def readable(z: Tensor) -> Tensor:
    """Logits as [N, C] or [N, C, D], copied where neither classes nor rows are one by one.

    The kernels go along the classes, or else along the rows of one n; the dimensions behind the
    classes count as one, which those of a contiguous or channels_last tensor are.
    """
    if z.dim() == 1:
        z = z.unsqueeze(1)
    elif z.dim() > 3:
        z = z.flatten(2)
    of_rows = 0 if z.dim() == 2 or z.shape[2] == 1 else 2
    one_by_one = z.stride(1) == 1 and z.shape[1] > 1
    if not one_by_one:
        # Of a single row the gradient, which is dense, would have its classes one by one.
        one_by_one = z.shape[1] == 1 if z.shape[of_rows] == 1 else z.stride(of_rows) == 1
    # The gradient is dense: of rows that overlap it might have the classes one by one, or the rows.
    tied = (
        not z.is_contiguous()
        and z.stride(1) == 1 < z.shape[1]
        and (z.stride(0) == 1 < z.shape[0] or z.stride(of_rows) == 1 < z.shape[of_rows])
    )
    if one_by_one and not tied and 0 not in z.stride():
        return z
    # A tensor without a number is contiguous whatever its strides, so that it would stay as it is.
    return z.clone(memory_format=torch.contiguous_format)


def _of_each_class(
    called: str, values: Tensor | None, names: Sequence[str], logits: Sequence[Tensor]
) -> Tensor | None:
    """The weights as the kernels read them, [C] float64."""
    if values is None:
        return None
    if not isinstance(values, Tensor) or values.dtype not in FLOATING:
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{called} must be a floating tensor, got {kind}")
    check_dense(called, values)
    _check_constant(called, values)
    for name, z in zip(names, logits, strict=True):
        classes = z.shape[1] if z.dim() > 1 else 1
        if values.shape != (classes,):
            raise ValueError(
                f"{called} must have shape [{classes}], one number for each output of {name}, "
                f"got {list(values.shape)}"
            )
        if values.device != z.device:
            raise ValueError(f"{called} is on {values.device}, {name} on {z.device}")
    return values.detach().to(WIDE[values.device.type]).contiguous()


def _check_constant(called: str, values: Tensor) -> None:
    """Raises an error if a derivative in these targets or weights were lost."""
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{called} must not require a gradient: the scores have none for it; detach it"
        )
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():  # not in a dual level
        return
    if forward_ad.unpack_dual(values).tangent is not None:
        raise NotImplementedError(
            f"{called} carries a forward-mode tangent: the scores have no derivative for it; give "
            "its primal"
        )


def _too_few_classes(name: str, z: Tensor) -> str:
    shape = "[B, C, d1, …]" if z.dim() > 2 else "[B, C]"
    one = "; one logit z for two classes is F.pad(z, (1, 0)), or takes multilabel=True and "
    one += "floating labels"
    return f"{name} must have shape {shape} with C of at least 2, got {list(z.shape)}" + one * (
        z.shape[1:] == (1,)
    )


def _no_labels(name: str, z: Tensor) -> str:
    return f"{name} must have shape [B], [B, L] or [B, L, d1, …], got {list(z.shape)}"


def _other_rows(name: str, z: Tensor, labels: Tensor) -> str:
    """Class indices whose shape does not fit: those of one dimension too many are common."""
    if z.dim() > 2:
        wanted = [z.shape[0], *z.shape[2:]]
        return f"labels must have the shape of {name} without its classes, {wanted}, got " + str(
            list(labels.shape)
        )
    hint = ""
    if labels.dim() == 2:
        one_hot = "; of one-hot labels take labels.argmax(1)"
        hint = one_hot if labels.shape[1] > 1 else "; use squeeze(1)"
    return f"labels must be class indices [B], got shape {list(labels.shape)}{hint}"


def class_indices(labels: Tensor) -> Tensor:
    """The labels as int64: in uint8, class 156 would equal −100, which marks a row to ignore."""
    return labels.to(torch.int64)


def check_range(
    names: Sequence[str], logits: Sequence[Tensor], labels: Tensor, criterion: Criterion
) -> None:
    """Raises a ValueError that names the first target out of range, once a score is NaN."""
    if labels.is_floating_point():
        wrong = ~((labels >= 0) & (labels <= 1))
        if wrong.any():
            place, value = _first(wrong, labels)
            raise ValueError(
                f"{place} = {value} is out of range: floating labels lie between 0 and 1"
            )
        return
    labels = class_indices(labels)
    for name, z in zip(names, logits, strict=True):
        wrong = ((labels < 0) | (labels >= z.shape[1])) & (labels != criterion.ignore_index)
        if wrong.any():
            place, value = _first(wrong, labels)
            raise ValueError(
                f"{place} = {value} is out of range for {name} with {z.shape[1]} classes "
                f"({criterion.ignore_index} marks a row to ignore)"
            )


def _first(wrong: Tensor, labels: Tensor) -> tuple[str, float]:
    place = tuple(wrong.nonzero()[0].tolist())
    return f"labels[{', '.join(map(str, place))}]", labels[place].item()
