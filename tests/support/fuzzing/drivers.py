"""Arguments of each public op, by its name: usual ones, which `mistakes.py` then spoils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .values import Drawer, Made, T

Arguments = dict[str, Any]
WIDE = ("float32", "float64")


def _gradients(d: Drawer, count: int) -> list[T]:
    return [d.tensor(*d.shape()) for _ in range(count)]


def _mirror(d: Drawer, tensors: list[T]) -> list[T]:
    return [d.tensor(*t.shape) for t in tensors]


def _count(d: Drawer, most: int = 6) -> int:
    return d.whole(0, most) if not d.maybe(30) else int(d.of(40, 130, 300))


def grad_stats(d: Drawer) -> Arguments:
    grads = _gradients(d, _count(d))
    found: Arguments = {"grads": grads}
    if d.maybe():
        found["params"] = _mirror(d, grads)
        if d.maybe():
            found["anchors"] = _mirror(d, grads)
    return found


def update_grads(d: Drawer) -> Arguments:
    grads = [t for t in _gradients(d, _count(d)) if t.layout != "expanded" or not t.shape]
    count = len(grads)
    found: Arguments = {"grads": grads, "scale": d.tensor(count, kind="share")}
    if d.maybe():
        found["params"] = _mirror(d, grads)
        found["pull"] = d.tensor(count, kind="share")
        if d.maybe():
            found["anchors"] = _mirror(d, grads)
    if d.maybe():
        found["noise_std"] = d.tensor(count, kind="share")
        found["stream"] = d.stream(count)
    if d.maybe():
        found["finite"] = T((), "bool", kind="constant")
    if d.maybe(3):
        found["sq_norm"] = T((count,), d.of(*WIDE), kind="positive")
    return found


def keep_state(d: Drawer) -> Arguments:
    shapes = [d.shape(3) for _ in range(_count(d))]
    kinds = [d.of("float32", "float64", "int64", "bool", "bfloat16") for _ in shapes]
    whole = [3 if kind == "int64" else "normal" for kind in kinds]
    state, values = (
        [
            T(shape, kind, "contiguous", d.whole(0, 9), how)
            for shape, kind, how in zip(shapes, kinds, whole, strict=True)
        ]
        for _ in range(2)
    )
    found: Arguments = {
        "state": state,
        "values": values,
        "finite": T((), "bool", seed=d.whole(0, 9)),
    }
    if d.maybe():
        found["sums"] = d.tensor(d.whole(0, 5), dtypes=WIDE)
    return found


def _labelled(d: Drawer, *kinds: str) -> Arguments:
    rows, classes, count = d.size(), d.whole(2, 9), d.whole(1, 4)
    more = tuple(d.whole(0, 4) for _ in range(d.of(0, 0, 0, 1, 2)))
    grad = d.maybe(3)
    kind = d.of(*(kinds or ("indices", "shares", "multilabel")))
    if kind == "indices":
        labels = d.tensor(rows, *more, kind=classes, dtypes=("int64", "int32", "uint8"))
    else:
        labels = d.tensor(rows, classes, *more, kind="share")
    logits = [d.tensor(rows, classes, *more, grad=grad) for _ in range(count)]
    found: Arguments = {"logits": logits, "labels": labels}
    if d.maybe(3):
        found["weight"] = d.tensor(classes, kind="positive")
    if kind == "multilabel":
        found["multilabel"] = True
        if d.maybe():
            found["pos_weight"] = d.tensor(classes, kind="positive")
    elif kind == "indices" and d.maybe(3):
        found["ignore_index"] = d.of(0, 1, 255)
    return found


def sample_scores(d: Drawer) -> Arguments:
    return {**_labelled(d), "statistics": d.maybe(3)}


def logit_divergence(d: Drawer) -> Arguments:
    rows = d.size()
    shapes = [(rows, d.whole(2, 40)) for _ in range(d.whole(1, 4))]
    return {
        "first": [d.tensor(*shape, grad=True) for shape in shapes],
        "second": [d.tensor(*shape, grad=True) for shape in shapes],
        "kind": d.of("kl", "mixture", "js"),
        "per_row": d.maybe(),
    }


def _pair(d: Drawer, first: str, second: str) -> Arguments:
    shape = (max(d.size(), 1), d.whole(1, 70))
    return {first: d.tensor(*shape, grad=True), second: d.tensor(*shape, grad=True)}


def info_nce(d: Drawer) -> Arguments:
    found = _pair(d, "a", "b")
    return {**found, "temperature": d.of(1.0, 0.5, T((), kind="positive"))}


def co_information_gate(d: Drawer) -> Arguments:
    shape = (d.size(), d.whole(0, 40))
    features = [d.tensor(*shape) for _ in range(d.whole(2, 4))]
    return {"features": features, "threshold": d.of(0.0, -0.5, 0.5, T((), kind="positive"))}


def drop_modalities(d: Drawer) -> Arguments:
    rows, count = d.size(), d.whole(1, 4)
    found: Arguments = {
        "features": [d.tensor(rows, *d.shape(2), grad=True) for _ in range(count)],
        "q": d.tensor(count, kind="share"),
        "stream": d.stream(count),
    }
    if d.maybe():
        found["scale"] = d.tensor(kind="positive", plain=True)
    return found


def scale_grad(d: Drawer) -> Arguments:
    found: Arguments = {"x": d.tensor(*d.shape(), grad=True)}
    found["coefficient"] = d.tensor(kind="share", plain=True)
    if d.maybe():
        found |= {"noise_std": d.tensor(kind="share", plain=True), "stream": d.stream(1)}
    return found


def noisy_views(d: Drawer) -> Arguments:
    sigma = d.of(0.5, 0.0, 1)
    return {"x": d.tensor(*d.shape(), grad=True), "sigma": sigma, "stream": d.stream(2)}


def redundancy_ratio(d: Drawer) -> Arguments:
    shape, dtype = d.shape(), d.of("float32", "float64", "bfloat16")
    z1, z2 = (d.tensor(*shape, dtypes=(dtype,), grad=True) for _ in range(2))
    return {"z1": z1, "z2": z2, "input_sq": d.tensor(kind="positive", plain=True, grad=True)}


def _variables(d: Drawer, names: str) -> Arguments:
    shape = (max(d.size(), 1),) if d.maybe() else (d.whole(1, 3), max(d.size(), 1))
    kind = d.of("normal", "whole", "constant")
    found: Arguments = {name: d.tensor(*shape, kind=kind) for name in names}
    if d.maybe(3):
        found["present"] = d.tensor(*shape, dtypes=("bool",))
    return found


def mutual_information(d: Drawer) -> Arguments:
    found = _variables(d, "xy")
    if "present" not in found and d.maybe():
        found = {**_soft(d), "estimator": "soft"}
    return {**found, "bins": d.of(2, 3, 8, 30, 256)}


def _soft(d: Drawer) -> Arguments:
    shape = (d.whole(1, 3), max(d.size(), 1))
    return {name: d.tensor(*shape, grad=True) for name in "xy"}


def three_variables(d: Drawer) -> Arguments:
    return {**_variables(d, "xyz"), "bins": d.of(1, 2, 5, 32)}


def soft_histogram(d: Drawer) -> Arguments:
    return {**_soft(d), "bins": d.of(2, 3, 8, 256)}


def joint_entropies(d: Drawer) -> Arguments:
    found = _variables(d, "abc"[: d.whole(2, 3)])
    shape = next(iter(found.values())).shape
    if len(shape) == 1:
        found = {n: T((1, *shape), t.dtype, t.layout, t.seed, t.kind) for n, t in found.items()}
    present = found.pop("present", None)
    order = d.whole(2, len(found))
    tuples = [tuple(d.whole(0, len(found) - 1) for _ in range(order)) for _ in range(d.whole(1, 3))]
    result = {"data": list(found.values()), "tuples": tuples, "bins": d.of(1, 2, 7, 32)}
    return result if present is None else {**result, "present": present}


def shared_information(d: Drawer) -> Arguments:
    shape = (d.whole(1, 3), max(d.size(), 1))
    dtypes = d.of(("float32",), ("float64",), ("float32", "float16"))
    data = [d.tensor(*shape, dtypes=dtypes) for _ in range(d.whole(1, 3))]
    target = d.tensor(*shape, kind="whole", dtypes=dtypes)
    return {"data": data, "target": target, "bins": d.of(2, 8, 30), "conditional_bins": d.of(2, 5)}


def discrepancy_ratios(d: Drawer) -> Arguments:
    return {"scores": d.tensor(d.whole(2, 9), kind="positive", dtypes=WIDE)}


def _owned(d: Drawer, modalities: int) -> tuple[list[int], Made, Made]:
    owner = [d.whole(0, modalities - 1) for _ in range(d.whole(0, 5))]
    grads = [d.tensor(3 + t) for t in range(len(owner))]
    return owner, Made("stats", (grads,)), Made("stats", (grads, _mirror(d, grads)))


def modulation_factors(d: Drawer) -> Arguments:
    count = d.whole(2, 5)
    found: Arguments = {"scores": d.tensor(count, kind="positive", dtypes=WIDE)}
    found |= {"alpha": d.of(0.8, 0.0, 1), "formula": d.of("tpami", "cvpr", "mlb")}
    if found["formula"] == "mlb":
        found["beta"] = d.of(2.0, 10, 0.5)
    if d.maybe():
        found["owner"], stats, _ = _owned(d, count)
        if d.maybe():
            found |= {"stats": stats, "eps": d.of(0.0, 1e-8)}
    return found


def information_pull(d: Drawer) -> Arguments:
    count = d.whole(2, 5)
    shape = (count, count) if d.maybe() else (count,)
    found: Arguments = {
        "scores": d.tensor(*shape, kind="positive", dtypes=WIDE),
        "window_open": d.tensor(count, dtypes=("bool",)),
        "steps": d.tensor(count, kind=5, dtypes=("int64",)),
        "beta": d.of(0.9, 0.0, 1),
    }
    if d.maybe():
        found["owner"] = [d.whole(0, count - 1) for _ in range(d.whole(0, 5))]
    if d.maybe(3):
        found["count"] = d.tensor(*(shape if d.maybe() else ()), kind="positive")
    if d.maybe(3):
        found["multipliers"] = [1.5] * count
    return found


def progress_factors(d: Drawer) -> Arguments:
    count = d.whole(2, 5)
    wide = (d.of(*WIDE),)
    found: Arguments = {
        "scores": d.tensor(*(count, count)[: d.whole(1, 2)], kind="positive", dtypes=WIDE),
        "last_scores": d.tensor(count, count, kind="positive", dtypes=wide),
        "last_shares": d.tensor(count, dtypes=wide),
        "rho": d.of(1.3, 1),
        "bound": d.of(None, 2.0, 1),
    }
    if d.maybe():
        found["owner"] = [d.whole(0, count - 1) for _ in range(d.whole(0, 5))]
        found["scale_dtype"] = getattr(torch, d.of(*WIDE)) if d.maybe() else None
    return found


def redundancy_pull(d: Drawer) -> Arguments:
    count, window = d.whole(2, 4), d.whole(2, 4)
    wide: Any = {"kind": "positive", "dtypes": ("float64",)}
    state = Made(
        "state",
        (
            d.tensor(count, window, **wide),
            d.tensor(count, kind=5, dtypes=("int64",)),
            *(d.tensor(count, **wide) for _ in range(3)),
        ),
    )
    found: Arguments = {
        "scores": d.tensor(*(count, count)[: d.whole(1, 2)], kind="positive", dtypes=WIDE),
        "redundancy": d.of(None, d.tensor(count, kind="positive", dtypes=WIDE)),
        "gate": d.tensor(kind="positive", dtypes=WIDE, plain=True),
        "state": state,
    }
    if d.maybe():
        found["owner"], _, stats = _owned(d, count)
        if d.maybe():
            found["stats"] = stats
    return found


def active_backend(d: Drawer) -> Arguments:
    return {"op": d.of("grad_stats", "info_nce"), "device": "cpu", "backend": d.of(None, "cpu")}


def use_backend(d: Drawer) -> Arguments:
    return {"backend": d.of(None, "cpu", "reference")}


#: The drivers by the op's public name.
DRIVERS: dict[str, Callable[[Drawer], Arguments]] = {
    "active_backend": active_backend,
    "co_information": three_variables,
    "co_information_gate": co_information_gate,
    "conditional_mutual_information": three_variables,
    "discrepancy_ratios": discrepancy_ratios,
    "drop_modalities": drop_modalities,
    "grad_stats": grad_stats,
    "info_nce": info_nce,
    "information_pull": information_pull,
    "joint_entropies": joint_entropies,
    "keep_state_": keep_state,
    "logit_divergence": logit_divergence,
    "modality_accuracies": lambda d: _labelled(d, "indices"),
    "modality_scores": _labelled,
    "modulation_factors": modulation_factors,
    "mutual_information": mutual_information,
    "noisy_views": noisy_views,
    "paired_cosine": lambda d: _pair(d, "a", "b"),
    "progress_factors": progress_factors,
    "redundancy_pull": redundancy_pull,
    "redundancy_ratio": redundancy_ratio,
    "sample_scores": sample_scores,
    "scale_grad": scale_grad,
    "shared_information": shared_information,
    "soft_histogram": soft_histogram,
    "update_grads_": update_grads,
    "use_backend": use_backend,
}
