"""Workloads of several cases: shapes of parameters, heads, features; random data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

Shape = tuple[int, ...]

# A rehearsal leaves this of a dimension, of an image's side and of paired values: enough for the
# gate's statistics, and for the strides of an encoder.
_LEAST, _LEAST_SIDE, _LEAST_VALUES = 8, 33, 1000


@dataclass(frozen=True)
class Workload:
    """Sizes only; a case makes the tensors.

    Attributes:
        name: Its name in `--workloads`.
        title: Its name in the report.
        kind: Which cases run on it: here "gradients", "logits", "features" or "training"; what only
            one case runs on stands in its file.
        encoders: One tuple of parameter shapes per modality.
        classes: Number of classes of the head.
        batch: Rows of the logits and features, and samples of a training step.
        width: Width of a feature.
        modalities: How many logits or scores there are.
        shape: Of an input or a representation; of a training step's images, height and width; of
            paired values, problems and values of each.
        audio_shape: Of a training step's spectrograms, where they differ from the images.
        frames: How many images a sample of a training step has.
        bins: Of a histogram, for each variable.
        gpu: True if it asks too much of a CPU to be measured there unasked.
        channels_last: True if the four-dimensional parameters lie in memory in that format.
        named_only: True if it is measured only where a plan or `--workloads` names it.
    """

    name: str
    title: str
    kind: str = "gradients"
    encoders: tuple[tuple[Shape, ...], ...] = ()
    classes: int = 6
    batch: int = 64
    width: int = 512
    modalities: int = 2
    shape: Shape = ()
    audio_shape: Shape = ()
    frames: int = 1
    bins: int = 30
    gpu: bool = False
    channels_last: bool = False
    named_only: bool = False

    @property
    def tensors(self) -> int:
        """T, over all encoders."""
        return sum(len(shapes) for shapes in self.encoders)

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shapes in self.encoders for shape in shapes)

    @property
    def pixels(self) -> int:
        """The pixels of a training step's batch, over all spectrograms and images; else none."""
        if self.kind != "training":
            return 0
        images = self.frames * math.prod(self.shape)
        return self.batch * (math.prod(self.audio_shape or self.shape) + images)


def _resnet18(channels: int) -> Iterator[Shape]:
    """Convolutions and batch norms of ResNet-18, without the classifier."""
    yield from ((64, channels, 7, 7), (64,), (64,))
    width = 64
    for out in (64, 128, 256, 512):
        for before in (width, out):
            yield from ((out, before, 3, 3), (out,), (out,))
            yield from ((out, out, 3, 3), (out,), (out,))
            if before != out:
                yield from ((out, before, 1, 1), (out,), (out,))
        width = out


def _vit_b16() -> Iterator[Shape]:
    """ViT-B/16 for 224×224 images, without the classifier."""
    dim, mlp, patches = 768, 3072, (224 // 16) ** 2
    norm = ((dim,), (dim,))
    yield from ((1, 1, dim), (1, patches + 1, dim), (dim, 3, 16, 16), (dim,))
    for _ in range(12):
        yield from norm
        yield from ((3 * dim, dim), (3 * dim,), (dim, dim), (dim,))
        yield from norm
        yield from ((mlp, dim), (mlp,), (dim, mlp), (dim,))
    yield from norm


_ALL = (
    Workload(
        "resnet18",
        "two ResNet-18 (22.3 M parameters, 120 tensors)",
        encoders=(tuple(_resnet18(1)), tuple(_resnet18(3))),
        classes=6,
    ),
    Workload(
        "resnet18_channels_last",
        "two ResNet-18 in channels_last (22.3 M parameters, 120 tensors)",
        encoders=(tuple(_resnet18(1)), tuple(_resnet18(3))),
        classes=6,
        channels_last=True,
        named_only=True,
    ),
    Workload(
        "resnet18_one",
        "one ResNet-18 (11.2 M parameters, 60 tensors)",
        encoders=(tuple(_resnet18(3)),),
    ),
    Workload(
        "vit_b16",
        "two ViT-B/16 (172 M parameters, 300 tensors)",
        encoders=(tuple(_vit_b16()), tuple(_vit_b16())),
        classes=309,
    ),
    Workload("single_256m", "one tensor of 256 M elements", encoders=(((2**28,),),)),
    Workload(
        "thousand",
        "1,000 tensors of 1,000 elements",
        encoders=(((1000,),) * 500, ((1000,),) * 500),
    ),
    Workload("classes_6", "batch 64, 6 classes (CREMA-D)", "logits", classes=6),
    Workload("classes_31", "batch 64, 31 classes (Kinetics-Sounds)", "logits", classes=31),
    Workload("classes_309", "batch 64, 309 classes (VGGSound)", "logits", classes=309),
    Workload("feature", "features 64×512", "features"),
    Workload("feature_4096", "features 4096×512", "features", batch=4096),
    Workload(
        "training",
        "two ResNet-18, 16 samples of 64×64",
        "training",
        encoders=(tuple(_resnet18(1)), tuple(_resnet18(3))),
        batch=16,
        shape=(64, 64),
    ),
    Workload(
        "crema_d",
        "two ResNet-18, CREMA-D: 64 spectrograms 257×188, 3 frames 224×224 each",
        "training",
        encoders=(tuple(_resnet18(1)), tuple(_resnet18(3))),
        shape=(224, 224),
        audio_shape=(257, 188),
        frames=3,
        gpu=True,
    ),
)

#: The workloads by name; a case adds those that only it runs on.
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _ALL}


def shrunk(workload: Workload, by: int) -> Workload:
    """The same with sizes, and the numbers of tensors, divided by a number: for a rehearsal."""
    if by == 1:
        return workload
    shape, batch, width = workload.shape, workload.batch, workload.width
    audio_shape = workload.audio_shape
    if workload.kind == "ranks":  # of its encoders
        width = _less(width, by, 2 * _LEAST)
    if workload.kind == "training":
        shape, audio_shape = (
            tuple(_less(side, by, _LEAST_SIDE) for side in sides) for sides in (shape, audio_shape)
        )
    elif shape[:1] == (1,):
        shape = (1, _less(shape[1], by, _LEAST_VALUES))
    elif shape:
        shape = (_less(shape[0], by, _LEAST), *shape[1:])
    if workload.kind != "logits":
        batch = _less(batch, by, _LEAST)
    encoders = tuple(
        tuple(
            (_less(first, by, _LEAST), *rest)
            for first, *rest in shapes[: _less(len(shapes), by, _LEAST)]
        )
        for shapes in workload.encoders
    )
    # First of all, so that nobody takes it for the whole one.
    title = f"1/{by} of {workload.title}"
    return replace(
        workload,
        title=title,
        encoders=encoders,
        shape=shape,
        audio_shape=audio_shape,
        batch=batch,
        width=width,
    )


def tiny(workload: Workload) -> Workload:
    """The workload with a few elements in each tensor: a call then takes the host's time."""
    return replace(
        workload,
        encoders=tuple(
            tuple((2, *[1] * (len(shape) - 1)) for shape in shapes) for shapes in workload.encoders
        ),
        shape=tuple(1 if n == 0 else min(side, 16) for n, side in enumerate(workload.shape)),
        batch=2,
        width=16,
    )


def _less(size: int, by: int, least: int) -> int:
    return min(size, max(least, size // by))
