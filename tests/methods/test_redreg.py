"""RedReg against a plain transcription, its monitor's discretion, and its errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cells import Cell
from epochs import next_epoch
from no_sync import no_host_sync
from torch import Tensor, nn
from torch.nn import functional as F

from mmfuse import NoiseStream, RedReg

NAMES = ["audio", "visual", "text"]
Step = tuple[dict[str, Tensor], Tensor]


class Network(nn.Module):
    """Encoders with batch norm and dropout, and a head of its own for each."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {
                n: nn.Sequential(
                    nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4)
                )
                for n in NAMES[:count]
            }
        )
        self.heads = nn.ModuleDict({n: nn.Linear(4, 3) for n in NAMES[:count]})

    def backward(self, step: Step, scale: float = 1.0) -> tuple[dict, Tensor, dict, dict]:
        """The arguments of `RedReg.step`, after the backward pass."""
        self.zero_grad()
        inputs, labels = step
        features = {n: net(inputs[n]) for n, net in self.encoders.items()}
        logits = {n: self.heads[n](f) for n, f in features.items()}
        (scale * F.cross_entropy(sum(logits.values()), labels)).backward()
        return logits, labels, features, inputs


def batches(count: int, steps: int, device: str = "cpu") -> list[Step]:
    out = []
    for _ in range(steps):
        labels = torch.randint(0, 3, (12,), device=device)
        hint = F.one_hot(labels, 5).float()
        out.append(
            (
                {
                    n: torch.randn(12, 5, device=device) + (2.0 - i) * hint
                    for i, n in enumerate(NAMES[:count])
                },
                labels,
            )
        )
    return out


def always(model: Network, **options: object) -> RedReg:
    """A RedReg that regulates every modality that is ahead, in a started epoch."""
    options = {"threshold": -1e9, "agreement": (-2.0, -2.0), **options}
    redreg = RedReg(dict(model.encoders), **options)
    next_epoch(redreg)
    return redreg


def renew(model: Network) -> None:
    """New gradients with the old values, so that there is something to step on again."""
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad.clone()


def displace(model: Network) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)


