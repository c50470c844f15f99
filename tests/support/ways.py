"""Ways to tell a method more than logits and class indices, for tests of every method.

`see` of balancing.py shows a batch; with an entry "way" in what it returns, `arguments` is of that
way. Masks go by the label, so that they are those of each sample in every part of a batch. Tests of
single methods draw masks with `some`, and hold two ranks that differ to one with `two_ranks_find`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from ranks import ranks
from torch import Tensor, nn

import mmfuse

WAYS = ("present", "criterion", "scores")
CLASSES = 5


def options(way: str | None) -> dict[str, Any]:
    """The keyword arguments that the method is made with."""
    if way != "criterion":
        return {}
    weight = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)
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


Values = dict[str, Tensor]
Masks = dict[str, Tensor]


def everyone(names: Sequence[str], rows: int) -> Masks:
    """Nobody misses anything."""
    return {name: torch.ones(rows, dtype=torch.bool) for name in names}


def bad_masks(rows: int) -> list[tuple[dict[str, Tensor], type[Exception], str]]:
    """Entries that spoil `some(2, rows, …)`, with the error and its text."""
    return [
        ({"m1": torch.ones(rows)}, TypeError, r"present\['m1'\] must be a bool tensor \[B\], got"),
        ({"m1": torch.ones(3, dtype=torch.bool)}, ValueError, r"present\['m1'\] must have shape"),
        ({"m2": torch.ones(rows, dtype=torch.bool)}, ValueError, "present"),
    ]


def some(count: int, rows: int, seed: int, device: Any = "cpu") -> Masks:
    """30 % are missing, and the first row has nothing; they are called m0, m1 and so on."""
    generator = torch.Generator().manual_seed(100 + seed)
    found = {f"m{m}": torch.rand(rows, generator=generator) > 0.3 for m in range(count)}
    for mask in found.values():
        mask[0] = False
    return {name: mask.to(device) for name, mask in found.items()}


def spoilt(values: Values, masks: Masks) -> Values:
    """The same, with NaN where a modality is missing: nobody may look there."""
    found = {}
    for name, x in values.items():
        y = x.detach().clone()
        y[~masks[name]] = math.nan
        found[name] = y.requires_grad_()
    return found


def rows_of(rank: int, size: int, rows: int) -> slice:
    """The rank's part of a batch."""
    return slice(rank * rows // size, (rank + 1) * rows // size)


def steps_of(
    rank: int, size: int, batch: Callable[[int, int], tuple[Values, Tensor]]
) -> Iterator[tuple[Values, Tensor, Masks]]:
    """Three steps with three modalities as a rank sees them.

    The second half of each batch, all that the second of two ranks has, is without m0, and so is
    everything in the last step.
    """
    for step in range(3):
        values, labels = batch(3, step)
        rows = len(labels)
        masks, mine = some(3, rows, step), rows_of(rank, size, rows)
        masks["m0"][(0 if step == 2 else rows // 2) :] = False
        yield (
            {name: x[mine] for name, x in values.items()},
            labels[mine],
            {name: mask[mine] for name, mask in masks.items()},
        )


def two_ranks_find(function: Callable[[int, int], list[Tensor]]) -> list[Tensor]:
    """Holds what two ranks find, called with rank and size, to one rank's, which is returned."""
    whole = function(0, 1)
    for found in ranks(2).run(function, 2):
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12, equal_nan=True)
    return whole
