"""Arguments of a step beside logits and labels: masks, and numbers of the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor, nn

from .._devices import WIDE
from .._numbers import real
from ..ops import ModalityScores, SampleScores
from ..ops._criterion import PLAIN, Criterion
from ..ops._tensors import check_dense
from ..ops.modality_accuracies import named_accuracies
from ..ops.modality_scores import named_scores
from ..ops.sample_scores import named_sample_scores
from .ranks import Observed

Numbers = Mapping[str, Tensor | float]
#: The loss that the targets are for; None for `nn.CrossEntropyLoss()`.
Loss = nn.CrossEntropyLoss | nn.BCEWithLogitsLoss | None
#: The numbers that a step starts from: of a batch, or of the user.
Kind = Literal["scores", "ratios", "coefficients"]
#: In the place of numbers that there are none of; made once, since a step has little time.
_NOTHING = torch.empty(0)


class More(TypedDict, total=False):
    """Further arguments of `observe`, `step` and `backward`; `GradientMethod` describes them."""

    present: Mapping[str, Tensor] | None
    scores: Numbers | None
    ratios: Numbers | None
    coefficients: Numbers | None
    count: Tensor | float | None


def makes_tables(more: More) -> bool:
    """True if the scores come as tables, those of `mmfuse.loop.pairs`."""
    return more.get("present") is not None or more.get("scores") is not None


class Looked(NamedTuple):
    """A batch, or the user's numbers in place of it.

    Attributes:
        scores: Of the modalities, or tables of them, flat (see `mmfuse.loop.pairs`); None if the
            numbers are ratios or coefficients.
        known: [M, N] bool, which modalities each sample has; None if all have all.
        kind: Of the numbers.
        numbers: [M], the user's; empty if there are none.
        weight: 0-d, their count; [M] for ratios and coefficients, 0 for those that are NaN.
    """

    scores: ModalityScores | None
    known: Tensor | None = None
    kind: Kind = "scores"
    numbers: Tensor = _NOTHING
    weight: Tensor = torch.empty(())


def look(
    names: Sequence[str],
    called: Sequence[str],
    logits: Mapping[str, Tensor] | None,
    labels: Tensor | None,
    more: More,
    criterion: Loss,
    device: torch.device,
    backend: str | None,
    accuracy: bool = False,
) -> Looked:
    """Scores where there is more than logits and labels, or the user's numbers.

    Args:
        names: The modalities.
        called: The name of their logits in errors.
        logits: Name → logits.
        labels: Their targets.
        more: Further information.
        criterion: The loss that they are for.
        device: The device that the user's numbers go to.
        backend: Name of a backend; None for the best one.
        accuracy: True if the scores are accuracies in the place of probabilities, without their
            logarithms.

    Raises:
        TypeError: something is missing, or two arguments exclude each other.
        ValueError: names or shapes do not fit.
    """
    kind, numbers, count = own_numbers(names, device, more, logits)
    if kind is not None:
        known = ~numbers.isnan().unsqueeze(1)
        if kind == "scores":
            return Looked(own_pair_scores(numbers, count), known, kind, numbers, count)
        # A modality that one micro-batch or rank is without has a mean over the others.
        return Looked(None, known, kind, numbers, torch.where(numbers.isnan(), 0.0, count))
    if logits is None or labels is None:
        raise TypeError("logits and labels go together: give both or neither")
    if not isinstance(logits, Mapping) or logits.keys() != set(names):
        _refuse_names("logits", logits, names)
    each, how = [logits[name] for name in names], criterion_of(criterion)
    present = more.get("present")
    if present is None and not accuracy:
        return Looked(named_scores(called, each, labels, backend, how))
    if present is None and isinstance(labels, Tensor) and not labels.is_floating_point():
        right = named_accuracies(called, each, labels, backend, how)
        return Looked(ModalityScores(right.accuracy, _NOTHING, right.count))
    if accuracy:
        samples = accuracies(called, each, labels, backend, how)
    else:
        samples = named_sample_scores(called, each, labels, backend, how)
    if present is None:
        return Looked(mean_scores(samples))
    mask = check_present(names, present, len(labels), labels.device)
    return Looked(pair_scores(samples, mask), mask)


def accuracies(
    called: Sequence[str],
    logits: Sequence[Tensor],
    labels: Tensor,
    backend: str | None,
    criterion: Criterion,
) -> SampleScores:
    """`sample_scores` with 1 in the place of `prob` where a modality is right, else 0.

    Of several labels it is the share that is right. A sample with a NaN among its logits is wrong.
    Of equal logits the first one counts, and of equal probabilities in the labels.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if not labels.is_floating_point():
        samples = named_sample_scores(called, logits, labels, backend, criterion, statistics=True)
        right = samples.correct
    else:
        samples = named_sample_scores(called, logits, labels, backend, criterion)
        if criterion.multilabel:
            right = torch.stack([(z > 0) == (labels > 0.5) for z in logits])
        else:
            classes = labels.argmax(1)
            right = named_sample_scores(called, logits, classes, backend, statistics=True).correct
    assert right is not None
    share = right.to(WIDE[labels.device.type])
    if criterion.multilabel and labels.dim() > 1:
        share = share.mean(2)
    return samples._replace(prob=share)


