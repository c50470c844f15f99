"""imbalance_report: how much a trained model owes to each modality, and which one is behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._numbers import real, whole
from ..loop.masking import Baseline
from ..loop.passes import check_made
from ..loop.shapley import share_of
from ..noise import NoiseStream
from ..ops._arguments import check_instance
from ._arguments import (
    calls_of,
    check_known,
    check_several,
    device_of,
    encoders_of,
    names_of,
    severities_of,
)
from ._batches import Read, batches
from ._conditions import MOST_EXACT, Conditions, Corrupt, Gathered, Key, features_of, gathered
from ._history import History, history_of
from ._intervals import Estimate, estimates
from ._metrics import (
    Metric,
    Task,
    Wanted,
    check_metric,
    looks_like_probabilities,
    metric_of,
    task_of,
)
from ._packages import package
from ._probes import check_labels, probe
from ._untouched import untouched
from .summary import ImbalanceReport, Probes

__all__ = ["ImbalanceReport", "imbalance_report"]

_MOST_RESAMPLES = 100_000

#: One modality's own model or encoder: a module or a callable on its input.
Calls = Mapping[str, Callable[..., Any]] | nn.ModuleDict


def imbalance_report(
    model: Callable[..., Any],
    loader: Iterable[Any],
    *,
    modalities: Sequence[str] | None = None,
    metric: Wanted = "accuracy",
    higher_is_better: bool | None = None,
    baseline: Baseline = "zero",
    severities: Sequence[float] = (0.5, 1.0, 2.0),
    corrupt: Corrupt | None = None,
    unimodal_models: Calls | None = None,
    encoders: Mapping[str, Callable[..., Any] | str] | nn.ModuleDict | None = None,
    unimodal_encoders: Calls | None = None,
    train_loader: Iterable[Any] | None = None,
    history: Sequence[Mapping[str, Tensor | float]] | None = None,
    shapley: bool | None = None,
    forward: Callable[[dict[str, Tensor]], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    batch: Read | None = None,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> ImbalanceReport:
    """Measures how much a trained model owes to each modality, and which one is behind.

    ::

        report = mmfuse.imbalance_report(model, test_loader)
        print(report)                  # a table and what it says, in sentences
        report.save("report.html")     # or .png, .json

    It needs the packages of the extra ``report``, and a model that was trained by any method, in
    any framework. With v(S) the metric where the modalities S are there and all others masked, it
    has v of all, of each alone, of all without one, of none, and with noise on one; and each
    modality's Shapley value of the metric (SHAPE; Hu, Li & Zhou 2022, arXiv:2205.00302)::

        φ_m = Σ_S |S|! (M − |S| − 1)! / M! · (v(S ∪ m) − v(S))   over all S without m

    whose share is φ_m / (v(all) − v(none)). Masking says how the model uses a modality, but not
    how much the modality could tell it. For that, give models of one modality alone:
    `unimodal_models` for the metric, and for linear probes of the frozen features `encoders`,
    `unimodal_encoders` and `train_loader`. The ratio of both probes is the evidence of imbalance:
    an encoder below 1 has learnt less in joint training than it does alone.

    Intervals are percentile bootstraps over the loader's samples, from the same resamples for all
    numbers. They say nothing of other training runs: train with several seeds for that.

    The model runs in evaluation mode and without gradients, 2^M + M·len(severities) times for each
    batch. Parameters, gradients, batch norm's statistics, training flags and device stay as
    they are, and so do the random states of PyTorch, NumPy and Python. Your own forward hooks
    run. With several processes call it in one, with a loader of all samples; in all, if the model
    is sharded (FSDP2).

    Args:
        model: A module or another callable on the inputs, which it gets as arguments of their
            names, as in `unimodal_outputs`. Of DistributedDataParallel the module within is called.
        loader: Yields batches: (inputs by name, labels); a mapping of tensors with "labels" or
            "label", as of Transformers; with `modalities`, M inputs and the labels in one
            tuple. `batch` turns any other form into the first of these. Inputs are moved to the
            model's device. Rows of all tensors are samples. Evaluate on samples that were not
            trained on.
        modalities: Names of the M ≥ 2 modalities among the inputs; the model gets all others, such
            as a padding mask, as they are. None for all inputs.
        metric: "accuracy" for class indices, where labels of −100 are ignored; "f1", macro F1, or
            "map", mean average precision, for class indices or a yes or no for each of several
            labels [N, L] (of one logit for two classes, those of the positive class); "mae" for
            regression: all of torchmetrics, on logits. Or a `torchmetrics.Metric`, or a callable
            on all outputs and all labels, both on the CPU.
        higher_is_better: For a metric of your own that does not say so itself.
        baseline: The input that replaces a masked modality's: "zero", "mean" of the batch (which
            must have more than one sample), or a callable on name and input, as in
            `unimodal_outputs`; ``lambda name, x: x.roll(1, 0)`` gives it another sample's.
        severities: Standard deviations of the noise, in those of the batch's own input.
        corrupt: Instead of Gaussian noise, a callable on name, input and severity, whose
            meaning you choose.
        unimodal_models: Name → a model trained on this modality alone, called with its input.
        encoders: Name → the encoder in the model, as a module, the name of one, or a callable on
            the modality's input that returns its features [B, ...].
        unimodal_encoders: Name → such an encoder, trained on the modality alone.
        train_loader: The training samples, to fit the probes on, as `loader` yields them.
        history: The result of ``out.as_dict()`` in each step of training, or a `ScalarLog`'s rows.
        shapley: True to compute Shapley values, which take 2^M passes; None does so for up to 6
            modalities.
        forward: Calls the model with name → input, as in `unimodal_outputs`.
        output: From what the model returns to its outputs [B, ...], as ``lambda out: out.logits``.
        batch: From what a loader yields to (inputs by name, labels).
        resamples: Of the bootstrap; 0 for no intervals. "map" of many samples takes long.
        confidence: Of the intervals.
        seed: Of noise and resamples.

    Returns:
        The report.

    Raises:
        ImportError: a package of the extra is missing; the message says how to install it.
        TypeError: an argument is of another kind than it should be; the loader yields something
            else; or the model cannot be called like this, as in `unimodal_outputs`.
        ValueError: there are fewer than two modalities or no batch; each batch is one sample, which
            is its own mean; encoders match nothing in the model; labels do not fit metric or
            outputs; a class has no sample where the metric or a probe needs one; an output is not
            finite; or as in `unimodal_outputs`.
    """
    check_metric(metric, higher_is_better)
    options = _Options(
        whole("resamples", resamples, least=0),
        real("confidence", confidence),
        whole("seed", seed, 0),
    )
    if options.resamples > _MOST_RESAMPLES:
        raise ValueError(f"resamples must be at most {_MOST_RESAMPLES}, got {resamples}")
    if not 0 < options.confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    strengths = severities_of(severities)
    names = None if modalities is None else names_of(modalities)
    if not callable(model):
        hint = " (are model and loader swapped?)" if isinstance(model, Iterable) else ""
        raise TypeError(
            f"model must be a module or another callable, got {type(model).__name__}{hint}"
        )
    check_instance("model", model)
    for called, function in (("corrupt", corrupt), ("batch", batch)):
        if function is not None and not callable(function):
            raise TypeError(f"{called} must be callable, got {type(function).__name__}")
    past = history_of(history)
    alone = calls_of("unimodal_models", unimodal_models)
    probed = {
        "encoders": encoders_of(model, encoders),
        "unimodal_encoders": calls_of("unimodal_encoders", unimodal_encoders),
    }
    _check_probes(probed, train_loader)
    if options.resamples:
        package("scipy.stats")
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    calls = [bare, *alone.values(), *(call for own in probed.values() for call in own.values())]
    if forward is not None and forward is not bare:
        calls.append(forward)
    for call in calls:
        if isinstance(call, nn.Module):
            check_made("model or encoder", call)
    device = device_of(bare)
    with untouched(calls, device or torch.device("cpu"), [loader, train_loader]):
        read = batches("loader", loader, batch, names, device)
        first = next(read)
        names = tuple(first.modalities)
        check_several(names)
        check_known(names, unimodal_models=alone, **probed)
        conditions = Conditions(
            model=bare,
            names=names,
            baseline=baseline,
            severities=strengths,
            corrupt=corrupt,
            alone=alone,
            shapley=len(names) <= MOST_EXACT if shapley is None else bool(shapley),
            forward=forward,
            output=output,
            stream=NoiseStream(options.seed, device, name="imbalance report"),
        )
        asked = [partial(features_of, own, called) for called, own in probed.items()]
        found, labels = gathered(chain([first], read), conditions, *asked)
        train: Gathered = ({}, labels)
        if train_loader is not None and probed["encoders"]:
            train = gathered(batches("train_loader", train_loader, batch, names, device), *asked)
    conditions.check_means()
    outputs = found["masked", conditions.every]
    measure = metric_of(metric, higher_is_better, outputs, labels)
    task = task_of(metric, outputs, labels)
    if looks_like_probabilities(task, metric, outputs, labels):
        conditions.notes.append(
            "All outputs of the model lie between 0 and 1. If they are probabilities, these numbers"
            " are wrong: give logits, as with output=torch.logit."
        )
    _probe(found, train, labels, task, conditions)
    return _report(found, labels, measure, conditions, past, options)


class _Options(NamedTuple):
    """The bootstrap's options."""

    resamples: int
    confidence: float
    seed: int


