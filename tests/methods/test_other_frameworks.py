"""The claims of docs/other_tasks.md about BalanceMM's three modalities, against its formulas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfuse

NAMES = ("audio", "visual", "text")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "other_tasks.md"
ROWS = 16


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    """The functions of the documentation."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    (block,) = [b for b in blocks if "def balancemm_ogm" in b]
    namespace: dict[str, Any] = {"torch": torch, "mmfuse": mmfuse}
    exec(compile(block, str(DOCUMENT), "exec"), namespace)
    return namespace


def logits(lead: float) -> tuple[dict[str, Tensor], Tensor]:
    """The first is ahead, and all are right sometimes."""
    torch.manual_seed(1)
    labels = torch.randint(0, 4, (ROWS,))
    z = {n: torch.randn(ROWS, 4, dtype=torch.float64) for n in NAMES}
    z["audio"][torch.arange(ROWS), labels] += lead
    return z, labels


@pytest.mark.parametrize("alpha", [0.01, 0.4])
def test_ogm(documented: dict[str, Any], alpha: float) -> None:
    z, labels = logits(2.0)
    nets = {n: nn.Linear(3, 5, dtype=torch.float64) for n in NAMES}
    before = {}
    for name, net in nets.items():
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        before[name] = [p.grad.clone() for p in net.parameters()]
    ogm = mmfuse.OGM(nets, select="matrix", noise=False)
    documented["balancemm_ogm"](ogm, z, labels, alpha)
    scores = {}
    for name, x in z.items():
        p = torch.cos(x).softmax(1)
        scores[name] = sum(
            float(p[i, labels[i]]) for i in range(ROWS) if x[i].argmax() == labels[i]
        )
    least = min(scores.values())
    assert least > 0 and len({round(s, 6) for s in scores.values()}) == 3
    for name, net in nets.items():
        ratio = torch.tensor(scores[name] / (least + 1e-5), dtype=torch.float64)
        k = max(1 - float(torch.tanh(alpha * ratio)), 0) if ratio > 1 else 1.0
        weight, bias = before[name]
        torch.testing.assert_close(net.weight.grad, k * weight, rtol=1e-12, atol=0)
        assert torch.equal(net.bias.grad, bias), "vectors are left alone"


@pytest.mark.parametrize("q_base", [0.4, 0.6])
def test_opm(documented: dict[str, Any], q_base: float) -> None:
    """The values, the samples that are left, and the gradients, through theta as well."""
    widths, alpha = {"audio": 3, "visual": 4, "text": 5}, 0.5
    torch.manual_seed(2)
    features = {n: torch.randn(ROWS, w, dtype=torch.float64) for n, w in widths.items()}
    z, labels = logits(9.0)
    both = [
        {
            k: {n: x.clone().requires_grad_() for n, x in v.items()}
            for k, v in {"features": features, "logits": z}.items()
        }
        for _ in range(2)
    ]
    opm = mmfuse.OPM.official(num_modalities=3, p_exe=1.0, starts=0).double()
    out, left = documented["balancemm_opm"](
        opm, both[0]["features"], both[0]["logits"], labels, q_base, alpha
    )
    sum(f.square().sum() for f in out.values()).backward()

    s = {
        n: sum(x[i].softmax(0)[labels[i]] for i in range(ROWS))
        for n, x in both[1]["logits"].items()
    }
    q = {}
    for name in NAMES:
        ratio = s[name] / (sum(s[o] for o in NAMES if o != name) + 1e-5)
        t = torch.tanh(torch.relu(ratio - 1))
        q[name] = q_base * (1 + alpha * t) if t > 0 else torch.zeros(()).double()
        q[name] = q[name].clamp(0, 1)
    assert q["audio"] > 0 and q["text"] == 0
    theta = sum(widths[n] * q[n] for n in NAMES) / sum(widths.values())
    keep = out["audio"].abs().sum(1) > 0
    assert 0 < int(keep.sum()) < ROWS
    assert torch.equal(left, labels), "the others keep every sample"
    expected = {
        n: f * (keep if n == "audio" else torch.ones_like(keep)).unsqueeze(1) / (1 - theta + 1e-5)
        for n, f in both[1]["features"].items()
    }
    sum(f.square().sum() for f in expected.values()).backward()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=0)
    for key in ("features", "logits"):
        for name in NAMES:
            found, want = (given[key][name].grad for given in both)
            if key == "logits" and want is not None:
                assert bool(want.abs().max() > 0)
            torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-10)
