"""OPM against its formulas and against a transcription of the released code."""

from __future__ import annotations

import copy

import pytest
import torch
from cells import Cell
from no_sync import no_host_sync
from torch import Tensor
from torch.nn import functional as F

import mmfuse
from mmfuse import OPM, NoiseStream, drop_probabilities
from mmfuse.methods._opm_rule import Given
from released import ogm as released_ogm
from released import opm as released_opm

NAMES = ["audio", "visual", "text"]
Batch = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]


def batch(cell: Cell, count: int = 2, rows: int = 64, dtype: torch.dtype = torch.float32) -> Batch:
    """Features, logits and labels; the first modality is the surest, the last the least."""
    labels = torch.randint(0, 5, (rows,), device=cell.device)
    features = {n: torch.randn(rows, 6, device=cell.device, dtype=dtype) for n in NAMES[:count]}
    logits = {
        n: torch.randn(rows, 5, device=cell.device) + (2.0 - m) * F.one_hot(labels, 5)
        for m, n in enumerate(NAMES[:count])
    }
    return features, logits, labels


def expected_q(logits: dict[str, Tensor], labels: Tensor, q_base: float, lam: float) -> Tensor:
    """The docstring's formulas, one number at a time, in float64."""
    p = [z.double().softmax(1)[range(len(labels)), labels].mean().item() for z in logits.values()]
    out = []
    for m, score in enumerate(p):
        ratios = [score / other for j, other in enumerate(p) if j != m]
        ratio = torch.tensor(sum(ratios) / len(ratios), dtype=torch.float64)
        out.append(min(1.0, q_base * (1 + lam * torch.tanh(ratio - 1).item())) if ratio > 1 else 0)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("count", [2, 3])
def test_drops_with_the_probability_of_the_step_before(cell: Cell, count: int) -> None:
    opm = OPM(0.6, 0.7, num_modalities=count, stream=NoiseStream(5), backend=cell.backend)
    opm.to(cell.device)
    q = torch.zeros(count, dtype=torch.float64)
    for step in range(3):
        features, logits, labels = batch(cell, count)
        out = opm(features, logits, labels)
        torch.testing.assert_close(out.drop_probability.cpu().double(), q, rtol=1e-5, atol=0)
        stream = NoiseStream(5)
        stream.advance(step)
        u = torch.stack([stream.uniform(64, m) for m in range(count)])
        keep = u > out.drop_probability.cpu()[:, None]
        assert torch.equal(out.keep.cpu(), keep)
        for m, name in enumerate(features):
            kept = torch.where(keep[m, :, None], features[name].cpu(), 0)
            assert torch.equal(out.features[name].cpu(), kept)
        q = expected_q(logits, labels, 0.6, 0.7)
    assert q[0] > 0.6 and q[-1] == 0  # or the test would not have dropped anything


def test_probabilities_of_ones_own_are_of_this_very_step(cell: Cell) -> None:
    """They were those of the step after."""
    opm = OPM(stream=NoiseStream(5), backend=cell.backend).to(cell.device)
    features, _, _ = batch(cell)
    names = list(features)
    for q in ([0.5, 0.0], [0.0, 1.0], [0.0, torch.nan]):
        out = opm(features, coefficients=dict(zip(names, q, strict=True)))
        assert out.drop_probability.tolist() == [q[0], 0.0 if q[1] != q[1] else q[1]]
        kept = [bool(out.keep[0].all()), bool(out.keep[1].any())]
        assert kept == [q[0] == 0.0, q[1] != 1.0]


def test_no_sample_loses_all_its_modalities(cell: Cell) -> None:
    opm = OPM(1.0, num_modalities=3, backend=cell.backend).to(cell.device)
    for _ in range(3):
        out = opm(*batch(cell, 3))
        assert out.keep.any(dim=0).all()
    assert not out.keep[0].any()  # q = 1 for the surest


