"""The metric: one of torchmetrics by name, or the user's own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..ops._arguments import check_instance
from ._packages import package

#: "classes": an integer for each sample (or place); "labels": yes or no for each of several labels;
#: "numbers": regression.
Task = Literal["classes", "labels", "numbers"]
#: A name of ours, a `torchmetrics.Metric`, or a callable on outputs and labels.
Wanted = str | Callable[[Tensor, Tensor], Any]

IGNORED = -100
_NAMES = {
    "accuracy": "accuracy",
    "f1": "macro F1",
    "map": "mean average precision",
    "mae": "mean absolute error",
}
# Of one logit, whose sign says which of two classes.
_BINARY = {"accuracy": "accuracy", "f1": "F1 of the positive class", "map": "average precision"}


class Metric(NamedTuple):
    """A metric of outputs [N, ...] and labels [N, ...].

    Attributes:
        name: As a reader should see it.
        higher_is_better: False for errors.
        of: Outputs and labels → the number.
        each: Outputs and labels → a value for each sample [N], of which the metric is the mean;
            None where there is no such thing. Resampling it is a hundred times as fast.
    """

    name: str
    higher_is_better: bool
    of: Callable[[Tensor, Tensor], float]
    each: Callable[[Tensor, Tensor], Tensor] | None = None


def check_metric(metric: Wanted, higher_is_better: bool | None) -> None:
    """Raises what is wrong with the arguments, before anything is computed."""
    if isinstance(metric, str):
        if metric not in _NAMES:
            names = ", ".join(map(repr, _NAMES))
            raise ValueError(f"metric must be one of {names} or a callable, got {metric!r}")
        package("torchmetrics")
        return
    if not callable(metric):
        raise TypeError(f"metric must be a name or a callable, got {type(metric).__name__}")
    check_instance("metric", metric)
    if higher_is_better is None and getattr(metric, "higher_is_better", None) is None:
        raise TypeError(
            "higher_is_better= must be True or False for a metric of your own: False for an error"
        )


def task_of(metric: Wanted, outputs: Tensor, labels: Tensor) -> Task:
    """The kind of the labels, from the metric, their dtype and shape."""
    if metric == "mae":
        return "numbers"
    binary = single_logit(outputs, labels) or labels.shape == outputs.shape
    if binary and bool(((labels == 0) | (labels == 1)).all()):
        return "classes" if single_logit(outputs, labels) else "labels"
    return "numbers" if labels.is_floating_point() else "classes"


def single_logit(outputs: Tensor, labels: Tensor) -> bool:
    """One output for each sample, whose sign says which of two classes."""
    return outputs.numel() == labels.numel() == len(labels)


def metric_of(
    metric: Wanted, higher_is_better: bool | None, outputs: Tensor, labels: Tensor
) -> Metric:
    """The metric for outputs and labels like these.

    Raises:
        ValueError: the metric is not for such labels, a label is out of range, or a class that it
            averages over has no sample.
    """
    if isinstance(metric, str):
        task = task_of(metric, outputs, labels)
        of = _named(metric, task, outputs, labels)
        each = _each(metric, outputs, labels)
        binary = task == "classes" and single_logit(outputs, labels)
        name = (_BINARY if binary else _NAMES)[metric]
        return Metric(name, metric != "mae", _silently(of), each)
    better = bool(getattr(metric, "higher_is_better", higher_is_better))
    better = better if higher_is_better is None else higher_is_better
    name = getattr(metric, "__name__", type(metric).__name__)
    if hasattr(metric, "update") and hasattr(metric, "compute"):
        own: Any = _of_this_process(copy.deepcopy(metric))  # its state is the user's

        def computed(z: Tensor, y: Tensor) -> float:
            own.reset()
            own.update(z, y)
            return float(own.compute())

        return Metric(name, better, _silently(computed))
    called: Any = metric
    return Metric(name, better, _silently(lambda z, y: float(called(z, y))))


def _of_this_process(metric: Any) -> Any:
    """The metric on the CPU, where it waits for no other process, and counts no samples of one."""
    if not isinstance(metric, nn.Module):
        return metric
    for part in metric.modules():
        if hasattr(part, "sync_on_compute"):
            part.sync_on_compute = part._to_sync = False  # type: ignore[assignment]
    return metric.cpu()


def _named(
    metric: str, task: Task, outputs: Tensor, labels: Tensor
) -> Callable[[Tensor, Tensor], Any]:
    _check_task(metric, task, outputs, labels)
    if metric == "mae":
        regression = package("torchmetrics.functional.regression")
        return lambda z, y: regression.mean_absolute_error(
            z.reshape(y.shape).float().contiguous(), y.float()
        )
    classification = package("torchmetrics.functional.classification")
    kind = {"accuracy": "accuracy", "f1": "f1_score", "map": "average_precision"}[metric]
    plain: dict[str, Any] = {"validate_args": False, "ignore_index": IGNORED}
    if task == "classes" and single_logit(outputs, labels):
        binary = getattr(classification, f"binary_{kind}")
        return lambda z, y: binary(z.reshape(len(y)).sigmoid(), y.reshape(len(y)).long(), **plain)
    if task == "labels":
        of_labels = getattr(classification, f"multilabel_{kind}")
        count = outputs.shape[1]

        def mean_of_labels(z: Tensor, y: Tensor) -> Tensor:
            # It gets probabilities: torchmetrics takes numbers in [0, 1] for these already. A label
            # that no sample of a resample has would count as 0.
            each: Tensor = of_labels(z.sigmoid(), y.long(), count, average="none", **plain)
            return each[(y == 1).any(0)].mean()

        return mean_of_labels
    of_classes = getattr(classification, f"multiclass_{kind}")
    average = "micro" if metric == "accuracy" else "macro"
    classes = outputs.shape[1]
    if metric == "map":
        return lambda z, y: of_classes(z.softmax(1), y, classes, average=average, **plain)
    return lambda z, y: of_classes(z, y, classes, average=average, **plain)


def _each(
    metric: str, outputs: Tensor, labels: Tensor
) -> Callable[[Tensor, Tensor], Tensor] | None:
    if metric == "mae":
        return lambda z, y: (z.reshape(y.shape).double() - y).abs().reshape(len(y), -1).mean(1)
    if metric != "accuracy" or labels.numel() != len(labels) or bool((labels == IGNORED).any()):
        return None
    if single_logit(outputs, labels):
        return lambda z, y: ((z.flatten() > 0) == y.flatten()).double()
    return lambda z, y: (z.argmax(1) == y).double()


def _check_task(metric: str, task: Task, outputs: Tensor, labels: Tensor) -> None:
    if metric == "mae":
        if outputs.numel() != labels.numel():
            raise ValueError(
                f"metric='mae' needs labels of the outputs' shape {list(outputs.shape)}, got "
                f"{list(labels.shape)}"
            )
        return
    if task == "numbers":
        raise ValueError(
            f"metric={metric!r} is for classes, but the labels are {labels.dtype} "
            f'{list(labels.shape)}: give metric="mae" or one of your own'
        )
    if task == "labels":
        if metric == "accuracy":
            raise ValueError(
                f"the labels {list(labels.shape)} are a yes or no for each of several classes, "
                'for which accuracy is unusual: give metric="map" or "f1"'
            )
        check_positive(labels, "the loader")
        return
    single = single_logit(outputs, labels)
    if not single and labels.shape != outputs.shape[:1] + outputs.shape[2:]:
        raise ValueError(
            f"for class indices [N, ...] the model must return [N, C, ...]; the labels are "
            f"{list(labels.shape)}, the outputs {list(outputs.shape)}"
        )
    classes = 2 if single else outputs.shape[1]
    check_range(labels, classes)
    if metric != "accuracy":
        counts = torch.bincount(labels[labels != IGNORED].flatten().long(), minlength=classes)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"metric={metric!r} averages over classes, of which {_few(empty)} has no sample "
                'in the loader: give more samples, metric="accuracy" or one of your own'
            )


def check_range(labels: Tensor, classes: int, where: str = "loader") -> None:
    """Raises a ValueError where a class is none of the outputs'."""
    kept = labels[labels != IGNORED]
    if not kept.numel():
        raise ValueError(f"all labels of {where} are {IGNORED}, which are ignored")
    if not 0 <= int(kept.min()) <= int(kept.max()) < classes:
        raise ValueError(
            f"the labels of {where} run from {int(kept.min())} to {int(kept.max())}, but the model "
            f"has outputs for {classes} classes (labels that are numbers must be floating)"
        )


