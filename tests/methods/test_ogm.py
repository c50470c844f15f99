"""OGM and OGM-GE: golden values, the released code, many modalities, whole training runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from cells import Cell
from networks import AudioVisual, batch
from torch import Tensor, nn

import mmfuse
from mmfuse import OGM, NoiseStream, _native, ogm_backward, ogm_coefficients
from mmfuse.loop import stage
from released import networks as released_networks
from released import ogm as released_ogm

# k for rho = 0.5, 1, 1.25, 2, 10 and alpha = 0.8, worked out by hand from the papers' equations.
RHO = [0.5, 1.0, 1.25, 2.0, 10.0]
GOLDEN = {
    "tpami": [1.0, 1.0, 0.8040650701, 0.3907246755, 0.2000000244],
    "cvpr": [1.0, 1.0, 0.2384058440, 0.0783314456, 0.0000002251],
}


@pytest.mark.parametrize("formula", ["tpami", "cvpr"])
def test_golden_values(formula: str) -> None:
    k = ogm_coefficients(torch.tensor(RHO, dtype=torch.float64), 0.8, formula)
    torch.testing.assert_close(
        k, torch.tensor(GOLDEN[formula], dtype=torch.float64), rtol=0, atol=5e-10
    )


def test_tpami_is_clamped_at_zero_and_continuous_at_one() -> None:
    rho = torch.tensor([1.0 + 1e-6, 100.0, float("inf")], dtype=torch.float64)
    assert ogm_coefficients(rho, 2.0).tolist()[1:] == [0.0, 0.0]
    assert abs(ogm_coefficients(rho, 0.8)[0].item() - 1) < 1e-6
    assert abs(ogm_coefficients(rho, 0.8, "cvpr")[0].item() - (1 - math.tanh(0.8))) < 1e-6


def test_a_ratio_that_is_not_a_number_changes_nothing() -> None:
    for formula in ("tpami", "cvpr"):
        assert ogm_coefficients(torch.tensor([math.nan]), 0.8, formula).tolist() == [1.0]
        assert ogm_coefficients(torch.tensor([math.inf]), 0.0, formula).tolist() == [1.0]


def forward(model: AudioVisual, data: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    a, v, out = model(data[0], data[1])
    logits = mmfuse.unimodal_logits(model.fc, {"audio": a, "visual": v})
    return nn.functional.cross_entropy(out, data[2]), logits


def transcribed_step(
    model: AudioVisual,
    data: tuple[Tensor, ...],
    formula: str,
    select: str,
    draw: Callable[[str], released_ogm.Draw] | None,
) -> list[float]:
    """The released step up to the optimizer's, also for what TPAMI's paper does differently."""
    a, v, out = model(data[0], data[1])
    nn.functional.cross_entropy(out, data[2]).backward()
    with torch.no_grad():
        scores = released_ogm.batch_scores(released_networks.halves(model, a, v), data[2])
        ratios = released_ogm.two_ratios(*scores)
    coefficients = released_ogm.decide(*ratios, 0.8)
    if formula == "tpami":
        coefficients = [
            max(0.0, 1 - 0.8 * math.tanh(rho - 1)) if rho > 1 else 1.0 for rho in ratios
        ]
    for encoder, k in zip(model.encoders, coefficients, strict=True):
        for name, p in model.named_parameters():
            if name.startswith(encoder) and (select == "all" or p.dim() == 4):
                if draw is None:
                    released_ogm.scale([p], k)
                else:
                    released_ogm.scale_with_noise([p], k, draw(name))
    return [float(k) for k in coefficients]


def assert_same_gradients(model: AudioVisual, expected: AudioVisual) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        # float32 sums over one tensor differ between the two codes by some units in the last
        # place of its largest entries; 1e-5 of those is about 80 units.
        scale = float(q.grad.abs().max())
        torch.testing.assert_close(
            p.grad, q.grad, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("formula", ["tpami", "cvpr"])
@pytest.mark.parametrize("select", ["all", "conv"])
@pytest.mark.parametrize("noise", [False, True], ids=["ogm", "ogm-ge"])
def test_whole_step_is_the_plain_transcription(
    cell: Cell, formula: str, select: str, noise: bool
) -> None:
    model, data = AudioVisual(), batch()
    plain = copy.deepcopy(model)
    model.to(cell.device)
    on_device = tuple(t.to(cell.device) for t in data)
    stream = NoiseStream(21, cell.device)
    stream.advance(4)
    ids = {}
    for prefix, module in (("audio_net", model.audio_net), ("visual_net", model.visual_net)):
        for name, p in module.named_parameters():
            if select == "all" or p.dim() == 4:
                ids[f"{prefix}.{name}"] = len(ids)

    def same_noise(name: str) -> released_ogm.Draw:
        def draw(grad: Tensor, std: float) -> Tensor:
            return std * NoiseStream.normal(before, grad.numel(), ids[name]).view_as(grad)

        return draw

    before = NoiseStream(21)
    before.advance(4)
    k = transcribed_step(plain, data, formula, select, same_noise if noise else None)
    loss, logits = forward(model, on_device)
    out = ogm_backward(
        loss,
        model.encoders,
        logits,
        on_device[2],
        noise=noise,
        formula=formula,
        select=select,
        stream=stream,
        backend=cell.backend,
    )
    assert min(k) < 1.0  # the batch is lopsided: there is something to modulate
    torch.testing.assert_close(out.coefficients.cpu(), torch.tensor(k), rtol=1e-5, atol=1e-6)
    model.cpu()
    assert_same_gradients(model, plain)
    assert bool(out.finite)
    assert stream.state.tolist() == [21, 5 if noise else 4]


@pytest.mark.skipif(_native.read_gradients is None, reason="mmfuse._C was not built")
@pytest.mark.parametrize("noise", [False, True], ids=["ogm", "ogm-ge"])
def test_a_decision_that_reads_the_gradients_is_the_step_of_single_ops(
    cell: Cell, noise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, where an Inf keeps the noise's stream as well; `before_update` is the way in."""
    if cell.backend in ("reference", "triton"):
        pytest.skip("it takes lists")
    results = []
    for quickly in (True, False):
        if not quickly:
            monkeypatch.setattr(stage, "before_update", lambda *_: None)
        torch.manual_seed(3)
        model = AudioVisual().to(cell.device).to(memory_format=torch.channels_last)
        data = tuple(t.to(cell.device) for t in batch())
        stream = NoiseStream(21, cell.device)
        ogm = OGM(model.encoders, noise=noise, stream=stream, backend=cell.backend)
        found = []
        for broken in (False, True, False):
            model.zero_grad()
            loss, logits = forward(model, data)
            loss.backward()
            first = next(model.audio_net.parameters())
            if broken:
                first.grad.view(-1)[3] = torch.inf
            out = ogm.step(logits, data[2])
            assert out.finite.tolist() is not broken
            assert broken or out.coefficients.min() < 1
            found += [p.grad for p in model.parameters()]
            found += [out.coefficients, out.ratios, out.scores, stream.state.clone()]
        assert stream.state.tolist() == [21, 2 if noise else 0]
        results.append(found)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))


