"""The example with a known mutual information: its critic is the best one, it draws its plot."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import gaussian_information as example

# Without the compiled library the example runs on the reference, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:mmfuse uses its:RuntimeWarning")


@pytest.mark.parametrize("rho", [0.3, -0.9])
def test_the_critic_is_the_log_density_ratio(rho: float) -> None:
    x, y = torch.randn(2, 7, 3, dtype=torch.float64)
    a, b = example.critic_features(x, y, rho)
    covariance = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)
    joint = MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)
    alone = Normal(torch.zeros((), dtype=torch.float64), 1)
    pairs = torch.stack(torch.broadcast_tensors(x[:, None], y[None]), dim=-1)
    ratio = joint.log_prob(pairs) - alone.log_prob(pairs).sum(-1)
    # The normalisation of the joint density is the same for all pairs, and no part of the critic.
    expected = ratio.sum(-1) + 3 * 0.5 * math.log(1 - rho**2)
    torch.testing.assert_close(a @ b.T, expected, rtol=1e-9, atol=1e-9)


def test_correlation_and_information_are_inverse() -> None:
    for nats in (0.0, 0.1, 2.0):
        assert example.information(example.correlation(nats)) == pytest.approx(nats, abs=1e-12)


def test_draws_a_plot(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(example, "SAMPLES", 2_000)
    monkeypatch.setattr(example, "BATCHES", (64,))
    png = tmp_path / "made" / "plot.png"
    assert example.main(["--output", str(png)]) == 0
    assert str(png) in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
