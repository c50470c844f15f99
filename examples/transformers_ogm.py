"""OGM-GE in the Trainer of Hugging Face Transformers, on two views of the UCI handwritten digits.

::

    pip install ".[transformers]"      # in the checkout
    python examples/transformers_ogm.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from demonstrations.arguments import count
from demonstrations.data import DataError, Part
from demonstrations.handwritten_data import CITATION, CLASSES, load, split
from demonstrations.networks import Model, vector_encoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments, set_seed
from transformers.utils import ModelOutput

import mmfuse
from mmfuse.adapters.transformers import BalancedTrainer

VIEWS = ("pix", "fou")


class Digits(Model):
    """Returns the loss, and the logits of each view alone, which the method looks at."""

    def forward(self, pix: Tensor, fou: Tensor, labels: Tensor) -> ModelOutput:
        """Loss, [B, 10] logits, and view → [B, 10] logits."""
        features = self.features({"pix": pix, "fou": fou})
        logits = self.fuse(features)
        return ModelOutput(
            loss=F.cross_entropy(logits, labels),
            logits=logits,
            modality_logits=mmfuse.unimodal_logits(self.head, features),
        )


def balance(model: nn.Module) -> mmfuse.OGM:
    """OGM-GE of the encoders."""
    return mmfuse.OGM(mmfuse.match_parameters(model, {view: f"encoders.{view}" for view in VIEWS}))


def accuracies(prediction: Any) -> dict[str, float]:
    """The accuracies of the joint logits, and of each view's."""
    joint, alone = prediction.predictions
    found = {"joint": joint, **alone}
    return {n: float(np.mean(z.argmax(1) == prediction.label_ids)) for n, z in found.items()}


def rows(part: Part) -> list[dict[str, Tensor]]:
    """A data set as the Trainer takes it."""
    return [
        {**{view: part.views[view][i] for view in VIEWS}, "labels": part.labels[i]}
        for i in range(len(part.labels))
    ]


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

    set_seed(args.seed)
    encoders = {view: vector_encoder(x.shape[1]) for view, x in data.train.views.items()}
    model = Digits(encoders, len(CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        trainer = BalancedTrainer(
            model,
            TrainingArguments(
                folder,
                seed=args.seed,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=2,
                max_grad_norm=5.0,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
                save_strategy="no",
                logging_steps=100,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=rows(data.train),
            eval_dataset=rows(data.test),
            compute_metrics=accuracies,
            optimizers=(optimizer, None),
            balance=None if args.plain else balance,
        )
        trainer.train()
        found = trainer.evaluate()
    print(
        "test accuracy: "
        + ", ".join(f"{name} {found[f'eval_{name}']:.3f}" for name in ("joint", *VIEWS))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