def mean_scores(samples: SampleScores) -> ModalityScores:
    """Scores over all samples that count, of `prob` alone, all finite; NaN if no sample counts."""
    weight = samples.weight.to(WIDE[samples.weight.device.type])
    count = weight.sum()
    prob = (samples.prob.to(weight).flatten(1) @ weight.flatten()) / count
    return ModalityScores(prob, _NOTHING, count)


def check_criterion(criterion: Loss) -> Loss:
    """Returns it.

    Raises:
        TypeError: it is no loss that scores are known for.
    """
    if criterion is not None and not isinstance(
        criterion, (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)
    ):
        raise TypeError(
            "criterion must be nn.CrossEntropyLoss, nn.BCEWithLogitsLoss or None, got "
            f"{type(criterion).__name__}; for other tasks give scores= to the step"
        )
    return criterion


def criterion_of(loss: Loss) -> Criterion:
    """The arguments of `mmfuse.ops.modality_scores` that go with a loss."""
    if loss is None:
        return PLAIN
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return Criterion(weight=loss.weight, multilabel=True, pos_weight=loss.pos_weight)
    return Criterion(weight=loss.weight, ignore_index=loss.ignore_index)


def own_numbers(
    names: Sequence[str], device: torch.device, more: More, logits: object
) -> tuple[Kind | None, Tensor, Tensor]:
    """The user's numbers: their kind, [M] of them, and the 0-d count; no kind if there are none.

    Raises:
        TypeError: they are no numbers, or there are logits, or numbers of two kinds.
        ValueError: the names differ, or a number is out of range.
    """
    unknown = more.keys() - More.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected arguments: {sorted(unknown)}")
    given: list[Kind] = [kind for kind in get_args(Kind) if more.get(kind) is not None]
    weight = more.get("count")
    if not given:
        if weight is not None:
            raise TypeError("count goes with scores, ratios or coefficients")
        return None, _NOTHING, _NOTHING
    if len(given) > 1 or logits is not None:
        both = " and ".join([*given, *["logits"] * (logits is not None)])
        raise TypeError(f"got {both}; give one of them")
    kind = given[0]
    if more.get("present") is not None:
        raise TypeError(f"present goes with logits; give NaN in {kind} for a missing modality")
    values: Any = more[kind]
    if not isinstance(values, Mapping) or list(values) != list(names):
        _refuse_names(kind, values, names)
    found = [_number(f"{kind}[{name!r}]", values[name], device, kind) for name in names]
    count = _number("count", 1.0 if weight is None else weight, device, "count")
    return kind, torch.stack(found), count


def scaler_numbers(
    grad_scale: Tensor | float | None, found_inf: Tensor | float | None
) -> tuple[Tensor | None, Tensor | None]:
    """The arguments of these names of a step, as tensors.

    Raises:
        TypeError: one of them is no number; it is named.
    """
    return _single("grad_scale", grad_scale), _single("found_inf", found_inf)


def _single(name: str, value: Tensor | float | None) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):  # as `GradScaler.get_scale` returns it
        return torch.tensor(real(name, value), dtype=torch.float32)
    dense = value.layout is torch.strided and not value.is_complex()
    if value.numel() != 1 or not dense:
        kind = f"{value.dtype} {list(value.shape)}, {value.layout}"
        raise TypeError(f"{name} must be a number or a dense tensor of one, got {kind}")
    return value


def _refuse_names(what: str, values: object, names: Sequence[str]) -> None:
    from .modalities import check_names

    check_names(what, values, names, "encoders")  # type: ignore[arg-type]


def _number(what: str, value: object, device: torch.device, kind: str) -> Tensor:
    """0-d; numbers that are on the host are looked at."""
    if isinstance(value, Tensor):
        usual = value.layout is torch.strided and value.is_meta == (device.type == "meta")
        if value.numel() != 1 or value.is_complex() or value.dtype is torch.bool or not usual:
            got = f"{value.dtype} {list(value.shape)}, {value.layout}, on {value.device}"
            raise TypeError(f"{what} must be one number, got {got}")
        number = value.detach().reshape(()).to(device, WIDE[device.type])
        shown = float(value) if value.device.type == "cpu" and not _compiling() else None
    elif isinstance(value, Real) and not isinstance(value, bool):  # NumPy's scalars are Real, too
        shown = float(value)
        number = torch.full((), shown, dtype=WIDE[device.type], device=device)
    else:
        raise TypeError(f"{what} must be a number or a tensor of one, got {type(value).__name__}")
    if shown is None:
        return number
    missing = math.isnan(shown) and kind != "count"
    if kind in ("scores", "ratios") and not (missing or 0 < shown < math.inf):
        raise ValueError(
            f"{what} must be positive and finite (NaN for a modality that is missing), got {shown}"
        )
    if kind == "coefficients" and math.isinf(shown):
        raise ValueError(f"{what} must be finite (NaN for a modality that is missing)")
    if kind == "count" and not 0 <= shown < math.inf:
        raise ValueError(f"{what} must be at least 0 and finite, got {shown}")
    return number