def _check_probes(probed: Mapping[str, Mapping[str, Any]], train_loader: object) -> None:
    if not any(probed.values()):
        return
    strange = [name for name in probed["unimodal_encoders"] if name not in probed["encoders"]]
    if strange:
        raise ValueError(
            f"unimodal_encoders names {strange}, to which encoders= has no counterpart"
        )
    if train_loader is None:
        raise ValueError("probes of encoders= need train_loader=, the samples to fit them on")
    package("sklearn")


def _probe(
    found: dict[Key, Tensor], train: Gathered, labels: Tensor, task: Task, conditions: Conditions
) -> None:
    """Puts the probes' outputs in the place of the features."""
    features, known = train
    outputs = found["masked", conditions.every]
    if features:
        check_labels(task, known, labels, outputs)
    for key in features:
        called, name = key
        found[key], converged = probe(task, features[key], known, found[key], outputs)
        if not converged:
            conditions.notes.append(f"The linear probe of {called}[{name!r}] has not converged.")


def _report(
    found: Mapping[Key, Tensor],
    labels: Tensor,
    measure: Metric,
    conditions: Conditions,
    past: History | None,
    options: _Options,
) -> ImbalanceReport:
    """Every number with its interval, in its place."""
    each_of = {key: measure.each(z, labels) for key, z in found.items()} if measure.each else None

    def numbers(rows: Tensor | None) -> dict[Key, float]:
        if rows is None:
            values = {key: measure.of(outputs, labels) for key, outputs in found.items()}
        elif each_of is not None:
            values = {key: float(each[rows].mean()) for key, each in each_of.items()}
        else:
            drawn = labels[rows]
            values = {key: measure.of(outputs[rows], drawn) for key, outputs in found.items()}
        return {**values, **_derived(values, conditions, measure.higher_is_better)}

    estimated = estimates(len(labels), numbers, **options._asdict())
    names, notes = conditions.names, conditions.notes
    if not conditions.shapley:
        notes.append(
            f"Shapley values of {len(names)} modalities need {1 << len(names)} passes for each "
            "batch and were left out; shapley=True takes them."
        )

    def each(kind: str) -> dict[str, Estimate]:
        return {name: estimated[kind, name] for name in names if (kind, name) in estimated}

    joint = each("encoders")
    noisy: dict[str, dict[float, Estimate]] = {}
    for key, value in estimated.items():
        if key[0] == "noisy":
            noisy.setdefault(key[1], {})[key[2]] = value
    every = conditions.every
    return ImbalanceReport(
        metric=measure.name,
        higher_is_better=measure.higher_is_better,
        samples=len(labels),
        modalities=names,
        confidence=options.confidence if options.resamples and len(labels) > 1 else None,
        joint=estimated["masked", every],
        nothing=estimated["masked", 0],
        alone={name: estimated["masked", 1 << m] for m, name in enumerate(names)},
        removed={name: estimated["masked", every ^ 1 << m] for m, name in enumerate(names)},
        noisy=noisy,
        trained_alone=each("trained alone"),
        leans_on=_leans_on(estimated, conditions),
        shapley=each("shapley"),
        shapley_share=each("share"),
        probes={
            name: Probes(
                own, estimated.get(("unimodal_encoders", name)), estimated.get(("ratio", name))
            )
            for name, own in joint.items()
        },
        history=past,
        notes=tuple(notes),
    )