@pytest.mark.slow_except_on("reference", "cpu", "cuda")
@pytest.mark.parametrize("projection", ["tensor", "encoder"])
@pytest.mark.parametrize("count", [2, 3])
def test_training_follows_the_formulas(cell: Cell, count: int, projection: str) -> None:
    """Two epochs of nine steps next to a plain transcription in float64, window of four."""
    cell.skip_slow((count, projection) != (3, "tensor"))
    steps = 3 if cell.slow else 9
    model = Network(count).to(cell.device).double()
    plain = copy.deepcopy(model)
    window, gamma, limit, sigma, epochs = 4, 0.6, 0.35, 0.05, 3
    stream = NoiseStream(7, cell.device)
    redreg = RedReg(
        dict(model.encoders),
        epochs=epochs,
        window=window,
        gamma=gamma,
        threshold=limit,
        sigma=sigma,
        agreement=(-0.2, 0.4),
        projection=projection,
        stream=stream,
        backend=cell.backend,
    )
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (model, plain)]
    history: list[list[float]] = []
    average, weight = [0.0] * count, 0.0
    regulated = []
    for epoch in range(2):
        next_epoch(redreg)
        anchors = [p.detach().clone() for p in plain.encoders.parameters()]
        for step in batches(count, steps, cell.device):
            step = ({n: x.double() for n, x in step[0].items()}, step[1])
            torch.manual_seed(len(history))  # the networks' dropout
            ours = model.backward(step)
            normals = [stream.normal(60, i).view(12, 5).double() for i in range(2 * count)]
            out = redreg.step(*ours)

            torch.manual_seed(len(history))
            logits, labels, features, inputs = plain.backward(step)
            rows = torch.arange(12, device=cell.device)
            h = [float(z.detach().softmax(1)[rows, labels].mean()) for z in logits.values()]
            history.append(h)
            s, r, red = [], [], []
            weight = 0.9 * weight + 0.1
            for m, (name, x) in enumerate(inputs.items()):
                if len(history) <= window:
                    s.append(1.0)
                else:
                    past = sum(old[m] for old in history[-window - 1 : -1])
                    s.append((h[m] - history[-window - 1][m]) / abs(past))
                x1, x2 = (x + sigma * normals[2 * m + k] for k in range(2))
                encoder = copy.deepcopy(plain.encoders[name]).eval()
                moved = (encoder(x1) - encoder(x2)).square().mean()
                red.append(float(moved.detach() / (x1 - x2).square().mean()))
                average[m] = 0.9 * average[m] + 0.1 * red[m]
                r.append(red[m] / (average[m] / weight) - gamma * max(s[m], 0.0))
            first = max(range(count), key=h.__getitem__)
            delta = h[first] - (sum(h) - h[first]) / (count - 1)
            pairs = [
                float(F.cosine_similarity(features[a], features[b]).detach().mean())
                for i, a in enumerate(NAMES[:count])
                for b in NAMES[i + 1 : count]
            ]
            gate = float(sum(pairs) / len(pairs) > -0.2 + 0.6 * epoch / (epochs - 1))
            beta = [0.0] * count
            if r[first] > limit:
                beta[first] = gate * math.exp(0.9 * math.tanh(delta))
            regulated.append(max(beta))

            rest = iter(anchors)
            for b, encoder in zip(beta, plain.encoders.values(), strict=True):
                ps = list(encoder.parameters())
                ds = [p.detach() - next(rest) for p in ps]
                dots = [float((d * p.grad).sum()) for d, p in zip(ds, ps, strict=True)]
                squares = [float(p.grad.square().sum()) for p in ps]
                if projection == "encoder":
                    dots, squares = [sum(dots)] * len(ps), [sum(squares)] * len(ps)
                for p, d, dot, square in zip(ps, ds, dots, squares, strict=True):
                    p.grad += b * (d - dot / (square + 1e-12) * p.grad)

            for name, value, expected in [
                ("scores", out.scores, h),
                ("growth", out.growth, s),
                ("redundancy", out.redundancy, red),
                ("phase", out.phase, r),
                ("coefficients", out.coefficients, beta),
            ]:
                torch.testing.assert_close(
                    # The noise is float32: good to 1e-5.
                    value.tolist(),
                    expected,
                    rtol=1e-4,
                    atol=1e-5,
                    msg=lambda text, name=name: f"{name} in step {len(history)}: {text}",
                )
            assert float(out.gate) == gate
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
            for optimizer in optimizers:
                optimizer.step()
    assert cell.slow or (max(regulated) > 0 and min(regulated) == 0)


