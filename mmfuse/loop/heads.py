"""Each modality's own logits, from a head that sees all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._devices import WIDE
from ..ops._tensors import why_unsupported
from .passes import check_made, scoring, training
from .shards import is_dtensor

Head = Callable[[Tensor], Tensor]

# A sum of M logits, in its order, is as exact as one of their products, but not the same bits.
_DIFFERENCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-9}


def unimodal_logits(
    head: Head, features: Mapping[str, Tensor], *, output: Tensor | None = None
) -> dict[str, Tensor]:
    """The logits of each modality alone, from a head on the concatenated features.

    For an affine head, one of the kinds of ``nn.Linear``, they are z^m = W^m φ^m + b / M with W^m
    the columns that multiply φ^m (Peng et al., CVPR 2022, Eq. 6): the logits of all modalities add
    up to the head's output. Any other head h is called once per modality, with the other features
    set to zero, z^m = h(0, …, φ^m, …, 0) (TPAMI 2024, section 4.3.7); these do not add up.

    Equivalent to, for two modalities and ``nn.Linear``::

        {"audio": a @ head.weight[:, :A].T + head.bias / 2,
         "visual": v @ head.weight[:, A:].T + head.bias / 2}

    A head is affine if it is ``nn.Linear``, a subclass of it, parametrized or sharded by
    `fully_shard`, or one of these in DistributedDataParallel, DataParallel, `torch.compile` or an
    ``nn.Sequential`` of one. Only the weight of a plain ``nn.Linear`` is read; others are called,
    so that hooks and a `forward` of their own count: z^m = h(0, …, φ^m, …, 0) − (M − 1)/M · h(0).

    Calling leaves no trace in the head: batch norm's statistics, training flags and PyTorch's
    random state stay as they were. Under `torch.no_grad` it is called in evaluation mode; with
    gradients, which a loss may ask for, in the head's own mode. Your own forward hooks run.

    Args:
        head: From the concatenation [B, ΣD_m] to C classes.
        features: Name → [B, D_m], in the order in which they are concatenated.
        output: The head's output for these features, to compare with: features in another order
            give logits that look plausible and are wrong. Of affine heads. It waits for the device,
            so that it is for the first step, or for a test.

    Returns:
        Name → [B, C].

    Raises:
        TypeError: the head cannot be called, `features` does not map names to dense floating
            tensors, or a feature has another dtype than an ``nn.Linear`` outside of autocast.
        ValueError: the features do not add up to the head's input, are not [B, D], differ in their
            batch, or are on another device; the head has not been used yet (lazy); or the logits do
            not add up to `output`.
    """
    _check(head, features)
    seen = _unwrapped(head)
    widths = {name: feature.shape[1] for name, feature in features.items()}
    if not _plain(seen) and isinstance(seen, nn.Module):
        check_made("head", seen)
    if not isinstance(seen, nn.Linear):
        if output is not None:
            raise ValueError(
                "output= is for affine heads, whose logits add up to it; leave it out for a "
                f"{type(seen).__name__}"
            )
        return _called(seen, features)
    if sum(widths.values()) != seen.in_features:
        raise ValueError(
            f"the head takes {seen.in_features} features, but {widths} add up to "
            f"{sum(widths.values())}"
        )
    found = _split(seen, features) if _plain(seen) else _called_affine(seen, features)
    if output is not None:
        _check_sum(found, output)
    return found


def _check(head: object, features: object) -> None:
    if not isinstance(features, Mapping):
        hint = " (are head and features swapped?)" if isinstance(head, Mapping) else ""
        raise TypeError(f"features must map names to tensors, got {type(features).__name__}{hint}")
    if not callable(head):
        raise TypeError(f"head must be a module or another callable, got {type(head).__name__}")
    if isinstance(head, type):
        raise TypeError(f"head must be a module, got the class {head.__name__}: make one")
    if not features:
        raise ValueError("features must hold at least one modality")
    first, of_first = next(iter(features.items()))
    for name, feature in features.items():
        if not isinstance(feature, Tensor):
            raise TypeError(f"features[{name!r}] is not a tensor but {type(feature).__name__}")
        reason = why_unsupported(feature)
        if reason is not None:
            raise TypeError(f"features[{name!r}] {reason}")
        if feature.dim() != 2:
            raise ValueError(f"features[{name!r}] must be [B, D], got {list(feature.shape)}")
        if feature.shape[0] != of_first.shape[0]:
            raise ValueError(
                f"features[{name!r}] has {feature.shape[0]} rows, features[{first!r}] "
                f"{of_first.shape[0]}"
            )
        if feature.device != of_first.device:
            raise ValueError(
                f"features[{name!r}] is on {feature.device}, features[{first!r}] on "
                f"{of_first.device}"
            )


def _unwrapped(head: Head) -> Head:
    """The affine layer in wrappers that do not change what it computes; or the head itself."""
    found: object = head
    while isinstance(found, nn.Module) and not _hooked(found):
        if isinstance(found, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            found = found.module
        elif isinstance(getattr(found, "_orig_mod", None), nn.Module):  # torch.compile's
            found = found._orig_mod
        elif type(found) is nn.Sequential and len(found) == 1:
            found = found[0]
        else:
            break
    return found if isinstance(found, nn.Linear) else head


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _plain(head: object) -> TypeGuard[nn.Linear]:
    """True if its weight and bias are all that there is to it."""
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and not _hooked(head)
        and not is_dtensor(head.weight)
    )


def _split(head: nn.Linear, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, feature in features.items():
        _check_like(head.weight, name, feature)
    share = None if head.bias is None else head.bias / len(features)
    slices = head.weight.split([f.shape[1] for f in features.values()], dim=1)
    return {
        name: F.linear(feature, weight, share)
        for (name, feature), weight in zip(features.items(), slices, strict=True)
    }


def _check_like(weight: Tensor, name: str, feature: Tensor) -> None:
    """Raises an error where the head's product with a feature would be one of PyTorch's."""
    if feature.device != weight.device:
        raise ValueError(f"features[{name!r}] is on {feature.device}, the head on {weight.device}")
    if feature.dtype is weight.dtype:
        return
    # Autocast leaves float64 as it is, and does not know the meta device.
    casts = torch.float64 not in (feature.dtype, weight.dtype) and not weight.is_meta
    if not (casts and torch.is_autocast_enabled(weight.device.type)):
        raise TypeError(
            f"features[{name!r}] has dtype {feature.dtype}, the head {weight.dtype}: call this "
            "within the torch.autocast that made the feature, or cast it"
        )


def _called_affine(head: nn.Linear, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Calls the head once: every modality alone, and a row of nothing."""
    count, rows = len(features), next(iter(features.values())).shape[0]
    alone = [_alone(features, name) for name in features]
    stacked = torch.cat([*alone, torch.zeros_like(alone[0][:1])])
    z = _pass(head, stacked)
    nothing = z[count * rows :][:1] * ((count - 1) / count)
    parts = [z[m * rows : (m + 1) * rows] - nothing for m in range(count)]
    return dict(zip(features, parts, strict=True))


