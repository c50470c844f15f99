"""Linear probes: what a linear model makes of a frozen encoder's features."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._metrics import IGNORED, Task, check_positive, check_range, single_logit
from ._packages import package

_ITERATIONS = 1000


def check_labels(task: Task, train: Tensor, test: Tensor, outputs: Tensor) -> None:
    """Raises a ValueError where a probe could not be fitted to these labels.

    Raises:
        ValueError: labels are of places, or a class has no training sample.
    """
    if task == "classes" and train.numel() > len(train):
        raise ValueError(
            f"probes need one label for each sample, got labels {list(train.shape)}: leave out "
            "encoders="
        )
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"train_loader has labels of shape {list(train.shape)}, loader {list(test.shape)}"
        )
    if task == "labels":
        check_positive(train, "train_loader")
    elif task == "classes":
        train, test = train.flatten(), test.flatten()
        classes = 2 if single_logit(outputs, test) else outputs.shape[1]
        check_range(train, classes, "train_loader")
        check_range(test, classes)
        there = set(train[train != IGNORED].tolist())
        absent = sorted(set(test[test != IGNORED].tolist()) - there)
        if absent:
            raise ValueError(
                f"class {absent[0]} has samples in loader but none in train_loader, so that no "
                "probe can know it: give a train_loader with all classes"
            )
        if len(there) < 2:
            raise ValueError("train_loader has samples of one class only, which needs no probe")


def probe(
    task: Task, train: Tensor, labels: Tensor, test: Tensor, outputs: Tensor
) -> tuple[Tensor, bool]:
    """Fits a linear model on standardised features, and applies it.

    Logistic regression for classes and labels, with scikit-learn's default penalty; ridge
    regression for numbers, whose penalty is chosen by leave-one-out errors.

    Args:
        task: The kind of the labels.
        train: Features [N, D].
        labels: [N, ...].
        test: Features [T, D].
        outputs: The model's for the test, whose shape and dtype the probe's take.

    Returns:
        The probe's outputs for `test`, and whether the fit has converged.
    """
    linear, pipeline = package("sklearn.linear_model"), package("sklearn.pipeline")
    scaler = package("sklearn.preprocessing").StandardScaler()
    converging = package("sklearn.exceptions").ConvergenceWarning
    if task == "classes":
        labels = labels.flatten()
        kept = labels != IGNORED
        train, labels = train[kept], labels[kept].long()
    elif labels.dim() > 2:  # of places, such as times: scikit-learn takes one row for each sample
        labels = labels.flatten(1)
    if task == "numbers":
        model = linear.RidgeCV(alphas=[10.0**k for k in range(-3, 4)])
    else:
        model = linear.LogisticRegression(max_iter=_ITERATIONS)
        if task == "labels":
            model = package("sklearn.multiclass").OneVsRestClassifier(model)
    fitted = pipeline.make_pipeline(scaler, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted.fit(train.double().numpy(), labels.numpy())
    converged = not any(issubclass(w.category, converging) for w in caught)
    features = test.double().numpy()
    if task == "numbers":
        return _as(fitted.predict(features), outputs).reshape(outputs.shape), converged
    found = _as(fitted.decision_function(features), outputs)
    if task == "labels":
        return found.reshape(outputs.shape), converged
    return _by_class(found, fitted[-1].classes_.tolist(), outputs), converged


def _by_class(found: Tensor, classes: Iterable[int], outputs: Tensor) -> Tensor:
    """Logits in the columns of their classes; a class without training samples is impossible."""
    if outputs.numel() == len(outputs):
        return found.reshape(outputs.shape)
    if found.dim() == 1:
        found = torch.stack([torch.zeros_like(found), found], 1)  # of the second of two
    placed = torch.full_like(outputs, -torch.inf)
    placed[:, list(classes)] = found
    return placed


def _as(found: Any, outputs: Tensor) -> Tensor:
    return torch.from_numpy(found).to(outputs.dtype)
