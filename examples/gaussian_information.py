"""Three estimates of a mutual information that is known: that of correlated Gaussians.

For D pairs of standard normal variables with correlation rho, I = -D/2 log(1 - rho^2) nats. The
plot shows what the histogram, its differentiable "soft" form and InfoNCE with the best possible
critic estimate, each with the bias that its docstring describes::

    pip install matplotlib
    python examples/gaussian_information.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import mmfuse

matplotlib.use("Agg")  # draws to a file; needs no display
from matplotlib import pyplot as plt

BINS = 30
SAMPLES = 100_000
BATCHES = (128, 1024, 8192)
DIMENSIONS = 10


def correlated(rho: float, *shape: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two tensors of standard normal variables with correlation rho between their elements."""
    x, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def information(rho: float) -> float:
    """The mutual information of one pair, in nats."""
    return -0.5 * math.log(1 - rho**2)


def correlation(nats: float) -> float:
    """The correlation of a pair that shares so much."""
    return math.sqrt(1 - math.exp(-2 * nats))


def critic_features(x: Tensor, y: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Features whose inner products are log p(x, y) / (p(x) p(y)), the best critic of InfoNCE.

    log ratio = (rho x y - rho^2 (x^2 + y^2) / 2) / (1 - rho^2), summed over the dimensions.
    """
    slope, curve = rho / (1 - rho**2), rho**2 / (2 * (1 - rho**2))
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    a = torch.cat([slope * x, -curve * x.square().sum(1, keepdim=True), ones], dim=1)
    b = torch.cat([y, ones, -curve * y.square().sum(1, keepdim=True)], dim=1)
    return a, b


def histogram_curves(truth: Sequence[float], generator: torch.Generator) -> dict[str, list[float]]:
    """Both plug-in estimates for each true value."""
    curves: dict[str, list[float]] = {"histogram": [], "soft": []}
    for nats in truth:
        x, y = correlated(correlation(nats), SAMPLES, generator=generator)
        curves["histogram"].append(mmfuse.ops.mutual_information(x, y, BINS).mi.item())
        curves["soft"].append(mmfuse.ops.mutual_information(x, y, BINS, "soft").mi.item())
    return curves


def info_nce_curve(truth: Sequence[float], batch: int, generator: torch.Generator) -> list[float]:
    """InfoNCE with the best critic for each true value of all dimensions together."""
    curve = []
    for nats in truth:
        rho = correlation(nats / DIMENSIONS)
        x, y = correlated(rho, batch, DIMENSIONS, generator=generator)
        a, b = critic_features(x, y, rho)
        curve.append(mmfuse.ops.info_nce(a.float(), b.float(), 1.0).item())
    return curve


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the plot; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Path(__file__).resolve().parents[1] / "docs" / "images" / "gaussian_information.png"
    parser.add_argument("--output", type=Path, default=default, help="file for the plot")
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    truth = torch.linspace(0, 2, 21).tolist()
    left.plot(truth, truth, color="0.6", label="truth")
    for name, curve in histogram_curves(truth, generator).items():
        left.plot(truth, curve, ".-", label=name)
    left.set(
        title=f"one pair, {SAMPLES:,} samples, {BINS} bins",
        xlabel="true mutual information (nats)",
        ylabel="estimate (nats)",
    )
    truth = torch.linspace(0, 12, 25).tolist()
    right.plot(truth, truth, color="0.6", label="truth")
    for k, batch in enumerate(BATCHES):
        curve = info_nce_curve(truth, batch, generator)
        right.plot(truth, curve, ".-", color=f"C{k + 2}", label=f"B = {batch}")
        right.axhline(math.log(batch), color=f"C{k + 2}", linestyle=":", linewidth=1)
    right.set(
        title=f"InfoNCE, {DIMENSIONS} pairs (dotted: log B)",
        xlabel="true mutual information (nats)",
    )
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=120)
    plt.close(figure)
    print(f"plot: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
