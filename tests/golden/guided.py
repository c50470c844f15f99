"""CGGM's network in the files: a fusion of two layers, and a classifier for each modality."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from trajectory import Golden, Network


def clipped(name: str) -> Golden:
    """A file, with the clipped gradients that it leaves out, since its numbers say what they are.

    `grad_modulated` is what an encoder's gradient is before; where it is missing it is `grad`.
    """
    golden = Golden(name)
    factor = (golden.hp("clip") / (golden["norm_before_clip"] + 1e-6)).clamp(max=1)
    for key, raw in golden.starting_with("grad.").items():
        if key.startswith("classifier_"):
            continue
        grad = golden.arrays.get(f"grad_modulated.{key}", raw)
        golden.arrays[f"grad_after.{key}"] = grad * factor.view(-1, *[1] * (raw.dim() - 1))
    return golden


def fused(model: Network, features: dict[str, Tensor]) -> Tensor:
    """The joint logits, or the joint prediction [B, 1]."""
    return model.out(F.relu(model.fuse(torch.cat(list(features.values()), 1))))


def classified(model: Network, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each classifier's logits, or its prediction [B, 1]; no encoder hears of them."""
    found = {}
    for name, feature in features.items():
        classifier = model.get_submodule(f"classifier_{name}")
        found[name] = classifier.out(F.relu(classifier.lin(feature.detach())))
    return found


class Both(torch.optim.SGD):
    """SGD for the network, and Adam for the classifiers.

    Args:
        golden: Has their learning rates.
        model: The network.
    """

    def __init__(self, golden: Golden, model: Network) -> None:
        named = list(model.named_parameters())
        self.main = [p for name, p in named if not name.startswith("classifier_")]
        own = [p for name, p in named if name.startswith("classifier_")]
        super().__init__(self.main, lr=golden.hp("learning_rate"), momentum=golden.hp("momentum"))
        self.own = torch.optim.Adam(own, lr=golden.hp("classifier_learning_rate"))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if hasattr(self, "own"):
            self.own.zero_grad(set_to_none)

    def step(self, closure: None = None) -> None:
        super().step()
        self.own.step()
