"""Ways to tell a method more than logits and class indices, for tests of every method.

`see` of balancing.py shows a batch; with an entry "way" in what it returns, `arguments` is of that
way. Masks go by the label, so that they are those of each sample in every part of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import mmfuse

WAYS = ("present", "criterion", "scores")
CLASSES = 5


def options(way: str | None) -> dict[str, Any]:
    """What the method is made with."""
    if way != "criterion":
        return {}
    weight = torch.linspace(0.5, 2.0, CLASSES)
    return {"criterion": nn.CrossEntropyLoss(weight=weight, ignore_index=CLASSES - 1)}


def present(seen: Mapping[str, Any]) -> dict[str, Tensor]:
    """The m-th modality is missing where the label is m; or what the batch says."""
    given: dict[str, Tensor] | None = seen.get("present")
    if given is not None:
        return given
    return {name: seen["labels"] != m for m, name in enumerate(seen["features"])}


def arguments(way: str, found: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """A method's arguments, from those without anything more."""
    if way == "criterion":
        return dict(found)
    if way == "present":
        return {**found, "present": present(seen)}
    logits = {n: z.detach() for n, z in seen["logits"].items()}
    if "fused_logits" in found:
        logits["fused"] = seen["fused_logits"].detach()
    prob = mmfuse.ops.modality_scores(list(logits.values()), seen["labels"]).prob
    kept = {n: x for n, x in found.items() if n not in ("logits", "labels", "fused_logits")}
    scores = dict(zip(logits, prob.unbind(), strict=True))
    return {**kept, "scores": scores, "count": float(len(seen["labels"]))}
