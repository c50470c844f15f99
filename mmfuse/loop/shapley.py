"""Shapley responses: each modality's share of the joint outputs, from passes with masked inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .masking import (
    Baseline,
    Inputs,
    called_with,
    check_inputs,
    device_of,
    masks_of,
    passes_through,
)
from .passes import evaluating


def shapley_responses(
    model: Callable[..., Any],
    inputs: Inputs,
    *,
    baseline: Baseline = "zero",
    forward: Callable[[dict[str, Tensor]], Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Each modality's Shapley share of the joint outputs; the shares add up to these.

    For any fusion, also where no encoder has a modality of its own, as AGM (Li et al., ICCV 2023)
    needs them. With f(S) the model's output for the modalities S, all others masked, and f of none
    at all left out::

        r_m = Σ_S |S|! (M − |S| − 1)! / M! · (f(S ∪ m) − f(S))   over all S without m

    which for two modalities is r_a = ½ (f(a, v) − f(v) + f(a)). It takes the training step's own
    forward pass, with all modalities and in the model's own mode, and 2^M − 2 more, in evaluation
    mode and with gradients::

        responses = mmfuse.shapley_responses(model, {"audio": audio, "visual": visual})
        out = agm(responses, labels)
        loss = F.cross_entropy(sum(out.logits.values()), labels)

    The first pass moves batch norm's statistics and PyTorch's random state as training does. The
    others, which come after it, leave no trace in buffers, training flags or random state. Your own
    forward hooks run in all. Do not checkpoint activations in the model: the backward pass would
    repeat those passes in the model's own mode.

    A model in DistributedDataParallel goes through it in the first pass only, which is the one that
    its reducer counts. FSDP2 gathers parameters in each pass: all ranks must call this.

    Args:
        model: A module or another callable on the inputs.
        inputs: Name → input of M ≥ 2 modalities, as in `unimodal_outputs`.
        baseline: The input that stands in for a masked modality's, as in `unimodal_outputs`.
        forward: Calls the model with name → input, as in `unimodal_outputs`; not for a model in
            DistributedDataParallel.
        output: From what the model returns to the tensor that is wanted, as in `unimodal_outputs`.

    Returns:
        Name → share, in the order of `inputs`; float32 for outputs in half precision.

    Raises:
        TypeError: as `unimodal_outputs`.
        ValueError: as `unimodal_outputs`; there are fewer than two modalities; outputs of different
            shapes; or `forward` for a model in DistributedDataParallel.
    """
    check_inputs(model, inputs, baseline)
    names = list(inputs)
    if len(names) < 2:
        raise ValueError(f"inputs must hold at least two modalities, got {names}")
    alone = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if alone is not model and forward is not None:
        raise ValueError(
            "forward= would call a DistributedDataParallel in every pass, but it expects one pass "
            "for each backward pass: leave out forward=, and wrap a module that takes the inputs "
            "by their names"
        )
    every = (1 << len(names)) - 1
    found = {every: called_with(model, forward, output, "for all modalities", dict(inputs))}
    with passes_through(alone, forward, device_of(alone, inputs), evaluating):
        masks = masks_of(inputs, baseline)
        for coalition in range(1, every):
            there = [name for m, name in enumerate(names) if coalition >> m & 1]
            given = {name: inputs[name] if name in there else masks[name] for name in names}
            where = "where " + " and ".join(map(repr, there)) + " alone are there"
            found[coalition] = called_with(alone, forward, output, where, given)
            if found[coalition].shape != found[every].shape:
                raise ValueError(
                    f"the model's output has shape {list(found[every].shape)} for all modalities, "
                    f"and {list(found[coalition].shape)} {where}"
                )
    return {name: share_of(found, m, len(names)) for m, name in enumerate(names)}


def share_of(outputs: dict[int, Tensor], modality: int, count: int) -> Tensor:
    """The sum over coalitions of `modality`'s part."""
    total: Tensor | None = None
    for coalition, f in outputs.items():
        size, inside = coalition.bit_count(), coalition >> modality & 1
        # The weight of the pair that this coalition is a part of, with the modality or without.
        factor = 1 / (count * math.comb(count - 1, size - 1 if inside else size))
        wide = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
        if total is None:  # all modalities, which comes first
            total = wide * factor
        else:
            total = torch.add(total, wide, alpha=factor if inside else -factor)
    assert total is not None
    return total
