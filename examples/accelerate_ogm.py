"""OGM-GE with Hugging Face Accelerate, on two views of the UCI handwritten digits.

::

    pip install ".[accelerate]"        # in the checkout
    python examples/accelerate_ogm.py

It trains as any loop of Accelerate does, also under ``accelerate launch``: two lines differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from demonstrations.arguments import count
from demonstrations.data import DataError
from demonstrations.handwritten_data import CITATION, CLASSES, load, split
from demonstrations.networks import Model, vector_encoder
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import mmfuse
from mmfuse.adapters.accelerate import Balance

VIEWS = ("pix", "fou")


class Digits(Model):
    """Returns the joint logits, and those of each view alone."""

    def forward(self, pix: Tensor, fou: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, 10], and view → [B, 10]."""
        features = self.features({"pix": pix, "fou": fou})
        return self.fuse(features), mmfuse.unimodal_logits(self.head, features)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, tests, prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=CITATION)
    parser.add_argument("--epochs", type=count, default=20)
    parser.add_argument("--plain", action="store_true", help="joint training without OGM-GE")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        data = split(load(VIEWS), args.seed)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1

    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    set_seed(args.seed)
    encoders = {view: vector_encoder(x.shape[1]) for view, x in data.train.views.items()}
    model = Digits(encoders, len(CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    train = TensorDataset(*(data.train.views[view] for view in VIEWS), data.train.labels)
    loader = DataLoader(train, batch_size=16, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    encoders = mmfuse.match_parameters(model, {view: f"encoders.{view}" for view in VIEWS})
    ogm = mmfuse.OGM(encoders, alpha=0.0 if args.plain else 0.8, noise=not args.plain)
    balance = Balance(accelerator, ogm)
    for epoch in range(args.epochs):
        balance.set_epoch(epoch)
        for pix, fou, labels in loader:
            with accelerator.accumulate(model):
                joint, logits = model(pix, fou)
                balance.backward(F.cross_entropy(joint, labels), logits, labels)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()

    model.eval()
    with torch.no_grad():
        test = data.test.to(str(accelerator.device))
        joint, logits = model(*(test.views[view] for view in VIEWS))
        found = {"joint": joint, **logits}
        hits = {name: (z.argmax(1) == test.labels).float().mean() for name, z in found.items()}
    accelerator.print(
        "test accuracy: " + ", ".join(f"{name} {float(hit):.3f}" for name, hit in hits.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
