"""ARM's contributions of single samples, as in the authors' script of 2024."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._numbers import flag
from ..loop.given import check_present
from ..ops.modality_scores import class_indices, named_scores
from ._arm_information import Complete, normalised_information
from ._means import mean_of_others


@torch.no_grad()
def sample_contributions(
    logits: Mapping[str, Tensor],
    fused_logits: Tensor,
    labels: Tensor,
    *,
    bins: int = 30,
    conditional_bins: int = 2,
    gate: bool = False,
    present: Mapping[str, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each sample's own contributions, for re-sampling.

    P_m = p_c·nmi_m + p_m·(mean over j ≠ m of (nmi_j − ncmi_j)), where the paired values of a sample
    are the logits of its C classes and p its own probability of the true class. One call for the
    whole batch; see `mmfuse.ContributionSampler`.

    Formulas: `mmfuse.methods.arm`. Tested against them. They are those of the authors' script of
    2024, which their repository no longer has, hence no numbers of its own. It took ``gate=True``
    and ``conditional_bins=10``, and a conditional entropy of its own that is none; that one is not
    reproduced here. The defaults are the bins of ARM, and probabilities as they are.

    Args:
        logits: Name → [B, C] logits of each of M ≥ 2 modalities alone.
        fused_logits: [B, C] logits of the fused representation.
        labels: [B] integer class indices.
        bins: As in `ARM`.
        conditional_bins: As in `ARM`.
        gate: True if a probability counts as 0 where its logits' largest is not the true class.
        present: Name → [B] bool, which samples have the modality. The others j are then those that
            the sample has.
        backend: Name of a backend; None for the best one.

    Returns:
        [B, M] float64; NaN for a sample whose logits are not finite, for a modality that a sample
        lacks, and for the only one that it has.

    Raises:
        TypeError: an input has an unsupported type.
        ValueError: fewer than two modalities, names or shapes that do not fit, an empty batch, or,
            on the CPU, a label out of range.
    """
    if not isinstance(logits, Mapping):
        raise TypeError(f"logits must map names to tensors, got {type(logits).__name__}")
    if len(logits) < 2:
        raise ValueError(f"balancing needs at least two modalities, got {list(logits)}")
    names = [*(f"logits[{name!r}]" for name in logits), "fused_logits"]
    rows = [*logits.values(), fused_logits]
    named_scores(names, rows, labels, backend)  # checks types, shapes and labels
    for name, z in zip(names, rows, strict=True):
        if z.shape != rows[0].shape:
            raise ValueError(
                f"all logits must have one shape: {names[0]} is {list(rows[0].shape)}, "
                f"{name} {list(z.shape)}"
            )
    complete = None
    if present is not None:
        complete = Complete(check_present(list(logits), present, len(labels), labels.device))
    nmi, ncmi = normalised_information(
        rows, bins, conditional_bins, complete=complete, backend=backend
    )
    index = class_indices(labels).clamp(0, rows[0].shape[1] - 1).unsqueeze(1)
    p = torch.stack([z.to(nmi.dtype).softmax(1).gather(1, index).squeeze(1) for z in rows])
    if flag("gate", gate):
        right = torch.stack([z.argmax(1) == index.squeeze(1) for z in rows])
        p = torch.where(right, p, 0.0)
    here = None if complete is None else complete.here
    return (p[-1] * nmi + p[:-1] * mean_of_others(nmi - ncmi, here)).T.contiguous()