def test_gradient_goes_where_the_feature_went(cell: Cell) -> None:
    opm = OPM(backend=cell.backend).to(cell.device)
    opm(*batch(cell))
    features, logits, labels = batch(cell)
    for feature in features.values():
        feature.requires_grad_()
    out = opm(features, logits, labels)
    sum(f.sum() for f in out.features.values()).backward()
    for m, feature in enumerate(features.values()):
        assert torch.equal(feature.grad, out.keep[m, :, None].expand(-1, 6).to(feature.dtype))
    assert 0 < out.keep[0].sum() < 64


def test_passes_features_unchanged_in_eval(cell: Cell) -> None:
    opm = OPM(backend=cell.backend).to(cell.device)
    opm(*batch(cell))
    state = copy.deepcopy(opm.state_dict())
    features, _, _ = batch(cell)
    out = opm.eval()(features)
    assert all(out.features[name] is feature for name, feature in features.items())
    assert out.keep.all() and out.keep.shape == (2, 64)
    for name, value in opm.state_dict().items():
        assert torch.equal(value, state[name])


def test_starts_and_ends(cell: Cell) -> None:
    opm = OPM(starts=1, ends=1, backend=cell.backend).to(cell.device)
    with pytest.warns(RuntimeWarning, match="starts=1, ends=1, but set_epoch was never called"):
        opm(*batch(cell))
    kept = []
    for epoch in range(3):
        opm.set_epoch(epoch)
        kept.append(bool(opm(*batch(cell)).keep.all()))
    assert kept == [True, False, True]


def test_resumes_bit_for_bit(cell: Cell) -> None:
    first = OPM(stream=NoiseStream(3), backend=cell.backend).to(cell.device)
    batches = [batch(cell) for _ in range(4)]
    first.set_epoch(2)
    for b in batches[:2]:
        first(*b)
    second = OPM(stream=NoiseStream(99), backend=cell.backend).to(cell.device)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.epoch == 2
    for b in batches[2:]:
        one, two = first(*b), second(*b)
        assert torch.equal(one.keep, two.keep)
        assert torch.equal(one.features["audio"], two.features["audio"])


def test_does_not_wait_for_the_device(cell: Cell) -> None:
    opm = OPM(backend=cell.backend).to(cell.device)
    b = batch(cell)
    opm(*b)
    with no_host_sync(cell.device):
        opm(*b)