@pytest.mark.parametrize("noise", [False, True], ids=["ogm", "ogm-ge"])
def test_official_reproduces_the_released_training(cell: Cell, noise: bool) -> None:
    """Five SGD steps; with external noise the draws come from PyTorch's generator, in its order."""
    if cell.device != "cpu":
        pytest.skip("the released draws come from the CPU's generator")
    model = AudioVisual()
    plain = copy.deepcopy(model)
    data = [batch() for _ in range(5)]

    def train(net: AudioVisual, ours: bool) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        ogm = OGM.official(net.encoders, noise=torch.randn_like if noise else False)
        ogm.set_epoch(0)
        ogm.backend = cell.backend
        torch.manual_seed(77)
        for each in data:
            if ours:
                optimizer.zero_grad()
                loss, logits = forward(net, each)
                ogm.backward(loss, logits, each[2])
                optimizer.step()
            else:
                draw = released_ogm.gaussian if noise else None
                released_ogm.step(net, optimizer, *each, alpha=0.8, draw=draw)

    train(model, ours=True)
    train(plain, ours=False)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        # Five steps of learning rate 0.01 on gradients equal to 1e-5, momentum included.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_official_settings() -> None:
    ogm = OGM.official(AudioVisual().encoders)
    assert (ogm.rule.formula, ogm.rule.alpha, ogm.starts, ogm.ends) == ("cvpr", 0.8, 0, 50)
    assert [p.dim() for p in ogm.modalities.parameters] == [4] * 4
    later = OGM.official(AudioVisual().encoders, release="tpami", alpha=0.1, ends=None)
    assert (later.rule.formula, later.rule.alpha, later.starts, later.ends) == (
        "cvpr",
        0.1,
        6,
        None,
    )
    with pytest.raises(ValueError, match="release must be 'cvpr' or 'tpami', got 'iccv'"):
        OGM.official(AudioVisual().encoders, release="iccv")


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_modalities(cell: Cell, count: int) -> None:
    names = [f"m{i}" for i in range(count)]
    nets = {n: nn.Linear(4, 3).to(cell.device) for n in names}
    labels = torch.randint(0, 3, (20,), device=cell.device)
    x = {n: torch.randn(20, 4, device=cell.device) for n in names}
    logits = {n: nets[n](x[n]) * (i + 1) for i, n in enumerate(names)}
    loss = nn.functional.cross_entropy(sum(logits.values()), labels)
    grads = torch.autograd.grad(
        loss, [p for n in nets.values() for p in n.parameters()], retain_graph=True
    )
    out = ogm_backward(loss, nets, logits, labels, noise=False, backend=cell.backend)
    s = torch.stack([z.softmax(1)[range(20), labels].mean() for z in logits.values()]).detach()
    rho = ((s[:, None] / s).sum(1) - 1) / (count - 1)
    k = torch.where(rho > 1, (1 - 0.8 * torch.tanh(rho - 1)).clamp(min=0), 1.0)
    torch.testing.assert_close(out.scores, s)
    torch.testing.assert_close(out.ratios, rho)
    torch.testing.assert_close(out.coefficients, k)
    for i, n in enumerate(names):
        for p, g in zip(nets[n].parameters(), grads[2 * i : 2 * i + 2], strict=True):
            torch.testing.assert_close(p.grad, k[i] * g)


