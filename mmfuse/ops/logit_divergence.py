"""logit_divergence: how far two batches of logits are apart, for all pairs in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._numbers import flag
from ..reference.logit_divergence import KINDS, ROW_NUMBERS
from ._arguments import check_sequence
from ._registry import Op
from ._tensors import why_unsupported


def _fake(
    first: Sequence[Tensor], second: Sequence[Tensor], kind: int, per_row: bool
) -> tuple[Tensor, Tensor]:
    wide = any(z.dtype == torch.float64 for z in first)
    dtype = torch.float64 if wide else torch.float32
    batch, device = first[0].shape[0], first[0].device
    shape = [len(first), batch] if per_row else [len(first)]
    value = torch.empty(shape, dtype=dtype, device=device)
    return value, torch.empty([len(first), ROW_NUMBERS, batch], dtype=dtype, device=device)


def _fake_backward(
    grad: Tensor,
    rows: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    kind: int,
    to_first: bool,
    to_second: bool,
) -> list[Tensor]:
    wanted = [*(first if to_first else ()), *(second if to_second else ())]
    return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in wanted]


_op = Op(
    "logit_divergence",
    "(Tensor[] first, Tensor[] second, int kind, bool per_row) -> (Tensor, Tensor)",
    _fake,
)
_backward_op = Op(
    "logit_divergence_backward",
    "(Tensor grad, Tensor rows, Tensor[] first, Tensor[] second, int kind, bool to_first, "
    "bool to_second) -> Tensor[]",
    _fake_backward,
    module="logit_divergence",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    first, second, ctx.kind, _ = inputs
    rows = output[1]
    ctx.mark_non_differentiable(rows)
    ctx.save_for_backward(rows, *first, *second)


def _backward(backend: str, ctx: Any, grad: Tensor, _: Any) -> Any:
    rows, *logits = ctx.saved_tensors
    count = len(logits) // 2
    # A teacher wants no gradient; the logits are the last of the call's inputs.
    needed = ctx.needs_input_grad[-2 * count :]
    wanted = any(needed[:count]), any(needed[count:])
    inputs = grad.contiguous(), rows, logits[:count], logits[count:], ctx.kind, *wanted
    found = _backward_op(backend, grad.device, *inputs)
    return (
        found[:count] if wanted[0] else None,
        found[-count:] if wanted[1] else None,
        None,
        None,
    )


_op.register_autograd(_backward, _setup_context)
_backward_op.register_no_second_derivative()


def logit_divergence(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    kind: str = "kl",
    per_row: bool = False,
    backend: str | None = None,
) -> Tensor:
    """How far p = softmax(first[k]) and q = softmax(second[k]) are apart, for each pair k, in nats.

    With m = (p + q) / 2,

    * "kl" is KL(p‖q), as in IPRM, MBSD and the distillation of G2D: p is the target;
    * "mixture" is ½ KL(m‖p) + ½ KL(m‖q), as in the released code of LFM (NeurIPS 2024);
    * "js" is the Jensen–Shannon divergence ½ KL(p‖m) + ½ KL(q‖m), as in MCR (NeurIPS 2025).

    One read of all logits, in one launch (two for a batch of more than 128 rows, of which the
    second adds up), and one read and one write more for the gradients, in one launch.
    Differentiable in both, once. Terms are formed from ln p − ln q such that none is negative or
    cancels: nearly equal logits have a small divergence, and equal ones exactly 0.

    Equivalent to, for each pair of logits a and b::

        log_p, log_q = a.log_softmax(1), b.log_softmax(1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        kl = lambda s, t: (s.exp() * (s - t)).sum(1)  # where s.exp() is 0: 0
        rows = {
            "kl": kl(log_p, log_q),
            "mixture": (kl(log_m, log_p) + kl(log_m, log_q)) / 2,
            "js": (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
        }[kind]
        rows if per_row else rows.mean()

    Args:
        first: K tensors [B, C] of logits; float16, bfloat16, float32 or float64. C may differ from
            pair to pair. Rows may lie anywhere; logits whose classes are not one by one in memory
            are copied. −inf masks a class.
        second: K tensors, each of the shape of first's and on its device. Of two dtypes in a pair,
            both are promoted, which copies.
        kind: "kl", "mixture" or "js".
        per_row: Return the divergence of each row instead of the mean over the batch.
        backend: Name of a backend; None for the best one.

    Returns:
        [K], or [K, B] with `per_row`; float64 if some logits are, otherwise float32. NaN for B = 0.
        Infinite where p > 0 and q = 0, with "mixture" also where q > 0 and p = 0; gradients of
        such a row have no meaning.

    Raises:
        TypeError: logits are sparse, integer or complex, or not in a list.
        ValueError: `kind` is unknown, or lengths, shapes or devices do not match.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")
    pairs = _checked(first, second)
    inputs = (
        [a for a, _ in pairs],
        [b for _, b in pairs],
        KINDS.index(kind),
        flag("per_row", per_row),
    )
    value: Tensor = _op(backend, first[0].device, *inputs)[0]
    return value


def _checked(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of logits of one dtype, as the kernels read them."""
    for name, logits in (("first", first), ("second", second)):
        if isinstance(logits, Tensor):
            raise TypeError(f"{name} must be a list of tensors [B, C], got one tensor: [{name}]?")
        if not isinstance(logits, (list, tuple)):
            check_sequence(name, logits)
    if len(first) != len(second):
        raise ValueError(f"first holds {len(first)} tensors, second {len(second)}")
    if not first:
        raise ValueError("first and second must hold at least one tensor each")
    pairs = []
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        for name, z in ((f"first[{k}]", a), (f"second[{k}]", b)):
            reason = why_unsupported(z)
            if reason is not None:
                raise TypeError(f"{name} {reason}")
        if a.dim() != 2 or a.shape[1] < 2:
            hint = "; of one logit z for two classes take F.pad(z, (1, 0))"
            raise ValueError(
                f"first[{k}] must have shape [B, C] with C of at least 2, got {list(a.shape)}"
                + hint * (a.shape[1:] == (1,))
            )
        if b.shape != a.shape:
            raise ValueError(f"second[{k}] has shape {list(b.shape)}, first[{k}] {list(a.shape)}")
        if a.shape[0] != first[0].shape[0]:
            raise ValueError(f"first[{k}] has {a.shape[0]} rows, first[0] {first[0].shape[0]}")
        for name, z in ((f"first[{k}]", a), (f"second[{k}]", b)):
            if z.device != first[0].device:
                raise ValueError(f"{name} is on {z.device}, first[0] on {first[0].device}")
        dtype = a.dtype if a.dtype is b.dtype else torch.promote_types(a.dtype, b.dtype)
        pairs.append((_readable(a, dtype), _readable(b, dtype)))
    return pairs


def _readable(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits whose classes are one by one in memory."""
    z = z if z.dtype is dtype else z.to(dtype)
    if z.stride(1) != 1 and z.numel() == 0:  # contiguous whatever its strides
        return z.reshape(-1).view(z.shape)
    return z if z.stride(1) == 1 else z.contiguous()
