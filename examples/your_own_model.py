"""Tutorial: from a data set and a model of your own to a balanced training, step by step.

The data are made here, so that the answer is known: both modalities tell the class, the text even
better than the sensor, but it is slower to learn. Replace `MyData` and `MyModel` by yours::

    python examples/your_own_model.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from demonstrations.arguments import count
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import mmfuse

CLASSES, WORDS = 4, 200


# --8<-- [start:data]
class MyData(Dataset[dict[str, Tensor]]):
    """Samples as a dictionary: a sensor's 16 numbers, 12 words, and a label."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, CLASSES, (size,), generator=generator)
        centres = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(7))
        noise = torch.randn(size, 16, generator=generator)
        self.sensor = centres[self.labels] + 1.5 * noise
        # Half of the words are from the class's own 50.
        words = torch.randint(0, WORDS, (size, 12), generator=generator)
        own = 50 * self.labels[:, None] + words % 50
        chosen = torch.rand(size, 12, generator=generator) < 0.5
        self.text = torch.where(chosen, own, words)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"sensor": self.sensor[i], "text": self.text[i], "label": self.labels[i]}


# --8<-- [end:data]


# --8<-- [start:model]
class TextNet(nn.Module):
    """The mean embedding of the words, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.EmbeddingBag(WORDS, 32, mode="mean"), nn.Linear(32, 32)

    def forward(self, words: Tensor) -> Tensor:
        """[B, 12] words → [B, 32]."""
        return torch.relu(self.layer(self.words(words)))


class MyModel(nn.Module):
    """Any model with a part for each modality; here the head is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.sensor_net = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        self.text_net = TextNet()
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, sensor: Tensor, text: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Features by modality, and the joint logits."""
        features = {"sensor": self.sensor_net(sensor), "text": self.text_net(text)}
        return features, self.head(torch.cat(list(features.values()), dim=1))


# --8<-- [end:model]


# --8<-- [start:alone]
@torch.no_grad()
def accuracies(model: MyModel, loader: DataLoader[dict[str, Tensor]]) -> dict[str, float]:
    """Accuracy of the model, and with each modality alone."""
    model.eval()
    right: dict[str, int] = {}
    for batch in loader:
        features, joint = model(batch["sensor"], batch["text"])
        alone = mmfuse.unimodal_logits(model.head, features)
        for name, logits in {"joint": joint, **alone}.items():
            hits = int((logits.argmax(dim=1) == batch["label"]).sum())
            right[name] = right.get(name, 0) + hits
    model.train()
    return {name: hits / len(loader.dataset) for name, hits in right.items()}  # type: ignore[arg-type]


# --8<-- [end:alone]


# --8<-- [start:trained_alone]
def trained_alone(name: str, train: MyData, test: MyData, epochs: int) -> float:
    """Test accuracy of one modality's encoder, trained without the other."""
    encoder = MyModel().get_submodule(f"{name}_net")
    model = nn.Sequential(encoder, nn.Linear(32, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for batch in DataLoader(train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[name]), batch["label"]).backward()
            optimizer.step()
    with torch.no_grad():
        right = model(getattr(test, name)).argmax(dim=1) == test.labels
    return right.double().mean().item()


# --8<-- [end:trained_alone]


# --8<-- [start:train]
def train(model: MyModel, loader: DataLoader[dict[str, Tensor]], epochs: int) -> None:
    """The usual loop, and four lines of mmfuse."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    encoders = mmfuse.match_parameters(model, {"sensor": "sensor_net", "text": "text_net"})
    balance = mmfuse.OGM(encoders, alpha=0.8, noise=False)
    shown: dict[str, float] = {}
    with (
        mmfuse.ScalarLog(lambda scalars, step: shown.update(scalars), every=20) as log,
        tqdm(total=epochs * len(loader), unit="step", disable=None) as bar,
    ):
        for epoch in range(epochs):
            balance.set_epoch(epoch)
            for batch in loader:
                optimizer.zero_grad()
                features, joint = model(batch["sensor"], batch["text"])
                loss = F.cross_entropy(joint, batch["label"])
                alone = mmfuse.unimodal_logits(model.head, features)
                out = balance.backward(loss, alone, batch["label"])
                optimizer.step()
                log.add(bar.n, out.as_dict())  # read from the device in every 20th step only
                bar.update()
    print({name: round(value, 3) for name, value in sorted(shown.items())})


# --8<-- [end:train]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and prints accuracies before and after, and of each modality trained alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=count, default=20, help="passes over 2,000 samples")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = MyModel()
    data, tested = MyData(2000, seed=1), MyData(1000, seed=2)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    test = DataLoader(tested, batch_size=250)
    print("before:", accuracies(model, test))
    train(model, loader, args.epochs)
    print("after:", accuracies(model, test))
    alone = {name: trained_alone(name, data, tested, args.epochs) for name in ("sensor", "text")}
    print("trained alone:", alone)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small are not worth sharing out among threads
    sys.exit(main())