def test_step_after_a_backward_of_ones_own() -> None:
    model, data = AudioVisual(), batch()
    other = copy.deepcopy(model)
    loss, logits = forward(model, data)
    OGM(model.encoders, stream=NoiseStream(2)).backward(loss, logits, data[2])
    loss, logits = forward(other, data)
    ogm = OGM(other.encoders, stream=NoiseStream(2))
    loss.backward()
    ogm.step(logits, data[2])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_outside_the_window_gradients_are_plain() -> None:
    model, data = AudioVisual(), batch()
    plain = copy.deepcopy(model)
    forward(plain, data)[0].backward()
    ogm = OGM(model.encoders, starts=2, ends=3)
    for epoch, modulated in [(0, False), (2, True), (3, True), (4, False)]:
        ogm.set_epoch(epoch)
        model.zero_grad()
        loss, logits = forward(model, data)
        out = ogm.backward(loss, logits, data[2])
        assert ogm.modulating is modulated
        # Batch norm in training mode does not look at its running statistics: same gradients.
        same = [
            torch.equal(p.grad, q.grad)
            for p, q in zip(model.audio_net.parameters(), plain.audio_net.parameters(), strict=True)
        ]
        assert all(same) is not modulated
        assert bool((out.coefficients == 1).all()) is not modulated
        assert bool(out.finite)


