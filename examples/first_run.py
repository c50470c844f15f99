"""Tutorial: joint training and OPM on handwritten digits that are seen in two views.

The pixels of a digit ("pix") are easy, its Fourier coefficients ("fou") are hard. Joint training
learns mostly from the pixels; OPM drops their feature for some samples, so that the model has to
learn from the hard view as well::

    python examples/first_run.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from demonstrations.arguments import count
from demonstrations.data import DataError, Split
from demonstrations.handwritten_data import load, split
from demonstrations.measures import probe
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import mmfuse

VIEWS = ("pix", "fou")


# --8<-- [start:model]
class TwoViews(nn.Module):
    """An encoder for each view, and a linear head on both features."""

    def __init__(self, widths: dict[str, int], opm: mmfuse.OPM | None = None) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {view: nn.Sequential(nn.Linear(width, 64), nn.ReLU()) for view, width in widths.items()}
        )
        self.head = nn.Linear(64 * len(widths), 10)
        self.opm = opm  # part of the model, so that eval() switches it off

    def features(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """View → [B, 64]."""
        return {view: self.encoders[view](x) for view, x in views.items()}

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        """[B, 10] logits."""
        return self.head(torch.cat(list(features.values()), dim=1))


# --8<-- [end:model]


# --8<-- [start:train]
def train(model: TwoViews, data: Split, epochs: int) -> None:
    """Trains in place; a model with OPM differs from one without in three lines."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    for epoch in tqdm(range(epochs), unit="epoch", disable=None):
        if model.opm is not None:
            model.opm.set_epoch(epoch)
        for rows in torch.randperm(len(data.train.labels), generator=order).split(64):
            views, labels = (
                {v: x[rows] for v, x in data.train.views.items()},
                data.train.labels[rows],
            )
            optimizer.zero_grad()
            features = model.features(views)
            if model.opm is not None:
                logits = mmfuse.unimodal_logits(model.head, features)
                features = model.opm(features, logits, labels).features
            F.cross_entropy(model.fuse(features), labels).backward()
            optimizer.step()


# --8<-- [end:train]


# --8<-- [start:measure]
@torch.no_grad()
def measure(model: TwoViews, data: Split) -> dict[str, float]:
    """Test accuracy of the model, and of a linear classifier on each frozen encoder."""
    train, test = model.features(data.train.views), model.features(data.test.views)
    joint = (model.fuse(test).argmax(dim=1) == data.test.labels).double().mean().item()
    labels = (data.train.labels, data.test.labels, 10)
    return {"joint": joint} | {v: probe(train[v], test[v], *labels) for v in train}


# --8<-- [end:measure]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains both models and prints their accuracies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=count, default=40, help="passes over the training digits")
    args = parser.parse_args(argv)
    try:
        digits = load(VIEWS)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    # --8<-- [start:compare]
    data = split(digits, seed=0)
    for name in ("joint training", "OPM"):
        torch.manual_seed(0)  # the same initial weights
        opm = mmfuse.OPM() if name == "OPM" else None
        model = TwoViews({view: x.shape[1] for view, x in data.train.views.items()}, opm)
        train(model, data, args.epochs)
        found = ", ".join(f"{key} {value:.3f}" for key, value in measure(model, data).items())
        print(f"{name}: {found}")
    # --8<-- [end:compare]
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small are not worth sharing out among threads
    sys.exit(main())
