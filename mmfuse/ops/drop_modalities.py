"""drop_modalities: whole modalities of single samples are set to zero, all in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..noise import NoiseStream
from ._arguments import check_near, check_sequence, check_stream, is_single
from ._registry import Op
from ._tensors import check_named, check_vector


class DroppedModalities(NamedTuple):
    """The features of M modalities after the drop.

    Attributes:
        features: M tensors like those that were given.
        keep: [M, B] bool, False where sample i has lost modality m.
    """

    features: list[Tensor]
    keep: Tensor


def _fake(features: Sequence[Tensor], q: Tensor, *_: object) -> tuple[list[Tensor], Tensor]:
    first = features[0]
    keep = torch.empty(len(features), first.shape[0], dtype=torch.bool, device=first.device)
    return _fake_backward(features), keep


def _fake_backward(grads: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(g, memory_format=torch.contiguous_format) for g in grads]


_op = Op(
    "drop_modalities",
    "(Tensor[] features, Tensor q, Tensor noise_state, int[] noise_ids, int[] noise_offsets, "
    "Tensor? scale) -> (Tensor[], Tensor)",
    _fake,
)
_backward_op = Op(
    "drop_modalities_backward",
    "(Tensor[] grads, Tensor keep, Tensor? scale) -> Tensor[]",
    _fake_backward,
    module="drop_modalities",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, keep = output
    ctx.mark_non_differentiable(keep)
    ctx.save_for_backward(keep, *([] if inputs[5] is None else [inputs[5]]))


def _backward(backend: str, ctx: Any, grads: Sequence[Tensor], _: Tensor) -> Any:
    keep, *scale = ctx.saved_tensors
    return _back(backend, grads, keep, scale[0] if scale else None), None, None, None, None, None


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, keep, scale = inputs
    ctx.save_for_backward(keep, *([] if scale is None else [scale]))


def _double_backward(backend: str, ctx: Any, grads: Sequence[Tensor]) -> Any:
    keep, *scale = ctx.saved_tensors
    return _back(backend, grads, keep, scale[0] if scale else None), None, None


def _back(backend: str, grads: Sequence[Tensor], keep: Tensor, scale: Tensor | None) -> Any:
    return _backward_op(backend, keep.device, [g.contiguous() for g in grads], keep, scale)


_op.register_autograd(_backward, _setup_context)
# A mask is linear, and its own transpose: the derivative of any order is the same operator.
_backward_op.register_autograd(_double_backward, _setup_context_of_backward)


def drop_modalities(
    features: Sequence[Tensor],
    q: Tensor,
    stream: NoiseStream,
    *,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> DroppedModalities:
    """Sets modality m of each sample to zero with probability q[m]: φ ← scale·keep·φ.

    One read and one write of every feature, all modalities in one launch, without the host knowing
    what was dropped. The gradient passes where the feature did, in any order (OPM: Wei et al.,
    TPAMI 2024).

    Equivalent to, for each modality::

        keep = torch.rand(B) > q[m]
        torch.where(keep[:, None], scale * feature, 0)

    Args:
        features: M tensors [B, …] on one device; float16, bfloat16, float32 or float64, which may
            be mixed, and any shapes after the batch.
        q: [M] floating, probabilities in [0, 1] that a sample loses modality m; compared in
            float32. A NaN drops nothing.
        stream: The random stream. Sample i of modality m draws the i-th number of the stream's m-th
            id. The step is not advanced.
        scale: 0-d floating, a factor for what is kept; no gradient flows to it. None for 1.
        backend: Name of a backend; None for the best one.

    Returns:
        `DroppedModalities`. A dropped feature is zero, also where it was NaN or infinite.

    Raises:
        TypeError: a feature is sparse, integer or complex, or `stream` is no NoiseStream.
        ValueError: batch sizes or devices differ, a shape does not fit, or, on the CPU, a
            probability lies outside [0, 1]. On other devices looking would cost a synchronisation;
            q below 0 acts as 0 there, and above 1 as 1.
    """
    if not isinstance(features, (list, tuple)):
        check_sequence("features", features)
    return named_drop(
        [f"features[{m}]" for m in range(len(features))], features, q, stream, scale, backend
    )


def named_drop(
    names: Sequence[str],
    features: Sequence[Tensor],
    q: Tensor,
    stream: NoiseStream,
    scale: Tensor | None,
    backend: str | None,
) -> DroppedModalities:
    """`drop_modalities`, with errors that call the features by these names."""
    check_batches(names, features)
    check_vector("q", q, len(features))
    check_stream(stream)
    if q.is_meta and not features[0].is_meta:
        raise ValueError(f"q is on the meta device, features on {features[0].device}")
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        for m, probability in enumerate(q.tolist()):
            if probability < 0 or probability > 1:
                raise ValueError(f"q[{m}] must be a probability in [0, 1], got {probability}")
    if scale is not None and not isinstance(scale, Tensor):
        raise TypeError(f"scale must be a 0-d floating-point tensor, got {type(scale).__name__}")
    if scale is not None and not is_single(scale):
        raise ValueError("scale must be a dense 0-d floating-point tensor")
    if scale is not None:
        check_near("scale", scale, features[0].device)
    ids, offsets = stream.counters(len(features))
    device = features[0].device
    if scale is not None:
        wide = any(f.dtype == torch.float64 for f in features)
        scale = scale.detach().to(device, torch.float64 if wide else torch.float32)
    if q.dtype is not torch.float32 or q.device != device or q.requires_grad:
        q = q.detach().to(device, torch.float32)
    dropped, keep = _op(
        backend,
        device,
        [f.contiguous() for f in features],
        q.contiguous(),
        stream.state.to(device),
        ids,
        offsets,
        scale,
    )
    return DroppedModalities(dropped, keep)


def check_batches(names: Sequence[str], features: Sequence[Tensor]) -> None:
    """Checks that there are features, all [B, …] with one B on one device.

    Raises:
        TypeError: one of them is sparse, integer or complex.
        ValueError: there are none, or their batch sizes or devices differ.
    """
    if not features:
        raise ValueError("features must hold at least one modality")
    check_named(features, names.__getitem__)
    first = features[0]
    # Usual arguments cost the least.
    if not torch.compiler.is_compiling() and first.dim() > 0:
        kinds = {(feature.shape[:1], feature.device) for feature in features}
        if len(kinds) == 1:
            return
    for name, feature in zip(names, features, strict=True):
        if feature.dim() == 0:
            raise ValueError(f"{name} must be [B, …], got a 0-d tensor")
        if feature.shape[0] != first.shape[0]:
            raise ValueError(
                f"features must have one batch size: {names[0]} has {first.shape[0]} rows, "
                f"{name} {feature.shape[0]}"
            )
        if feature.device != first.device:
            raise ValueError(f"{name} is on {feature.device}, {names[0]} on {first.device}")