def test_state_dict_resumes_bit_for_bit() -> None:
    data = [batch() for _ in range(6)]

    def run(net: AudioVisual, ogm: OGM, part: list) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for item in part:
            optimizer.zero_grad()
            loss, logits = forward(net, item)
            ogm.backward(loss, logits, item[2])
            optimizer.step()

    straight = AudioVisual()
    resumed = copy.deepcopy(straight)
    run(straight, OGM(straight.encoders, stream=NoiseStream(9)), data)
    first = OGM(resumed.encoders, stream=NoiseStream(9))
    first.set_epoch(3)
    run(resumed, first, data[:3])
    second = OGM(resumed.encoders, stream=NoiseStream(0))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.epoch == 3
    run(resumed, second, data[3:])
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match=r"the state of OGM lacks \['step', 'state', 'stream'\]"):
        second.load_state_dict({"format": 1, "epoch": 1})
    with pytest.raises(ValueError, match="has no format number, but this version of mmfuse reads"):
        second.load_state_dict({"epoch": 1, "stream": first.stream.state_dict()})
    with pytest.raises(ValueError, match=r"the state of OGM has format tensor\(\[1, 1\]\)"):
        second.load_state_dict({**first.state_dict(), "format": torch.tensor([1, 1])})
    with pytest.raises(ValueError, match="this is the state of InfoReg, not of OGM"):
        second.load_state_dict({**first.state_dict(), "method": "InfoReg"})


