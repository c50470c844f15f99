"""OPM.official, alone and with OGM-GE, and the authors' code, three steps each of epochs 5 to 8."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cells import Cell
from torch import Tensor
from torch.nn import functional as F
from trajectory import (
    Golden,
    Network,
    Replay,
    adamw,
    difference,
    free_and_forced,
    on_every_backend,
)

import mmfuse
from mmfuse.reference.noise import philox4x32, uniform_from_bits


@cache
def steps_of_the_stream(name: str) -> list[int]:
    """One `NoiseStream(0)` for each step of the file, whose numbers drop what the file's did.

    The file's uniform numbers are PyTorch's, which no state of the stream gives; but all that
    they decide is whether the step drops, and which samples of the one modality with q > 0.
    """
    golden, found = Golden(name), []
    for t in range(golden.steps):
        execute, no_drop = golden["u.execute"][t], 1 - golden.hp("p_exe")
        fits = (uniforms(1, 2)[:, 0] >= no_drop) == (execute >= no_drop)
        keep, drawn = golden["mask"][t] != 0, golden["u.keep"][t]
        if execute < no_drop:
            assert keep.all() and (drawn == -1).all(), "-1: no draw"
        else:
            q = golden["q"][t]
            assert torch.equal(drawn > q.unsqueeze(1), keep)
            for m in q.nonzero().flatten().tolist():
                drops = uniforms(keep.shape[1], m) > q[m].float()
                fits = fits & (drops == keep[m]).all(1)
        found.append(int(fits.nonzero()[0]))
    return found


def uniforms(rows: int, stream_id: int, steps: int = 1 << 13) -> Tensor:
    """[steps, rows], what `NoiseStream(0).uniform(rows, stream_id)` gives in each step."""
    elements = torch.arange(-(-rows // 4))
    counter = torch.zeros(steps, len(elements), 4, dtype=torch.int64)
    counter[..., 0], counter[..., 2] = elements, stream_id
    counter[..., 3] = torch.arange(steps).unsqueeze(1)
    key = torch.zeros(2, dtype=torch.int64)
    return uniform_from_bits(philox4x32(counter, key)).flatten(1)[:, :rows]


def replay(name: str, *, forced: bool, **options: bool) -> Replay:
    golden = Golden(name)
    model = Network(golden)
    opm = mmfuse.OPM.official(
        golden.hp("q_base"),
        golden.hp("lam"),
        golden.hp("p_exe"),
        **options,
        starts=int(golden.hp("first_epoch")),
    )
    opm.double()
    ogm = None
    if name.endswith("_ogmge"):
        noise = iter(
            z for parts in zip(*golden.starting_with("noise.").values(), strict=True) for z in parts
        )
        ogm = mmfuse.OGM.official(
            model.encoders,
            alpha=golden.hp("alpha"),
            noise=lambda grad: next(noise),
            release="tpami",
            ends=int(golden.hp("ogm_last_epoch")),  # the script's own is after this short run
        )
        assert ogm.starts == opm.starts
    run = Replay(golden, model, adamw(golden, model), forced)
    for t in run.steps():
        epoch = int(golden["epoch"][t])
        opm.set_epoch(epoch)
        opm.noise_state.copy_(torch.tensor([0, steps_of_the_stream(name)[t]]))
        inputs, labels = run.batch()
        features = model.features(inputs)
        logits = mmfuse.unimodal_logits(model.head, features)
        result = opm(features, logits, labels)
        out = model.head(torch.cat(list(result.features.values()), 1))
        losses = [
            F.cross_entropy(z, labels[result.rows])
            for z in (out, *(z[result.rows] for z in logits.values()))
        ]
        if ogm is None:
            losses[0].backward()
        else:
            ogm.set_epoch(epoch)
            modulated = ogm.backward(losses[0], logits, labels)
            run.record(coefficient=coefficients(ogm, modulated))
        run.record(
            loss=torch.stack(losses),
            score=result.scores * len(labels),  # the release adds up
            q=opm.q if opm.modulating else torch.zeros_like(opm.q),
            dropped=result.drop_probability.any(),
            theta=1 - divisor(features, result),
            mask=result.keep,
        )
        run.step()
    if ogm is not None:
        assert next(noise, None) is None, "not all of the noise was asked for"
    return run


def divisor(features: dict[str, Tensor], result: mmfuse.OPMResult) -> Tensor:
    """The number that kept features are divided by, in which θ shows."""
    feature = features["audio"].detach()
    kept = result.keep[0].unsqueeze(1) & (feature != 0)
    return (feature[kept] / result.features["audio"].detach()[kept])[0]


def coefficients(ogm: mmfuse.OGM, result: mmfuse.OGMResult) -> Tensor:
    """The file's coefficients: it computes them from its first epoch on, also when unused."""
    if ogm.modulating:
        return result.coefficients
    assert result.coefficients.tolist() == [1, 1]
    if ogm.epoch < ogm.starts:
        return result.coefficients
    return mmfuse.ogm_coefficients(result.ratios, ogm.rule.alpha, "cvpr")


def of_encoders(golden: Golden) -> set[str]:
    """Names of the raw gradients that θ's gradient is part of."""
    return {
        f"grad.{m}.{k}" for m in ("audio", "visual") for k in golden.starting_with(f"grad.{m}.")
    }


@on_every_backend
@free_and_forced
@pytest.mark.parametrize(
    ("name", "acts"), [("opm_official", [4, 2]), ("opm_official_ogmge", [3, 3])]
)
def test_official_reproduces_the_released_code(
    cell: Cell, name: str, acts: list[int], forced: bool
) -> None:
    cell.skip_slow(name != "opm_official_ogmge" or not forced)
    mmfuse.use_backend(cell.backend)
    run = replay(name, forced=forced)
    run.check()
    assert (run["mask"] == 0).any(2).sum(0).tolist() == acts, "audio, visual"
    assert int(run["dropped"].sum()) == 6


@pytest.fixture(params=["opm_official", "opm_official_ogmge"])
def without_thetas_gradient(request: pytest.FixtureRequest) -> Replay:
    """The gradients for people who leave θ's gradient out."""
    return replay(request.param, theta_gradient=False, forced=True)


def test_all_but_thetas_gradient_is_the_released_code(without_thetas_gradient: Replay) -> None:
    run = without_thetas_gradient
    mine = of_encoders(run.golden)
    run.check(only=run.golden.results - mine)
    off = run["dropped"] == 0
    for key in mine:
        assert difference(run[key][off], run.golden[key][off]) is None, key


def test_thetas_gradient_shows_in_the_file(without_thetas_gradient: Replay) -> None:
    run = without_thetas_gradient
    with pytest.raises(AssertionError):
        run.check(only=of_encoders(run.golden))