def _compiling() -> bool:
    return torch.compiler.is_dynamo_compiling()


def check_present(
    names: Sequence[str],
    present: Mapping[str, Tensor],
    rows: int,
    device: torch.device,
    called: str = "present",
) -> Tensor:
    """[M, N] bool, which modalities each sample has; errors call the argument `called`.

    Raises:
        TypeError: a mask is no bool tensor.
        ValueError: names, lengths or devices do not fit.
    """
    if not isinstance(present, Mapping) or list(present) != list(names):
        _refuse_names(called, present, names)
    masks = [present[name] for name in names]
    for name, mask in zip(names, masks, strict=True):
        check_mask(f"{called}[{name!r}]", mask, rows, device)
    return torch.stack(masks)


def check_mask(called: str, mask: Tensor, rows: int, device: torch.device) -> None:
    """Checks that a mask, which errors call so, says of each of the rows if it is there.

    Raises:
        TypeError: it is no bool tensor.
        ValueError: its length or device does not fit.
    """
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{called} must be a bool tensor [B], got {kind}")
    check_dense(called, mask)
    if mask.shape != (rows,):
        raise ValueError(f"{called} must have shape [{rows}], got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{called} is on {mask.device}, not on {device}")


def anywhere(mask: Tensor) -> Observed:
    """[M] 1 for a modality that some sample has, else 0: over ranks, above 0 where any has it."""
    one = torch.ones((), device=mask.device)
    return Observed(mask.any(1).to(one), one)


def pair_scores(samples: SampleScores, mask: Tensor) -> ModalityScores:
    """Scores over the samples that two modalities share, so that missing ones decide nothing.

    Args:
        samples: Scores of single samples, [M, N, …].
        mask: [M, N] bool, which modalities each sample has.

    Returns:
        `ModalityScores` of M·M numbers each: entry m·M + j is of modality m, over the samples that
        have m and j; NaN where no sample has both. The counts are those samples' weights.
    """
    (prob, log_prob), count = pair_means([samples.prob, samples.log_prob], samples.weight, mask)
    return ModalityScores(prob, log_prob, count)


def pair_means(
    values: Sequence[Tensor], weight: Tensor, mask: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The same of any numbers of single samples: tables, flat, and their counts.

    Args:
        values: [M, N, …] each.
        weight: [N, …], how much each row counts.
        mask: [M, N] bool, which modalities each sample has.
    """
    positions = (1,) * (values[0].dim() - 2)
    wide = WIDE[mask.device.type]
    weight = weight.to(wide).flatten()
    here = mask.view(*mask.shape, *positions).expand_as(values[0]).flatten(1) & (weight > 0)
    # Selected, not multiplied with 0: a log-probability may be −inf, and what is missing NaN.
    count = _over_shared(weight.expand(here.shape), here)
    found = [_over_shared(x.flatten(1).to(wide) * weight, here) / count for x in values]
    return [table.flatten() for table in found], count.flatten()


def complete_scores(samples: SampleScores, rows: Tensor) -> ModalityScores:
    """Scores over the same samples for all modalities.

    Args:
        samples: Scores of single samples, [M, N, …].
        rows: [N] bool, which count.
    """
    every = len(samples.prob)
    prob, log_prob, count = pair_scores(samples, rows.expand(every, -1))
    prob, log_prob = (table.view(every, every).diagonal() for table in (prob, log_prob))
    return ModalityScores(prob, log_prob, count[0])


def _over_shared(values: Tensor, here: Tensor) -> Tensor:
    """[M, M] sums of [M, R] values of m over the columns that are here for m and j."""
    return torch.stack([torch.where(here & other, values, 0.0).sum(1) for other in here], dim=1)


def own_pair_scores(scores: Tensor, count: Tensor) -> ModalityScores:
    """The user's [M] scores in the form of `pair_scores`; NaN for a missing one."""
    known = ~scores.isnan()
    shared = known.unsqueeze(1) & known.unsqueeze(0)
    prob = torch.where(shared, scores.unsqueeze(1), torch.nan).flatten()
    return ModalityScores(prob, prob.log(), (shared * count).flatten())