def _leans_on(estimated: Mapping[Key, Estimate], conditions: Conditions) -> str | None:
    """The modality whose removal costs more than nothing, and than each other's."""
    for m, name in enumerate(conditions.names):
        others = [other for other in range(len(conditions.names)) if other != m]
        apart = [estimated["cost", m], *(estimated["cost beyond", m, other] for other in others)]
        if all(difference.low is not None and difference.low > 0 for difference in apart):
            return name
    return None


def _derived(
    values: Mapping[Key, float], conditions: Conditions, higher_is_better: bool
) -> dict[Key, float]:
    """Shapley values, their shares, the ratios of probes, and the costs of removal."""
    found: dict[Key, float] = {}
    sign = 1 if higher_is_better else -1
    every = conditions.every
    joint = sign * values["masked", every]
    costs = [joint - sign * values["masked", every ^ 1 << m] for m in range(len(conditions.names))]
    for m, cost in enumerate(costs):
        found["cost", m] = cost
        for other, less in enumerate(costs):
            if other != m:
                found["cost beyond", m, other] = cost - less
    if conditions.shapley:
        wide = {
            coalition: torch.tensor(sign * values["masked", coalition], dtype=torch.float64)
            for coalition in conditions.coalitions()
        }
        gain = float(wide[conditions.every] - wide[0])
        for m, name in enumerate(conditions.names):
            phi = float(share_of(wide, m, len(conditions.names)))
            found["shapley", name] = phi
            found["share", name] = phi / gain if gain > 0 else math.nan
    for kind, name in [key for key in values if key[0] == "unimodal_encoders"]:
        own, alone = values["encoders", name], values[kind, name]
        above, below = (own, alone) if higher_is_better else (alone, own)
        found["ratio", name] = above / below if below > 0 else math.nan
    return found