def _called(head: Head, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _pass(head, _alone(features, name)) for name in features}


def _alone(features: Mapping[str, Tensor], name: str) -> Tensor:
    """[B, ΣD] the concatenation with zeros for all but one."""
    parts = [f if other == name else torch.zeros_like(f) for other, f in features.items()]
    return torch.cat(parts, dim=1)


def _pass(head: Head, x: Tensor) -> Tensor:
    with (training if torch.is_grad_enabled() else scoring)(head, x.device):
        return head(x)


def _check_sum(logits: Mapping[str, Tensor], output: Tensor) -> None:
    if not isinstance(output, Tensor) or output.is_meta:
        raise TypeError(f"output must be a tensor with values, got {type(output).__name__}")
    wide = WIDE[output.device.type]
    total: Tensor = sum(z.detach().to(wide) for z in logits.values())  # type: ignore[assignment]
    if total.shape != output.shape:
        raise ValueError(
            f"output must have shape {list(total.shape)}, as the logits, got {list(output.shape)}"
        )
    of = output.detach()
    allowed = _DIFFERENCE.get(of.dtype, 1e-4)
    wrong = (total - of).abs() > allowed * (1 + of.to(wide).abs())
    if wrong.any():
        largest = float((total - of).abs().max())
        raise ValueError(
            f"the logits of {list(logits)} add up to something else than output, by up to "
            f"{largest:.3g}: are the features in the order in which the head gets them?"
        )
