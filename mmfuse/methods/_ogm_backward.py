"""OGM in one call, in place of ``loss.backward()``."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from ..loop._guards import Guard
from ..loop._parameters import Encoders, Select, Shared
from ..loop.given import Loss, More
from ..loop.ranks import Group
from ..noise import NoiseStream, default_stream
from ..ops.modulation_factors import Formula
from .ogm import OGM, Noise, OGMResult


def ogm_backward(
    loss: Tensor,
    encoders: Encoders,
    logits: Mapping[str, Tensor] | None = None,
    labels: Tensor | None = None,
    *,
    alpha: float = 0.8,
    noise: Noise = True,
    formula: Formula = "tpami",
    select: Select = "all",
    shared: Shared | None = None,
    stream: NoiseStream | None = None,
    retain_graph: bool = False,
    process_group: Group = None,
    criterion: Loss = None,
    backend: str | None = None,
    **more: Unpack[More],
) -> OGMResult:
    """Takes the place of ``loss.backward()``: back-propagates, then modulates the gradients.

    OGM-GE by default, OGM with ``noise=False``. Formulas: `mmfuse.methods.ogm`. Tested against
    them; the authors' code is `OGM.official`.
    Gradients end up in ``.grad``. The scale of the loss does not matter, so that the loss may come
    from a `GradScaler`; clip gradients afterwards.

    Equivalent to::

        loss.backward()
        for name, encoder in encoders.items():
            for p in encoder.parameters():
                p.grad = k[name] * p.grad + p.grad.std() * torch.randn_like(p.grad)

    Args:
        loss: The scalar loss of the fused prediction.
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
        logits: Name → [B, C] logits of each modality alone (see `mmfuse.unimodal_logits`).
        labels: [B] integer class indices; rows labelled −100 do not count.
        alpha: Strength of the modulation, at least 0.
        noise: True to add noise (GE), or a callable that makes it, as in `OGM`.
        formula: As in `OGM`.
        select: Which parameters: "all", "matrix" (ndim ≥ 2), "conv" (ndim = 4), or a callable on
            a parameter. The released code modulates "conv" only.
        shared: Parameters of no modality, which stay as they are: a module, or several parts.
        stream: The random stream, advanced by one step; None for the default one, which
            `torch.manual_seed` controls; several ranks keep that of their first call.
        retain_graph: As for ``loss.backward``.
        process_group: The ranks whose samples the scores are averaged over; None for all ranks
            where torch.distributed is initialized, False for this rank alone.
        criterion: The loss that logits and labels are for, as in `mmfuse.GradientMethod`.
        backend: Name of a backend; None for the best one.
        **more: ``present``, ``scores``, ``ratios``, ``coefficients``, as there.

    Returns:
        `OGMResult`.

    Raises:
        TypeError: a parameter, a gradient, logits or labels have an unsupported type.
        RuntimeError: the gradients are those that the call before has left, so that a backward pass
            would add to them: see `OGM.observe` for gradient accumulation.
        ValueError: the names differ, a modality has no parameter, a parameter is in two, a shape,
            a label or a hyper-parameter is wrong. Nothing has been changed then.
    """
    made = _Once(
        encoders,
        alpha=alpha,
        noise=noise,
        formula=formula,
        select=select,
        shared=shared,
        stream=stream,
        process_group=process_group,
        criterion=criterion,
        backend=backend,
    )
    made.name = OGM.__name__  # in error texts
    global _latest
    eager = not torch.compiler.is_dynamo_compiling()
    if eager:  # the object of the next call is another one
        made.modalities.compared = _compared
    if eager and _latest is not None:
        made.modalities.guard.follow(_latest, made.modalities)
    result: OGMResult = made.backward(loss, logits, labels, retain_graph=retain_graph, **more)
    if eager:
        _latest = made.modalities.guard
    return result


# The gradients that the latest call has left; the next one has another object.
_latest: Guard | None = None
# The groups whose ranks have compared their encoders, in the first call.
_compared: WeakSet[dist.ProcessGroup] = WeakSet()


class _Once(OGM):
    """OGM for one step."""

    def _new_stream(self, name: str | None) -> NoiseStream:
        return default_stream(self.modalities.device, alone=self.process_group is False)
