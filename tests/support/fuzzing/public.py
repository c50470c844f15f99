"""Arguments of the public functions that are no ops, and of the methods' constructors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .values import Drawer, Made, T

Arguments = dict[str, Any]
NAMES = ("audio", "visual", "text")


def _named(d: Drawer, *shape: int, **how: Any) -> dict[str, T]:
    return {name: d.tensor(*shape, **how) for name in NAMES[: d.whole(2, 3)]}


def _labels(d: Drawer, rows: int, classes: int) -> T:
    return d.tensor(rows, kind=classes, dtypes=("int64", "int32"))


def _present(d: Drawer, names: Any, rows: int) -> dict[str, T]:
    return {name: d.tensor(rows, dtypes=("bool",)) for name in names}


def drop_probabilities(d: Drawer) -> Arguments:
    return {"ratios": d.tensor(d.whole(2, 4), kind="positive"), "q_base": 0.5, "lam": d.of(0.5, 0)}


def ogm_coefficients(d: Drawer) -> Arguments:
    ratios = d.tensor(d.whole(2, 4), kind="positive")
    return {"ratios": ratios, "alpha": d.of(0.8, 0), "formula": d.of("tpami", "cvpr")}


def sample_contributions(d: Drawer) -> Arguments:
    rows, classes = d.whole(1, 9), d.whole(2, 5)
    logits = _named(d, rows, classes)
    fused = d.tensor(rows, classes)
    found: Arguments = {
        "logits": logits,
        "fused_logits": fused,
        "labels": _labels(d, rows, classes),
    }
    if d.maybe():
        found |= {"bins": d.of(8, 30), "gate": d.maybe()}
    if d.maybe(3):
        found["present"] = _present(d, logits, rows)
    return found


def sampler(d: Drawer) -> Arguments:
    rows = d.whole(1, 9)
    found: Arguments = {"contributions": d.tensor(rows, 2, kind="share")}
    if d.maybe():
        found |= {"thresholds": [0.5, 0.9], "copies": [3, 2, 1], "seed": 3, "shuffle": True}
    if d.maybe(3):
        found["present"] = d.tensor(rows, 2, dtypes=("bool",), kind="constant")
    return found


def unimodal_logits(d: Drawer) -> Arguments:
    rows, widths = d.size(), [d.whole(1, 5) for _ in range(2)]
    pairs = zip(NAMES[:2], widths, strict=True)
    features = {n: d.tensor(rows, w, dtypes=("float32",), grad=True) for n, w in pairs}
    return {"head": Made("linear", (sum(widths), 3)), "features": features, "output": None}


def unimodal_losses(d: Drawer) -> Arguments:
    rows, classes = d.whole(1, 9), d.whole(2, 5)
    logits = _named(d, rows, classes, grad=True)
    found: Arguments = {"logits": logits, "labels": _labels(d, rows, classes)}
    found["weights"] = d.of(1.0, dict.fromkeys(logits, 0.5))
    found["criterion"] = d.of(None, Made("cross entropy"))
    if d.maybe(3):
        found["present"] = _present(d, logits, rows)
    return found


def unimodal_outputs(d: Drawer) -> Arguments:
    return {**shapley_responses(d), "differentiable": d.maybe()}


def shapley_responses(d: Drawer) -> Arguments:
    inputs = _named(d, d.whole(1, 5), 3, dtypes=("float32", "float64"))
    names = Made("sum")
    return {"model": names, "inputs": inputs, "baseline": d.of("zero", "mean"), "forward": names}


def imbalance_report(d: Drawer) -> Arguments:
    rows = d.whole(1, 5)
    inputs = _named(d, rows, 3, dtypes=("float32",))
    found: Arguments = {"model": Made("sum"), "loader": [(inputs, _labels(d, rows, 2))]}
    found |= {"resamples": d.of(0, 3), "severities": [1.0]}
    if d.maybe():
        found |= {"metric": d.of("accuracy", "f1", "map"), "confidence": 0.9, "seed": 3}
    if d.maybe():
        found["baseline"] = d.of("zero", "mean")
    if d.maybe():
        found |= {"modalities": list(inputs), "shapley": d.of(True, False)}
    return found


def match_parameters(d: Drawer) -> Arguments:
    nets = [Made("linear", (2, 3)), Made("linear", (3, 3))]
    return {"model": Made("list", (nets,)), "encoders": {"audio": "0", "visual": d.of("1", ["1"])}}


def ogm_backward(d: Drawer) -> Arguments:
    rows = d.whole(1, 6)
    logits = {f"m{i}": d.tensor(rows, 4, plain=True) for i in range(2)}
    encoders = Made("encoders", (Made("linear", (2, 3)), Made("linear", (3, 3))))
    found: Arguments = {"loss": T((), "float64", grad=True), "encoders": encoders}
    found |= {
        "logits": logits,
        "labels": _labels(d, rows, 4),
        "stream": Made("stream", (1, 0, None)),
    }
    return {**found, "alpha": 0.8, "noise": d.maybe(), "formula": d.of("tpami", "cvpr")}


def scalars_of(d: Drawer) -> Arguments:
    result = Made("ogm result", (d.tensor(2, plain=True),))
    return {"result": result, "names": list(NAMES[:2])}


def scalar_log(d: Drawer) -> Arguments:
    return {"write": Made("nothing"), "every": d.whole(1, 5)}


def noise_stream(d: Drawer) -> Arguments:
    return {"seed": d.of(3, 2**64 - 1, None), "device": d.of(None, "cpu"), "name": d.of(None, "a")}


def inverse_error(d: Drawer) -> Arguments:
    shape = d.shape(3)
    target = d.tensor(*shape)
    return {
        "predictions": _named(d, *shape),
        "target": target,
        "error": d.of("squared", "absolute"),
    }


def combined(d: Drawer) -> Arguments:
    tasks = [_named(d, kind="positive", plain=True)] * d.whole(1, 3)
    return {"tasks": tasks, "weights": d.of(None, [1.0] * len(tasks))}


def grad_scale(d: Drawer) -> Arguments:
    return {"scaler": Made("scaler", (d.maybe(),)), "device": "cpu"}


def found_inf(d: Drawer) -> Arguments:
    optimizer = Made("optimizer", (Made("linear", (2, 2)),))
    return {"scaler": Made("scaler", (d.maybe(),)), "optimizer": optimizer}


#: The drivers by the name under which a user finds it in `mmfuse`.
FUNCTIONS: dict[str, Callable[[Drawer], Arguments]] = {
    "ContributionSampler": sampler,
    "NoiseStream": noise_stream,
    "ScalarLog": scalar_log,
    "amp.found_inf": found_inf,
    "amp.grad_scale": grad_scale,
    "drop_probabilities": drop_probabilities,
    "imbalance_report": imbalance_report,
    "match_parameters": match_parameters,
    "ogm_backward": ogm_backward,
    "ogm_coefficients": ogm_coefficients,
    "sample_contributions": sample_contributions,
    "scalars_of": scalars_of,
    "scores.combined": combined,
    "scores.error_ratios": inverse_error,
    "scores.inverse_error": inverse_error,
    "shapley_responses": shapley_responses,
    "unimodal_logits": unimodal_logits,
    "unimodal_losses": unimodal_losses,
    "unimodal_outputs": unimodal_outputs,
}
#: Methods' arguments without a default.
GIVEN: dict[str, Any] = {
    "encoders": Made("encoders", (Made("linear", (2, 3)), Made("linear", (3, 3)))),
    "head": Made("linear", (3, 4)),
}
#: All methods on gradients take these beside their own.
COMMON: dict[str, Any] = {
    "select": "all",
    "shared": None,
    "starts": 0,
    "ends": None,
    "apply_to": "gradient",
    "process_group": None,
    "criterion": None,
    "anchor_dtype": None,
    "anchor_device": None,
    "stream": None,
    "name": None,
    "backend": None,
}


def of_method(made: Callable[..., Any]) -> Callable[[Drawer], Arguments]:
    """A driver for a constructor, from its signature: some arguments with their defaults."""

    def driver(d: Drawer) -> Arguments:
        taken = inspect.signature(made).parameters
        defaults = {n: p.default for n, p in taken.items() if p.kind is not p.VAR_KEYWORD}
        if len(defaults) < len(taken):
            defaults |= COMMON
        found = {}
        for name, value in defaults.items():
            if value is inspect.Parameter.empty:
                found[name] = GIVEN[name]
            elif d.maybe(3):
                found[name] = value
        return found

    return driver
