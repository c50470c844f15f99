"""How well clusters of features agree with classes. `mmfuse.methods.relearning` has the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..loop._together import other_order
from ..loop.given import check_present
from ..loop.modalities import check_names
from ..loop.ranks import Group, several

#: [N, D] features in (−1, 1) to [N] integers, which cluster each sample is in.
Cluster = Callable[[Tensor], Tensor]
Features = Mapping[str, Tensor]
#: Features [n, D] and labels [n] of each modality's samples.
Split = list[tuple[Tensor, Tensor]]


def k_means(clusters: int) -> Cluster:
    """Scikit-learn's k-means with its seed at 0, as released; no more clusters than samples.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(
            "ReLearning clusters features with scikit-learn, which is not installed: "
            "pip install scikit-learn, or give cluster="
        ) from error

    def cluster(features: Tensor) -> Tensor:
        count = min(clusters, len(features))  # of a modality that few samples have
        found = KMeans(n_clusters=count, random_state=0).fit_predict(features.cpu().numpy())
        return torch.as_tensor(found, dtype=torch.int64)

    return cluster


def scaled(features: Tensor) -> Tensor:
    """Each column from its least value to its largest, to (−1, 1); one of equal values to −1.

    Args:
        features: [N, D].
    """
    least, most = features.aminmax(dim=0)
    factor = 2 / torch.where(most > least, most - least, 1.0)
    return features * factor + (-1 - least * factor)


def purity(labels: Tensor, clusters: Tensor) -> float:
    """Share of samples that are of their cluster's commonest class.

    Args:
        labels: [N] integers from 0 on.
        clusters: [N] integers from 0 on.
    """
    table = torch.zeros(int(clusters.max()) + 1, int(labels.max()) + 1, dtype=torch.int64)
    table.index_put_((clusters, labels), torch.ones_like(labels), accumulate=True)
    return float(table.amax(1).sum()) / len(labels)


def checked(
    split: str,
    names: Sequence[str],
    features: Features,
    labels: Tensor,
    present: Mapping[str, Tensor] | None = None,
) -> Split:
    """Features [n, D] and labels [n] of each modality's samples, on the CPU.

    Raises:
        TypeError: they are no tensors, or of a wrong dtype.
        ValueError: names or shapes do not fit, there is no sample, or a value is not finite.
    """
    what = f"{split}_features"
    check_names(what, features, names, "encoders")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{split}_labels must be an integer tensor, got {kind}")
    if labels.dim() != 1 or not len(labels):
        raise ValueError(f"{split}_labels must be [N] of N > 0, got {list(labels.shape)}")
    if int(labels.min()) < 0:
        raise ValueError(f"{split}_labels must be at least 0, got {int(labels.min())}")
    masks = torch.ones(len(names), len(labels), dtype=torch.bool)
    if present is not None:
        masks = check_present(names, present, len(labels), labels.device, f"{split}_present").cpu()
    found, classes = [], labels.cpu().long()
    for name, mask in zip(names, masks, strict=True):
        x = features[name]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{what}[{name!r}] must be a floating tensor, got {kind}")
        if x.dim() < 2 or len(x) != len(labels):
            raise ValueError(
                f"{what}[{name!r}] must be [{len(labels)}, …], as {split}_labels, got "
                f"{list(x.shape)}"
            )
        x = x.detach().cpu().flatten(1)[mask]
        x = x if x.dtype == torch.float64 else x.float()
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"{what}[{name!r}] holds a NaN or an Inf; {split}_present says which samples lack "
                "a modality"
            )
        found.append((x, classes[mask]))
    return found


def purities(
    take: Callable[[], tuple[Split, Split]],
    cluster: Cluster | None,
    classes: int | None,
    process_group: Group,
    names: Sequence[str],
) -> list[list[float]]:
    """[train, val][M], over the samples of all ranks, which the first rank clusters.

    NaN for a modality that has no sample there.

    Args:
        take: Checks and gives this rank's samples.
        cluster: None for k-means.
        classes: C; None for as many as the labels need.
        process_group: The ranks.
        names: The modalities, in this rank's order.

    Raises:
        Exception: what `take` or the clustering raises, here, and as a RuntimeError on the others.
    """
    group = several(process_group)
    if group is None:
        return _purities(take(), cluster, classes)
    own: Exception | None = None
    parts: Any = None
    try:
        parts = take()
    except Exception as error:
        own = error
    told = _shared(group, (tuple(names), parts), own)
    if any(others != tuple(names) for others, _ in told):
        raise ValueError(other_order(names, group))
    parts = [part for _, part in told]
    found: Any = None
    if group.rank() == 0:
        splits = [_joined([part[s] for part in parts]) for s in (0, 1)]
        try:
            found = _purities((splits[0], splits[1]), cluster, classes)
        except Exception as error:
            own = error
    result: list[list[float]] = _shared(group, found, own)[0]
    return result


def _purities(
    splits: tuple[Split, Split], cluster: Cluster | None, classes: int | None
) -> list[list[float]]:
    if classes is None:
        every = [labels for split in splits for _, labels in split if len(labels)]
        classes = max((int(labels.max()) for labels in every), default=0) + 1
    cluster = k_means(classes) if cluster is None else cluster
    if not callable(cluster):
        raise TypeError(f"cluster must be callable on features, got {type(cluster).__name__}")
    return [[_purity_of(cluster, *each) for each in split] for split in splits]


def _purity_of(cluster: Cluster, features: Tensor, labels: Tensor) -> float:
    if not len(labels):
        return math.nan
    clusters = torch.as_tensor(cluster(scaled(features))).cpu()
    if clusters.shape != labels.shape or clusters.is_floating_point():
        raise ValueError(
            f"cluster must give {len(labels)} integers, got {clusters.dtype} {list(clusters.shape)}"
        )
    return purity(labels, clusters.long())


def _joined(parts: Sequence[Split]) -> Split:
    """Every modality's samples of all ranks."""
    each = zip(*parts, strict=True)
    return [(torch.cat([x for x, _ in of_m]), torch.cat([y for _, y in of_m])) for of_m in each]


def _shared(group: dist.ProcessGroup, value: object, error: Exception | None) -> list[Any]:
    """Every rank's value, on every rank; if one has an error, all raise."""
    text = None if error is None else f"{type(error).__name__}: {error}"
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, (value, text), group=group)
    if error is not None:
        raise error
    for rank, (_, other) in enumerate(found):
        if other is not None:
            raise RuntimeError(f"rank {rank} cannot take part, so that no rank does: {other}")
    return [value for value, _ in found]