def test_torch_manual_seed_repeats_a_run() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model, data = AudioVisual(), batch()
        loss, logits = forward(model, data)
        OGM(model.encoders).backward(loss, logits, data[2])
        return model.audio_net.conv1.weight.grad

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_noise_differs_between_steps_and_parameters() -> None:
    """Same gradients twice: what is left of their difference is noise of standard deviation √2σ."""
    net = nn.ModuleDict({"a": nn.Linear(40, 50), "b": nn.Linear(40, 50)})
    labels = torch.randint(0, 50, (8,))
    x = torch.randn(8, 40)
    stream = NoiseStream(1)
    grads = []
    for _ in range(2):
        net.zero_grad()
        logits = {n: m(x) for n, m in net.items()}
        loss = nn.functional.cross_entropy(sum(logits.values()), labels)
        ogm_backward(loss, dict(net), logits, labels, stream=stream)
        grads.append([net["a"].weight.grad.clone(), net["b"].weight.grad.clone()])
    for first, second in zip(*grads, strict=True):
        assert not torch.equal(first, second)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    """A GradScaler multiplies the loss: noise and coefficients must scale along."""
    model, data = AudioVisual(), batch()
    scaled = copy.deepcopy(model)
    for net, factor in ((model, 1.0), (scaled, 1024.0)):
        loss, logits = forward(net, data)
        ogm_backward(loss * factor, net.encoders, logits, data[2], stream=NoiseStream(1))
    for name, p, q in zip(
        dict(model.named_parameters()), model.parameters(), scaled.parameters(), strict=True
    ):
        # A power of two changes no rounding; only the 1e-8 that is added to std(g) does not scale.
        torch.testing.assert_close(
            q.grad / 1024, p.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_retain_graph() -> None:
    model, data = AudioVisual(), batch()
    loss, logits = forward(model, data)
    ogm_backward(loss, model.encoders, logits, data[2], retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_frozen_missing_and_empty_gradients_are_skipped() -> None:
    model, data = AudioVisual(), batch()
    model.audio_net.conv1.weight.requires_grad_(False)
    model.visual_net.extra = nn.Parameter(torch.ones(3))  # takes no part: no gradient
    model.visual_net.none = nn.Parameter(torch.ones(0))
    loss, logits = forward(model, data)
    loss = loss + model.visual_net.none.sum()
    out = ogm_backward(loss, model.encoders, logits, data[2])
    assert model.audio_net.conv1.weight.grad is None
    assert model.visual_net.extra.grad is None
    assert model.visual_net.none.grad.shape == (0,)
    assert bool(out.finite)


def test_a_frozen_encoder_keeps_the_others_noise() -> None:
    """Stream ids are the parameters' places in the method, not among those with a gradient."""
    model, data = AudioVisual(), batch()
    frozen = copy.deepcopy(model)
    for p in frozen.audio_net.parameters():
        p.requires_grad_(False)
    grads = []
    for net in (model, frozen):
        loss, logits = forward(net, data)
        ogm_backward(loss, net.encoders, logits, data[2], stream=NoiseStream(1))
        grads.append([p.grad for p in net.visual_net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nothing_to_modulate() -> None:
    model, data = AudioVisual(), batch()
    _loss, logits = forward(model, data)
    model.requires_grad_(False)
    out = OGM(model.encoders).step(logits, data[2])
    assert all(p.grad is None for p in model.parameters())
    assert bool(out.finite)


def test_one_element_tensors_are_scaled_without_noise() -> None:
    nets = {"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)}
    logits = {"a": torch.tensor([[4.0, -4.0]]), "b": torch.tensor([[0.0, 0.0]])}
    loss = 3.0 * nets["a"].weight.sum() + 5.0 * nets["b"].weight.sum()
    out = ogm_backward(loss, nets, logits, torch.tensor([0]))
    assert float(nets["a"].weight.grad) == pytest.approx(3.0 * float(out.coefficients[0]))
    assert float(nets["b"].weight.grad) == 5.0


@pytest.mark.parametrize("noise", [False, True], ids=["ogm", "ogm-ge"])
def test_a_non_finite_gradient_stays_in_its_tensor(noise: bool) -> None:
    nets = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}
    logits = {n: m(torch.randn(4, 3)) for n, m in nets.items()}
    loss = sum(z.sum() for z in logits.values())
    ogm = OGM(nets, noise=noise)
    loss.backward()
    nets["a"].weight.grad[1, 1] = float("inf")
    out = ogm.step(logits, torch.tensor([0, 1, 2, 0]))
    assert not bool(out.finite)
    assert not bool(nets["a"].weight.grad.isfinite().all())
    for p in (nets["a"].bias, nets["b"].weight, nets["b"].bias):
        assert bool(p.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_and_mixed_dtypes(cell: Cell, dtype: torch.dtype) -> None:
    nets = {
        "a": nn.Linear(6, 4, device=cell.device).to(dtype),
        "b": nn.Linear(6, 4, device=cell.device),
    }
    logits = {
        n: m(torch.randn(5, 6, device=cell.device, dtype=m.weight.dtype)) for n, m in nets.items()
    }
    loss = sum(z.float().square().sum() for z in logits.values())
    out = ogm_backward(
        loss, nets, logits, torch.tensor([0, 1, 2, 3, 0], device=cell.device), backend=cell.backend
    )
    assert bool(out.finite)
    assert nets["a"].weight.grad.dtype == dtype


class TestBadInput:
    """Every error names the culprit, and neither gradients nor the stream have changed."""

    def raises(self, error: type[Exception], match: str, **changes) -> None:
        model, data = AudioVisual(), batch()
        loss, logits = forward(model, data)
        arguments = {
            "loss": loss,
            "encoders": model.encoders,
            "logits": logits,
            "labels": data[2],
            "stream": NoiseStream(0),
        }
        for key, value in changes.items():
            made_here = callable(value) and key != "select"
            arguments[key] = value(model, logits, data) if made_here else value
        with pytest.raises(error, match=match):
            ogm_backward(**arguments)
        assert all(p.grad is None for p in model.parameters())
        assert arguments["stream"].state.tolist() == [0, 0]

    def test_encoders(self) -> None:
        for match, encoders in [
            ("at least two modalities", lambda m, z, d: {"audio": m.audio_net}),
            (
                r"encoders\['visual'\] \(ReLU\) has no parameter: a modality that nothing",
                lambda m, z, d: {"audio": m.audio_net, "visual": nn.ReLU()},
            ),
            (
                r"encoders\['visual'\].weight is the same parameter as encoders\['audio'\]",
                lambda m, z, d: {"audio": m.audio_net, "visual": m.audio_net.conv1},
            ),
        ]:
            self.raises(ValueError, match, encoders=encoders)

    def test_encoder_types(self) -> None:
        for match, encoders in [
            ("encoders must map names", lambda m, z, d: [m.audio_net, m.visual_net]),
            (
                r"encoders\['audio'\] must be a module or an iterable",
                lambda m, z, d: {"audio": 3, "visual": m.visual_net},
            ),
            (
                r"encoders\['audio'\] must be a module or an iterable",
                lambda m, z, d: {"audio": m.fc.weight, "visual": m.visual_net},
            ),
            (
                r"encoders\['audio'\]\[0\] is not a parameter but Conv2d",
                lambda m, z, d: {"audio": [m.audio_net.conv1], "visual": m.visual_net},
            ),
            (
                r"encoders\['audio'\]\[0\] has dtype torch.complex64",
                lambda m, z, d: {
                    "audio": [nn.Parameter(torch.ones(2, dtype=torch.complex64))],
                    "visual": m.visual_net,
                },
            ),
        ]:
            self.raises(TypeError, match, encoders=encoders)

    def test_names(self) -> None:
        self.raises(
            ValueError,
            r"logits and encoders .* missing \['visual'\]; unknown \['video'\]",
            logits=lambda m, z, d: {"audio": z["audio"], "video": z["visual"]},
        )
        self.raises(
            TypeError,
            r"logits\['visual'\] is not a tensor but list",
            logits=lambda m, z, d: {"audio": z["audio"], "visual": [1.0]},
        )
        self.raises(TypeError, "logits must map", logits=lambda m, z, d: list(z.values()))

    def test_selection(self) -> None:
        self.raises(ValueError, "select must be one of 'all', 'matrix', 'conv'", select="linear")
        self.raises(
            ValueError,
            r"encoders\['audio'\] has no parameter to modulate: 7 found, .* selects none",
            select=lambda p: p.dim() == 5,
        )

    def test_labels(self) -> None:
        self.raises(
            ValueError,
            r"labels\[0\] = 5 is out of range for logits\['audio'\] with 5",
            labels=lambda m, z, d: torch.full_like(d[2], 5),
        )
        self.raises(
            ValueError,
            r"logits\['visual'\] has 3 rows, labels 12",
            logits=lambda m, z, d: {"audio": z["audio"], "visual": z["visual"][:3]},
        )

    def test_hyperparameters(self) -> None:
        for alpha in (-0.1, float("nan"), float("inf")):
            self.raises(ValueError, "alpha must be a finite number", alpha=alpha)
        self.raises(ValueError, "formula must be 'tpami' or 'cvpr'", formula="eq10")
        with pytest.raises(ValueError, match="ends=1 is before starts=2"):
            OGM(AudioVisual().encoders, starts=2, ends=1)

    def test_a_loss_that_is_no_scalar(self) -> None:
        self.raises(
            ValueError,
            r"loss must be a scalar, got shape \[12\]: take its mean or sum",
            loss=lambda m, z, d: z["audio"].sum(1),
        )

    def test_sparse_gradient(self) -> None:
        nets = {"a": nn.Embedding(5, 3, sparse=True), "b": nn.Linear(3, 3)}
        logits = {"a": nets["a"](torch.tensor([1, 2])), "b": nets["b"](torch.randn(2, 3))}
        loss = sum(z.sum() for z in logits.values())
        match = r"gradient of encoders\['a'\].weight has layout torch.sparse_coo"
        plain = torch.autograd.grad(loss, nets["b"].weight, retain_graph=True)[0]
        with pytest.raises(TypeError, match=match):
            ogm_backward(loss, nets, logits, torch.tensor([0, 1]))
        assert torch.equal(nets["b"].weight.grad, plain)  # back-propagated, not modulated