def test_compiles_without_a_graph_break(cell: Cell) -> None:
    opm = OPM(stream=NoiseStream(7), backend=cell.backend).to(cell.device)
    eager = OPM(stream=NoiseStream(7), backend=cell.backend).to(cell.device)
    compiled = torch.compile(opm, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        b = batch(cell)
        out, expected = compiled(*b), eager(*b)
        assert torch.equal(out.keep, expected.keep)
        assert torch.equal(out.features["visual"], expected.features["visual"])


def test_together_with_ogm_both_see_the_undropped_ratios(cell: Cell) -> None:
    torch.manual_seed(0)
    nets = {n: torch.nn.Linear(6, 6, device=cell.device) for n in NAMES[:2]}
    head = torch.nn.Linear(12, 5, device=cell.device)
    opm = OPM(1.0, backend=cell.backend).to(cell.device)
    inputs, _, labels = batch(cell)
    for _ in range(2):
        for net in nets.values():
            net.zero_grad()
        features = {n: net(inputs[n]) for n, net in nets.items()}
        logits = mmfuse.unimodal_logits(head, features)
        out = opm(features, logits, labels)
        loss = F.cross_entropy(head(torch.cat(list(out.features.values()), 1)), labels)
        ogm = mmfuse.ogm_backward(loss, nets, logits, labels, noise=False, backend=cell.backend)
        assert torch.equal(ogm.ratios, out.ratios)
    dominant = int(out.ratios.argmax())
    assert not out.keep[dominant].any()
    # A modality that was dropped as a whole has no gradient left, whatever OGM would scale.
    assert not nets[NAMES[dominant]].weight.grad.any()
    assert nets[NAMES[1 - dominant]].weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_official_is_the_released_code(cell: Cell, dtype: torch.dtype) -> None:
    cell.skip_slow(dtype == torch.float64)
    opm = OPM.official(starts=0, stream=NoiseStream(11), backend=cell.backend).to(cell.device)
    executed = set()
    for step in range(12):
        features, logits, labels = batch(cell, rows=32, dtype=dtype)
        mine = {n: f.clone().requires_grad_() for n, f in features.items()}
        out = opm(mine, logits, labels)
        theirs = [f.detach().cpu().clone().requires_grad_() for f in features.values()]
        stream = NoiseStream(11)
        stream.advance(step)
        own = [z.detach().cpu() for z in logits.values()]
        q = released_opm.drop_rates(*released_ogm.batch_scores(own, labels.cpu()))
        execute = released_opm.executes(float(stream.uniform(1, 2)[0]))
        executed.add(execute)
        u = iter([stream.uniform(32, m).unsqueeze(1) for m in range(2)])
        expected, left = theirs, torch.ones(32, 1)
        if execute:
            # A sample is kept where its number is above q.
            expected, left, *_ = released_opm.drop(
                theirs, q, lambda keep, u=u: (next(u) > 1 - keep).to(keep)
            )
        assert torch.equal(out.rows.cpu(), left.squeeze(1).nonzero().squeeze(1))
        # q is formed from scores of 32 rows in float32; one step of 1 - theta from it.
        for got, want in zip(out.features.values(), expected, strict=True):
            torch.testing.assert_close(got.detach().cpu(), want.detach(), rtol=1e-5, atol=0)
        sum((f**2).sum() for f in out.features.values()).backward()
        sum((f**2).sum() for f in expected).backward()
        for got, want in zip(mine.values(), theirs, strict=True):
            torch.testing.assert_close(got.grad.cpu(), want.grad, rtol=2e-5, atol=0)
    assert executed == {True, False}


def test_official_gives_the_features_thetas_gradient(cell: Cell) -> None:
    """It is that of the loss plus θ²/2; scores see a detached head; three unequal widths."""
    widths = {"audio": 6, "visual": 3, "text": 5}
    head = torch.nn.Linear(14, 5, device=cell.device).double()
    labels = torch.randint(0, 5, (16,), device=cell.device)
    inputs = {
        n: torch.randn(16, w, device=cell.device, dtype=torch.float64) for n, w in widths.items()
    }
    inputs["audio"] += 3 * head.weight[labels, :6].detach()

    def train(theta_gradient: bool, detached: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        opm = OPM.official(
            p_exe=1.0,
            theta_gradient=theta_gradient,
            num_modalities=3,
            starts=0,
            stream=NoiseStream(2),
            backend=cell.backend,
        )
        opm.to(cell.device).double()
        head.zero_grad()
        features = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        logits = mmfuse.unimodal_logits(head, features)
        if detached:
            logits = {n: z.detach() for n, z in logits.items()}
        out = opm(features, logits, labels)
        F.cross_entropy(
            head(torch.cat(list(out.features.values()), 1)), labels[out.rows]
        ).backward()
        return {n: f.grad for n, f in features.items()}, head.weight.grad.clone()

    without, of_head = train(False)
    features = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    logits = mmfuse.unimodal_logits(head, features)
    s = torch.stack([z.softmax(1)[range(16), labels].mean() for z in logits.values()])
    ratios = torch.stack([(s[m] / s).sum() - 1 for m in range(3)]) / 2
    q = drop_probabilities(ratios)
    theta = sum(w * r for w, r in zip(widths.values(), q, strict=True)) / 14
    extra = torch.autograd.grad(theta.square() / 2, list(features.values()))
    assert theta > 0 and all(e.abs().max() > 1e-4 for e in extra)

    for detached in (False, True):
        got, got_of_head = train(True, detached)
        for (name, grad), more in zip(got.items(), extra, strict=True):
            want = without[name] if detached else without[name] + more
            torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-14)
        assert torch.equal(got_of_head, of_head)


def test_official_removes_samples_that_have_lost_everything(cell: Cell) -> None:
    """It takes both probabilities above 0, which only scores that are not a ratio's could give."""
    opm = OPM.official(p_exe=1.0, theta_gradient=False, backend=cell.backend, starts=0)
    features, logits, labels = batch(cell)
    given = Given(NAMES[:2], list(features.values()), list(logits.values()), labels, opm.q)
    out = opm.to(cell.device).rule.drop(opm, given, torch.full((2,), 0.5, device=cell.device))
    left = out.keep.any(dim=0)
    assert 0 < left.sum() < 64
    assert torch.equal(out.rows, left.nonzero().squeeze(1))
    want = 2 * torch.where(out.keep[0, :, None], features["audio"], 0)[left]
    torch.testing.assert_close(out.features["audio"], want)


def test_drop_probabilities() -> None:
    ratios = torch.tensor([0.5, 1.0, 1.5, 50.0, torch.nan], dtype=torch.float64)
    excess = torch.tanh(torch.tensor(0.5, dtype=torch.float64))
    want = torch.tensor([0, 0, 0.5 * (1 + 0.5 * excess), 0.75, 0], dtype=torch.float64)
    torch.testing.assert_close(drop_probabilities(ratios), want, rtol=1e-15, atol=0)
    assert drop_probabilities(ratios, 0.9, 4.0)[3] == 1  # cut off


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_base": 1.1}, r"q_base must be a probability in \[0, 1\], got 1.1"),
        ({"q_base": float("nan")}, "q_base"),
        ({"lam": -0.1}, "lam must be a finite number of at least 0"),
        ({"num_modalities": 1}, "num_modalities must be at least 2, got 1"),
        ({"starts": 3, "ends": 2}, "ends=2 is before starts=3"),
    ],
)
def test_refuses_hyper_parameters(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPM(**arguments)


def test_refuses_a_share_of_steps_that_is_none() -> None:
    with pytest.raises(ValueError, match="p_exe must be a probability"):
        OPM.official(p_exe=1.5)


def wrong_inputs(cell: Cell) -> dict[str, tuple[tuple, type[Exception], str]]:
    features, logits, labels = batch(cell)
    other = dict(zip(["audio", "sound"], logits.values(), strict=True))
    short = {**features, "visual": features["visual"][:60]}
    high = labels.clone()
    high[3] = 7
    wrong = {
        "no mapping": ((list(features.values()), logits, labels), TypeError, "features must map"),
        "one only": (({"audio": features["audio"]}, logits, labels), ValueError, "num_modalities"),
        "names": ((features, other, labels), ValueError, r"missing \['visual'\]; unknown \['so"),
        "no labels": ((features, logits), TypeError, "needs logits and labels in training"),
        "batches": ((short, logits, labels), ValueError, r"features\['visual'\] 60"),
        "rows": ((features, logits, labels[:60]), ValueError, "labels has 60 rows"),
        "integers": (
            ({**features, "audio": labels[:, None]}, logits, labels),
            TypeError,
            r"features\['audio'\] has dtype torch.int64",
        ),
    }
    if cell.device == "cpu":
        wrong["label"] = ((features, logits, high), ValueError, r"labels\[3\] = 7 is out of range")
    return wrong


def test_refuses_inputs_before_anything_has_changed(cell: Cell) -> None:
    opm = OPM(backend=cell.backend).to(cell.device)
    opm(*batch(cell))
    before = copy.deepcopy(opm.state_dict())
    for arguments, error, message in wrong_inputs(cell).values():
        with pytest.raises(error, match=message):
            opm(*arguments)
    after = opm.state_dict()
    assert torch.equal(after["q"], before["q"])
    assert torch.equal(after["noise_state"], before["noise_state"])


def test_an_empty_batch_changes_no_probability(cell: Cell) -> None:
    opm = OPM(backend=cell.backend).to(cell.device)
    out = opm(*batch(cell, rows=0))
    assert out.features["audio"].shape == (0, 6)
    assert torch.equal(opm.q, torch.zeros_like(opm.q))
