"""Measures of a trained model on test data: accuracy, noise, linear probes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Part
from .training import Run, accuracy

#: Standard deviations of the Gaussian noise, in those of the modality's training samples.
SEVERITIES = (0.5, 1.0, 2.0, 4.0)


def noisy(part: Part, view: str, severity: float, seed: int) -> Part:
    """The samples with Gaussian noise on one modality; the same noise for every method."""
    x = part.views[view]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return Part(part.views | {view: x + severity * noise}, part.labels)


@torch.no_grad()
def measure(run: Run, probes: bool = True) -> dict[str, float]:
    """Accuracy on the test samples, clean and with noise on each modality, and of linear probes.

    Returns:
        "accuracy", "noise <severity> <modality>" and "probe <modality>" → number.
    """
    run.model.eval()
    test, out = run.split.test, {}

    def right(part: Part) -> float:
        return accuracy(run.method.predict(run.model.features(part.views)), part.labels)

    out["accuracy"] = right(test)
    for view in test.views:
        for severity in SEVERITIES:
            out[f"noise {severity:g} {view}"] = right(noisy(test, view, severity, run.plan.seed))
    if probes:
        train = run.split.train
        features = (run.model.features(train.views), run.model.features(test.views))
        for view in test.views:
            of_view = (x[view] for x in features)
            out[f"probe {view}"] = probe(*of_view, train.labels, test.labels, run.model.classes)
    run.model.train()
    return out


def probe(
    train: Tensor, test: Tensor, train_labels: Tensor, test_labels: Tensor, classes: int
) -> float:
    """Test accuracy of a multinomial logistic regression on the features of a frozen encoder.

    From zero weights, the whole training set at once: nothing here is random. The small penalty
    gives separable classes a finite solution.
    """
    std, mean = torch.std_mean(train.double(), dim=0)
    std = torch.where(std > 0, std, 1.0)  # a unit that is never active stays at zero
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(train.shape[1], classes).to(train).requires_grad_()
    bias = torch.zeros(classes).to(train).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, train_labels)
        loss = loss + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return accuracy(test @ weight + bias, test_labels)