def looks_like_probabilities(task: Task, metric: Wanted, outputs: Tensor, labels: Tensor) -> bool:
    """True if one of our metrics on logits gets nothing but numbers from 0 to 1."""
    if metric not in ("accuracy", "f1", "map") or not outputs.numel():
        return False
    # The largest of several classes is the same before the softmax and after it.
    told = task == "labels" or metric == "map" or single_logit(outputs, labels)
    return told and bool(((outputs >= 0) & (outputs <= 1)).all())


def check_positive(labels: Tensor, where: str) -> None:
    """Raises a ValueError where a label of several is always or never there."""
    positive = (labels == 1).sum(0)
    for what, empty in (("positive", positive == 0), ("negative", positive == len(labels))):
        if bool(empty.any()):
            which = _few(empty.nonzero().flatten().tolist())
            raise ValueError(
                f"label {which} has no {what} sample among the {len(labels)} of {where}: give more "
                "samples, or leave the label out"
            )


def _few(numbers: list[int]) -> str:
    more = f" (and {len(numbers) - 5} more)" if len(numbers) > 5 else ""
    return ", ".join(map(str, numbers[:5])) + more


def _silently(of: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], float]:
    """The metric without warnings of classes that a bootstrap resample happens to lack."""

    def call(outputs: Tensor, labels: Tensor) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(of(outputs, labels))

    return call
