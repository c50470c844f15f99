"""`released/opm.py`, alone and with OGM-GE, and the authors' own numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from trajectory import AsReleased, Golden, Replay, adamw, difference, free_and_forced, numbers

from released import opm

FILES = pytest.mark.parametrize("name", ["opm_official", "opm_official_ogmge"])


def replay(name: str, forced: bool, theta_gradient: bool = True) -> Replay:
    golden = Golden(name)
    model = AsReleased(golden)
    assert golden.hp("first_epoch") == opm.STARTS
    assert [golden.hp(k) for k in ("q_base", "lam", "p_exe")] == [
        opm.Q_BASE,
        opm.LAMBDA,
        opm.P_EXECUTE,
    ]
    more, drawn = {}, iter(())
    if name.endswith("_ogmge"):
        noise = golden.starting_with("noise.").values()
        drawn = iter([z for parts in zip(*noise, strict=True) for z in parts])
        more = {
            "alpha": golden.hp("alpha"),
            "noise": lambda grad, std: std * next(drawn),
            "ogm_ends": int(golden.hp("ogm_last_epoch")),
        }
    run = Replay(golden, model, adamw(golden, model), forced)
    for t in run.steps():
        inputs, labels = run.batch()
        rows = iter(golden["u.keep"][t])

        def draw(keep: Tensor, rows=rows) -> Tensor:
            return (next(rows).unsqueeze(1) > 1 - keep).to(keep)

        seen = opm.step(
            model,
            run,
            **inputs,
            labels=labels,
            epoch=int(golden["epoch"][t]),
            execute=opm.executes(float(golden["u.execute"][t])),
            draw=draw,
            theta_gradient=theta_gradient,
            **more,
        )
        dropped = seen.dropped
        left = slice(None) if dropped is None else dropped.left.squeeze(1)
        logits = (seen.out, *(z[left] for z in seen.logits))
        if more:
            run.record(coefficient=numbers(seen.coefficients))
        run.record(
            loss=torch.stack([F.cross_entropy(z, labels[left]) for z in logits]),
            score=numbers(seen.scores),
            q=seen.q,
            dropped=dropped is not None,
            theta=0.0 if dropped is None else dropped.theta,
            mask=torch.ones(2, len(labels)) if dropped is None else dropped.mask.squeeze(2),
        )
    assert next(drawn, None) is None, "not all of the noise was asked for"
    return run


@free_and_forced
@FILES
def test_the_sequence_is_the_authors(name: str, forced: bool) -> None:
    replay(name, forced).check()


@FILES
def test_without_thetas_gradient_all_else_is_the_authors(name: str) -> None:
    """The sequence that is measured: the encoders' gradients miss it in steps that drop."""
    run = replay(name, forced=True, theta_gradient=False)
    of_encoders = {k for k in run.golden.arrays if k.startswith(("grad.audio.", "grad.visual."))}
    run.check(only=run.golden.results - of_encoders)
    drops = run["dropped"] != 0
    wrong = [k for k in of_encoders if difference(run[k][drops], run.golden[k][drops]) is not None]
    assert wrong
    for key in of_encoders:
        assert difference(run[key][~drops], run.golden[key][~drops]) is None, key


def test_samples_that_have_lost_everything_are_removed() -> None:
    """The files do not show it: it takes both probabilities above 0."""
    features = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    q = torch.tensor([0.5, 0.3], dtype=torch.float64)
    mask = torch.ones(2, 6, 1, dtype=torch.float64)
    mask[0, 1:3], mask[1, 2:4] = 0, 0
    rows = iter(mask)
    out = opm.drop(features, q, lambda keep: next(rows))
    assert out.left.squeeze(1).tolist() == [True, True, False, True, True, True]
    assert out.theta == 0.4
    for got, feature, keep in zip(out.features, features, mask, strict=True):
        kept = keep[[0, 1, 3, 4, 5]] / 0.6
        torch.testing.assert_close(got, kept * feature[[0, 1, 3, 4, 5]])
        (grad,) = torch.autograd.grad(got.sum(), feature, retain_graph=True)
        torch.testing.assert_close(grad, (keep / 0.6).expand(6, 4))