def test_the_update_is_orthogonal_to_the_gradient(cell: Cell) -> None:
    model = Network().to(cell.device)
    redreg = always(model, backend=cell.backend)
    displace(model)
    arguments = model.backward(batches(2, 1, cell.device)[0])
    before = [p.grad.clone() for p in model.encoders.parameters()]
    out = redreg.step(*arguments)
    assert (out.coefficients > 0).sum() == 1, "one modality is ahead"
    for i, (p, g) in enumerate(zip(model.encoders.parameters(), before, strict=True)):
        added = (p.grad - g).double()
        if out.coefficients[i // 6] == 0:
            assert (added == 0).all()
            continue
        if g.norm() < 1e-3:
            continue  # a bias before batch norm: rounding errors, smaller than the formula's 1e-12
        assert added.norm() > 0
        # Cosine of what was added: sqrt(n) roundings of 2^-24 in each, and the projection's own.
        assert abs((added * g).sum()) <= 1e-4 * added.norm() * g.norm() + 1e-7 * g.norm()


def test_the_monitor_leaves_no_trace(cell: Cell) -> None:
    model = Network().to(cell.device)
    model.encoders["audio"][1].eval()  # a batch norm that its user has frozen
    redreg = always(model, backend=cell.backend)
    arguments = model.backward(batches(2, 1, cell.device)[0])
    flags = [m.training for m in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    torch.manual_seed(5)
    expected = torch.rand(3), torch.rand(3, device=cell.device)
    torch.manual_seed(5)
    out = redreg.step(*arguments)
    assert (out.redundancy > 0).all()
    assert flags == [m.training for m in model.modules()]
    assert all(map(torch.equal, buffers, model.buffers()))
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.rand(3, device=cell.device), expected[1])


def test_any_callable_is_watched_as_discreetly() -> None:
    model = Network()
    audio, visual = model.encoders.values()

    def noisy(x: Tensor) -> Tensor:
        return audio(x.view(-1, 5)) + torch.randn(12, 4)

    redreg = RedReg(
        {"audio": list(audio.parameters()), "visual": visual},
        forward={"audio": noisy, "visual": lambda x: visual(x)},
    )
    next_epoch(redreg)
    plain = RedReg(dict(model.encoders))
    next_epoch(plain)
    step = batches(2, 1)[0]
    arguments = model.backward(step)
    flags = [m.training for m in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.set_rng_state(state)
    stream = redreg.stream.state.clone()
    plain.stream.load_state_dict({"state": stream})
    out, same = redreg.step(*arguments), plain.step(*arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert flags == [m.training for m in model.modules()]
    assert all(map(torch.equal, buffers, model.buffers()))
    assert torch.equal(out.redundancy[1], same.redundancy[1])
    assert out.redundancy[0] > same.redundancy[0]


def test_an_encoder_that_fails_changes_nothing() -> None:
    model = Network()
    redreg = always(model)
    displace(model)
    arguments = model.backward(batches(2, 1)[0])
    grads = [p.grad.clone() for p in model.parameters()]
    state = copy.deepcopy(redreg.state_dict())
    flags = [m.training for m in model.modules()]
    logits, labels, features, inputs = arguments
    wrong = {**inputs, "visual": torch.randn(12, 7)}
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        redreg.step(logits, labels, features, wrong)
    assert flags == [m.training for m in model.modules()]
    assert all(map(torch.equal, grads, (p.grad for p in model.parameters())))
    for key, value in redreg._state.items():
        assert torch.equal(value, state["state"][key])
    assert torch.equal(redreg.stream.state, state["stream"]["state"])


@pytest.mark.parametrize("every", [1, 3])
def test_monitor_every_kth_step(every: int) -> None:
    model = Network()
    calls = 0

    def counted(module: nn.Module, *_: object) -> None:
        nonlocal calls
        calls += not module.training

    model.encoders["audio"].register_forward_pre_hook(counted)
    redreg = always(model, monitor_every=every)
    seen = []
    for step in batches(2, 7):
        seen.append(redreg.step(*model.backward(step)).redundancy.tolist())
        displace(model)
    assert calls == 2 * len(range(0, 7, every))
    for i, redundancy in enumerate(seen):
        assert redundancy == seen[i - i % every]
    assert seen[0] != seen[every]


def test_nobody_is_ahead_on_a_tie() -> None:
    model = Network(3)
    redreg = always(model)
    displace(model)
    logits, labels, features, inputs = model.backward(batches(3, 1)[0])
    tie = {"audio": logits["audio"], "visual": logits["audio"], "text": logits["audio"] * 0 - 1}
    tie["text"] = F.one_hot(labels, 3) * -9.0  # far behind
    assert redreg.step(tie, labels, features, inputs).coefficients.tolist() == [0.0, 0.0, 0.0]


def test_the_gate_rises_with_the_epochs() -> None:
    model = Network()
    redreg = RedReg(dict(model.encoders), epochs=4, threshold=-1e9)
    limits = []
    for _ in range(6):
        next_epoch(redreg)
        limits.append(float(redreg._state["gate_threshold"]))
    torch.testing.assert_close(limits, [0.2, 0.3, 0.4, 0.5, 0.5, 0.5])
    displace(model)
    logits, labels, features, inputs = model.backward(batches(2, 1)[0])
    one = features["audio"].detach()
    for other, gate in ((one, 1.0), (-one, 0.0), (torch.zeros_like(one), 0.0)):
        renew(model)
        out = redreg.step(logits, labels, {"audio": one, "visual": other}, inputs)
        assert float(out.gate) == gate
        assert (out.coefficients.max() > 0) == bool(gate)


def test_drop_inputs(cell: Cell) -> None:
    model = Network(3).to(cell.device)
    redreg = RedReg(dict(model.encoders), epochs=10, input_dropout=(0.6, 0.1, 0.5))
    inputs = batches(3, 1, cell.device)[0][0]
    assert all(x is RedReg(dict(model.encoders)).drop_inputs(inputs)[n] for n, x in inputs.items())
    for epoch in range(8):
        next_epoch(redreg)
        p = 0.6 - 0.5 * min(1.0, epoch / 5)
        for u in torch.linspace(0, 0.999, 40, device=cell.device):
            out = redreg.drop_inputs(inputs, u)
            for m, name in enumerate(NAMES):
                dropped = p * m / 3 <= float(u) < p * (m + 1) / 3
                assert torch.equal(out[name], inputs[name] * (not dropped))
    counts = torch.zeros(3)
    redreg = RedReg(dict(model.encoders), input_dropout=(0.6, 0.6, 1.0), stream=NoiseStream(3))
    state = torch.get_rng_state()
    for _ in range(400):
        out = redreg.drop_inputs(inputs)
        counts += torch.tensor([float((x == 0).all()) for x in out.values()])
        redreg.stream.advance()
    assert torch.equal(torch.get_rng_state(), state)
    # 80 expected for each, standard deviation 8; five of them.
    assert ((counts - 80).abs() < 40).all()


@pytest.mark.parametrize("every", [1, 3])
def test_resumes_bit_for_bit_within_an_epoch(cell: Cell, every: int) -> None:
    cell.skip_slow(every == 1)
    model = Network().to(cell.device)
    other = copy.deepcopy(model)
    length = 2 if cell.slow else 5
    data = batches(2, 2 * length, cell.device)
    options = {"monitor_every": every, "window": 3, "threshold": 0.1, "agreement": (-0.5, 0.5)}

    def make(net: Network) -> RedReg:
        stream = NoiseStream(1, cell.device)
        return RedReg(dict(net.encoders), stream=stream, backend=cell.backend, **options)

    def run(net: Network, redreg: RedReg, first: int, last: int) -> list[float]:
        seen = []
        for i in range(first, last):
            if i % length == 0:
                next_epoch(redreg)
            torch.manual_seed(i)
            seen += redreg.step(*net.backward(data[i])).coefficients.tolist()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
        return seen

    straight = run(model, make(model), 0, 2 * length)
    before = make(other)
    run(other, before, 0, 2 * length - 1)
    after = make(other)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert run(other, after, 2 * length - 1, 2 * length) == straight[-2:]
    assert cell.slow or max(straight) > 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_no_host_sync_in_a_step(cell: Cell) -> None:
    model = Network().to(cell.device)
    redreg = always(model, backend=cell.backend, input_dropout=(0.5, 0.5, 1.0))
    arguments = model.backward(batches(2, 1, cell.device)[0])
    redreg.step(*arguments)  # compiles and fills caches
    renew(model)
    with no_host_sync(cell.device):
        redreg.drop_inputs(arguments[3])
        redreg.step(*arguments)


def test_a_nan_stays_where_it_is(cell: Cell) -> None:
    model = Network().to(cell.device)
    redreg = always(model, backend=cell.backend)
    displace(model)
    arguments = model.backward(batches(2, 1, cell.device)[0])
    broken = [net[0].weight for net in model.encoders.values()]
    for p in broken:
        p.grad[0, 0] = torch.nan
    out = redreg.step(*arguments)
    assert not out.finite
    for p in model.encoders.parameters():
        assert bool(p.grad.isfinite().all()) is not any(p is b for b in broken)


def test_what_is_not_finite_stays_out_of_the_history() -> None:
    model = Network()
    redreg = always(model)
    displace(model)
    step = batches(2, 1)[0]
    redreg.step(*model.backward(step))
    state = copy.deepcopy(redreg.state_dict())
    logits, labels, features, inputs = model.backward(step)
    broken = {**logits, "audio": logits["audio"] * torch.nan}
    infinite = {**inputs, "visual": inputs["visual"] / 0}
    grads = [p.grad.clone() for p in model.encoders.parameters()]
    out = redreg.step(broken, labels.new_zeros(12) - 100, features, infinite)
    assert out.coefficients.tolist() == [0.0, 0.0]
    assert all(map(torch.equal, grads, (p.grad for p in model.encoders.parameters())))
    for key in ("scores", "steps"):
        assert torch.equal(redreg._state[key], state["state"][key])
    assert redreg._state["average"][1] == state["state"]["average"][1]
    assert redreg._state["average"][0] != state["state"]["average"][0]


def test_gradients_of_zero_get_the_whole_displacement(cell: Cell) -> None:
    model = Network().to(cell.device)
    redreg = always(model, backend=cell.backend)
    anchors = [p.detach().clone() for p in model.encoders.parameters()]
    displace(model)
    arguments = model.backward(batches(2, 1, cell.device)[0], scale=0.0)
    out = redreg.step(*arguments)
    assert (out.coefficients > 0).any()
    for i, (p, w0) in enumerate(zip(model.encoders.parameters(), anchors, strict=True)):
        torch.testing.assert_close(p.grad, out.coefficients[i // 6] * (p.detach() - w0))


def test_constant_inputs_and_a_batch_of_one() -> None:
    model = Network().eval()  # batch norm needs more than one sample in training
    redreg = always(model)
    inputs, labels = batches(2, 1)[0]
    one = ({n: x[:1] for n, x in inputs.items()}, labels[:1])
    assert (redreg.step(*model.backward(one)).redundancy > 0).all()
    constant = ({n: torch.full_like(x, 4.0) for n, x in inputs.items()}, labels)
    out = redreg.step(*model.backward(constant))
    assert (out.redundancy > 0).all() and out.redundancy.isfinite().all()
    # Clamping takes all noise away from an image outside [0, 1]: nothing moves, no redundancy.
    clamped = always(model, clamp=["visual"])
    out = clamped.step(*model.backward(constant))
    assert out.redundancy[1] == 0 and out.redundancy[0] > 0
    assert out.coefficients.isfinite().all()


def test_features_of_more_dimensions_are_flattened() -> None:
    model = Network()
    redreg = always(model, agreement=(0.3, 0.3))
    logits, labels, features, inputs = model.backward(batches(2, 1)[0])
    flat = redreg.step(logits, labels, features, inputs).gate
    maps = {n: f.detach().view(12, 2, 2) for n, f in features.items()}
    renew(model)
    assert redreg.step(logits, labels, maps, inputs).gate == flat


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda z, y, f, x: (z, y, f, {"audio": x["audio"]}),
            ValueError,
            r"inputs and encoders .*",
        ),
        (lambda z, y, f, x: (z, y, {"audio": f["audio"]}, x), ValueError, r"features and encoders"),
        (lambda z, y, f, x: ({"audio": z["audio"]}, y, f, x), ValueError, r"logits and encoders"),
        (
            lambda z, y, f, x: (z, y, {**f, "visual": torch.randn(12, 3)}, x),
            ValueError,
            r"features\['audio'\] is \[12, 4\], features\['visual'\] \[12, 3\]",
        ),
        (
            lambda z, y, f, x: (z, y, {**f, "visual": f["visual"][:, 0]}, x),
            ValueError,
            r"features\['visual'\] must be \[B, D\], got \[12\]",
        ),
        (
            lambda z, y, f, x: (z, y, f, {**x, "audio": x["audio"].long()}),
            TypeError,
            r"inputs\['audio'\] has dtype torch.int64",
        ),
        (lambda z, y, f, x: (z, y + 3, f, x), ValueError, r"out of range for logits\['audio'\]"),
    ],
)
def test_bad_input_changes_nothing(change: object, error: type[Exception], message: str) -> None:
    model = Network()
    redreg = always(model)
    displace(model)
    arguments = model.backward(batches(2, 1)[0])
    grads = [p.grad.clone() for p in model.parameters()]
    state = copy.deepcopy(redreg.state_dict())
    with pytest.raises(error, match=message):
        redreg.step(*change(*arguments))
    assert all(map(torch.equal, grads, (p.grad for p in model.parameters())))
    for key, value in redreg._state.items():
        assert torch.equal(value, state["state"][key])
    assert torch.equal(redreg.stream.state, state["stream"]["state"])


def test_an_encoder_that_returns_no_tensor_is_named() -> None:
    model = Network()
    redreg = always(model, forward={"visual": lambda x: (x, x)})
    with pytest.raises(TypeError, match="encoder of 'visual' returned tuple; give `forward`"):
        redreg.step(*model.backward(batches(2, 1)[0]))


def test_order_of_calls_and_changed_encoders() -> None:
    model = Network()
    redreg = RedReg(dict(model.encoders))
    arguments = model.backward(batches(2, 1)[0])
    with pytest.raises(RuntimeError, match=r"RedReg: call set_epoch\(epoch\) first"):
        redreg.step(*arguments)
    next_epoch(redreg)
    model.encoders["audio"][3] = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"encoders\['audio'\].3.weight is new"):
        next_epoch(redreg)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": 2**31}, ValueError, "window must be at most 1,000,000"),
        ({"monitor_every": 0}, ValueError, "monitor_every must be at least 1"),
        ({"beta": -0.1}, ValueError, "beta must be"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
        ({"sigma": 0.0}, ValueError, "sigma must be positive and finite"),
        ({"sigma": {"audio": 0.1}}, ValueError, r"sigma lacks \['visual'\]"),
        ({"sigma": {"audio": 0.1, "x": 1.0}}, ValueError, r"sigma names \['x'\]"),
        ({"projection": "layer"}, ValueError, "projection must be 'tensor' or 'encoder'"),
        ({"clamp": ["image"]}, ValueError, r"clamp names \['image'\]; the encoders are"),
        ({"forward": {"image": abs}}, ValueError, r"forward names \['image'\]"),
        ({"forward": torch.ones(2)}, TypeError, "forward must map names .* got Tensor"),
        ({"forward": ["audio"]}, TypeError, "forward must map names .* got list"),
        ({"clamp": torch.ones(2)}, TypeError, "clamp must hold names of encoders, got Tensor"),
        (
            {"input_dropout": (0.6, 1.1, 0.3)},
            ValueError,
            "must hold three numbers in",
        ),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RedReg(dict(Network().encoders), **options)


def test_bare_parameters_need_a_forward() -> None:
    model = Network()
    encoders = {n: list(net.parameters()) for n, net in model.encoders.items()}
    with pytest.raises(TypeError, match=r"encoders\['audio'\] is no module: give forward"):
        RedReg(encoders)


def test_a_state_that_does_not_fit() -> None:
    model = Network()
    state = copy.deepcopy(always(model).state_dict())
    with pytest.raises(
        ValueError, match=r"'scores' in the state of RedReg .* \[2, 6\], got \[2, 11\]"
    ):
        RedReg(dict(model.encoders), window=5).load_state_dict(state)
    del state["stream"]
    with pytest.raises(ValueError, match=r"the state of RedReg lacks \['stream'\]"):
        RedReg(dict(model.encoders)).load_state_dict(state)
