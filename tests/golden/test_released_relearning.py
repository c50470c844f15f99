"""`released/relearning.py` and the authors' own numbers."""

from __future__ import annotations

import numpy as np
import torch
from trajectory import Golden, Network, difference

from released import relearning

NAMES = ("audio", "visual")


def test_weights_and_resets_are_the_authors() -> None:
    golden = Golden("relearning")
    start = golden.starting_with("init.")
    names = [name for name in start if not name.startswith("head")]
    weights, purities = [], []
    after = {name: [] for name in names}
    for r in range(2):
        keys = [f"{split}_{name}" for name in NAMES for split in ("train", "val")]
        stored = iter(
            golden[f"clusters.{key.split('_')[0]}"][r][NAMES.index(key.split("_")[1])].numpy()
            for key in keys
        )
        seen = relearning.weights(
            [golden[f"features.{key}"][r] for key in keys],
            golden["y"][:4].flatten(),
            golden["val_y"].flatten(),
            lambda x, stored=stored: next(stored),
            golden.hp("move_lambda"),
        )
        for key, x in zip(keys, seen.scaled, strict=True):
            wanted = golden[f"scaled_features.{key}"][r]
            assert difference(torch.from_numpy(x)[None], wanted[None]) is None
        weights.append(torch.stack(seen.weights))
        purities.append(torch.tensor(seen.purities, dtype=torch.float64).view(2, 2).T)
        model = Network(golden)
        for name, p in model.named_parameters():
            if name in names:
                p.data = golden[f"before_reset.{name}"][r].clone()
        head = model.head.weight.detach().clone()
        relearning.reset(model, start, *weights[-1])
        for name, p in model.named_parameters():
            if name in names:
                after[name].append(p.detach())
        assert torch.equal(model.head.weight, head)
    assert difference(torch.stack(weights), golden["weight"]) is None
    assert difference(torch.stack(purities), golden["purity"]) is None
    for name in names:
        got, want = torch.stack(after[name]), golden[f"after_reset.{name}"]
        assert difference(got, want) is None, name


def test_when() -> None:
    done, found = 0, []
    for epoch in range(100):
        if relearning.resets(epoch, done):
            done += 1
            found.append(epoch)
    assert found == [20, 40, 60]


def test_purity_of_labels_with_a_gap() -> None:
    """The labels are renumbered; a cluster votes for its commonest class."""
    found = relearning.purity(np.array([0, 0, 5, 5, 5, 2]), np.array([0, 0, 0, 1, 1, 1]))
    assert found == 4 / 6
