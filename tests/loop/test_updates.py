"""OGM on an optimizer's updates: exactly k times what the optimizer does alone, and GE's noise.

Every comparison is with a twin: the same optimizer on a copy of the parameters, with the same
gradients, whose parameters are set to those of the network under test before every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
from cells import Cell
from networks import AudioVisual, batch
from tolerances import (
    GROWTH,
    UNDERFLOW,
    UNIT_ROUNDOFF,
    accumulation_dtype,
    assert_within,
    updated_grad,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

import mmfuse
from mmfuse import OGM, NoiseStream

Make = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adam-foreach": lambda p: Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "adam-fused": lambda p: Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5, centered=True, foreach=False),
    "rmsprop-foreach": lambda p: RMSprop(p, lr=0.01, weight_decay=0.01, foreach=True),
    "adagrad": lambda p: Adagrad(p, lr=0.01),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Logits(nn.Module):
    """Encoders whose outputs are the logits, so that a test can choose every parameter."""

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], ...]]) -> None:
        super().__init__()
        self.nets = nn.ModuleDict(
            {
                name: nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in mine)
                for name, mine in shapes.items()
            }
        )

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return dict(self.nets)

    def set_gradients(self) -> None:
        for p in self.parameters():
            p.grad = torch.randn_like(p)


SMALL = {"a": ((7, 5), (3, 2, 3, 3), (6,)), "b": ((4, 9), (1,), (11,))}


def scores(ahead: int = 0, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of "a" and "b", of which one is ahead, and labels."""
    labels = torch.tensor([0, 2, 1, 1, 0])
    sure = 2.0 * F.one_hot(labels, 3).to(dtype)
    logits = [sure, torch.zeros_like(sure)]
    return {"a": logits[ahead], "b": logits[1 - ahead]}, labels


def losses(model: AudioVisual, data: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and logits in which audio is ahead before it has been trained."""
    audio, visual, labels = data
    dtype = model.fc.weight.dtype
    a, v, out = model(audio.to(dtype), visual.to(dtype))
    logits = mmfuse.unimodal_logits(model.fc, {"audio": a, "visual": v})
    logits["audio"] = logits["audio"] + 2 * F.one_hot(labels, out.shape[1])
    return F.cross_entropy(out, labels), {name: z.detach() for name, z in logits.items()}


class Twin:
    """The same optimizers on copies of the parameters."""

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], list[Optimizer]]) -> None:
        self.model = copy.deepcopy(model)
        self.optimizers = make(self.model)

    def step(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters of `model` now, and as the optimizers alone would leave them."""
        before = [p.detach().clone() for p in model.parameters()]
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        for mine, theirs in pairs:
            mine.data.copy_(theirs.data)
            mine.grad = None if theirs.grad is None else theirs.grad.clone()
        for optimizer in self.optimizers:
            optimizer.step()
        return before, [p.detach().clone() for p in self.model.parameters()]


def assert_scaled(after: Tensor, before: Tensor, alone: Tensor, k: float) -> None:
    """It is before + k (alone − before), computed as alone + (k − 1)(alone − before)."""
    dtype = after.dtype
    w0, w1 = before.double(), alone.double()
    expected = w1 + (k - 1) * (w1 - w0)
    zero = torch.zeros((), dtype=torch.float64)
    pulled = (k - 1) * (w1.abs() + w0.abs())
    # k − 1 itself is a float32 of size at most 1, rounded once.
    factor = UNIT_ROUNDOFF[torch.float32] * (w1 - w0).abs()
    bound = factor + updated_grad(dtype, expected, w1, pulled, zero, zero)
    assert_within(after, expected, bound, "updated parameter")


def assert_noisy(
    after: Tensor, before: Tensor, alone: Tensor, k: float, stream: NoiseStream, stream_id: int
) -> None:
    """Does as `assert_scaled`, with + std(alone − before) z."""
    dtype = after.dtype
    w0, w1 = before.double(), alone.double()
    update = (alone - before).double()  # as it is stored
    std = update.std()
    z = stream.normal(after.numel(), stream_id, dtype=torch.float64).view_as(w0)
    expected = w1 + (k - 1) * (w1 - w0) + std * z
    # Twice the variance's relative error, √L + 4 roundings, covers the root and its own roundings.
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    spread = (GROWTH + 4) * u * (std * z).abs()
    factor = UNIT_ROUNDOFF[torch.float32] * (w1 - w0).abs()
    pulled = (k - 1) * (w1.abs() + w0.abs())
    bound = factor + spread + updated_grad(dtype, expected, w1, pulled, std, z)
    assert_within(after, expected, bound, "updated parameter")


# Ways to give the parameters of an AudioVisual to optimizers.
def together(make: Make) -> Callable[[Any], list[Optimizer]]:
    return lambda model: [make(model.parameters())]


def in_groups(make: Make) -> Callable[[Any], list[Optimizer]]:
    """The head, a part of both encoders with a larger rate, and the rest, out of order."""

    def made(model: AudioVisual) -> list[Optimizer]:
        matrices = [p for net in model.encoders.values() for p in net.parameters() if p.dim() > 1]
        vectors = [p for net in model.encoders.values() for p in net.parameters() if p.dim() == 1]
        return [
            make(
                [
                    {"params": model.fc.parameters()},
                    {"params": vectors[::-1], "lr": 0.05},
                    {"params": matrices},
                ]
            )
        ]

    return made


def in_two(make: Make) -> Callable[[Any], list[Optimizer]]:
    """Each encoder is divided between both optimizers."""

    def made(model: AudioVisual) -> list[Optimizer]:
        encoders = [p for net in model.encoders.values() for p in net.parameters()]
        return [make(encoders[::2]), make([*encoders[1::2], *model.fc.parameters()])]

    return made


def train(
    model: AudioVisual, spread: Callable[[Any], list[Optimizer]], steps: int = 3, **options: Any
) -> None:
    """Steps of whose results every one is compared with the twin's."""
    twin = Twin(model, spread)
    optimizers = spread(model)
    ogm = OGM(model.encoders, apply_to="update", noise=False, **options)
    for optimizer in optimizers:
        ogm.attach(optimizer)
    owner = {id(p): m for m, net in enumerate(model.encoders.values()) for p in net.parameters()}
    device = model.fc.weight.device
    lossy = model.fc.weight.dtype == torch.bfloat16
    for _ in range(steps):
        data = tuple(t.to(device) for t in batch())
        model.zero_grad()
        loss, logits = losses(model, data)
        out = ogm.backward(loss, logits, data[2])
        before, alone = twin.step(model)
        for optimizer in optimizers:
            optimizer.step()
        k = out.coefficients.tolist()
        assert k[0] < 0.9 and k[1] == 1.0
        # A small step of a bfloat16 weight may be none, but not all of them.
        still = [torch.equal(w0, w1) for w0, w1 in zip(before, alone, strict=True)]
        assert sum(still) < (len(still) / 2 if lossy else 1)
        for p, w0, w1 in zip(model.parameters(), before, alone, strict=True):
            if id(p) in owner:
                assert_scaled(p, w0, w1, k[owner[id(p)]])
            else:
                assert torch.equal(p, w1)
        assert bool(out.finite)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_is_k_times_that_of_the_optimizer(name: str, dtype: torch.dtype) -> None:
    train(AudioVisual().to(dtype), together(OPTIMIZERS[name]))


@pytest.mark.parametrize("name", ["sgd", "adam-foreach", "adamw-fused", "rmsprop"])
@pytest.mark.parametrize("spread", [in_groups, in_two])
def test_with_several_groups_or_optimizers_too(
    name: str, spread: Callable[[Make], Callable[[Any], list[Optimizer]]]
) -> None:
    train(AudioVisual(), spread(OPTIMIZERS[name]))


def test_on_every_backend(cell: Cell) -> None:
    train(AudioVisual().to(cell.device), in_groups(OPTIMIZERS["adamw"]), backend=cell.backend)


def test_an_optimizer_that_needs_a_closure() -> None:
    model = AudioVisual()
    data = batch()
    train_on = copy.deepcopy(model)
    ogm = OGM(model.encoders, apply_to="update", noise=False)

    def lbfgs(net: nn.Module) -> Optimizer:
        return torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)

    def closure_of(net: AudioVisual, optimizer: Optimizer) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss, _ = losses(net, data)
            loss.backward()
            return loss

        return closure

    # In evaluation mode the passes change no statistics, so that both see the same.
    model.eval(), train_on.eval()
    before = [p.detach().clone() for p in model.parameters()]
    alone = lbfgs(train_on)
    alone.step(closure_of(train_on, alone))
    optimizer = lbfgs(model)
    ogm.attach(optimizer)
    out = ogm.step(losses(model, data)[1], data[2])
    optimizer.step(closure_of(model, optimizer))
    k = out.coefficients.tolist()
    assert k[0] < 0.9
    for m, name in enumerate(("audio_net", "visual_net")):
        for (label, p), w0, w1 in zip(
            model.named_parameters(), before, train_on.parameters(), strict=True
        ):
            if label.startswith(name):
                assert_scaled(p, w0, w1.detach(), k[m])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_plain_sgd_it_is_the_gradient_that_is_scaled(cell: Cell, dtype: torch.dtype) -> None:
    rate = 0.1
    model = AudioVisual().to(cell.device, dtype)
    other = copy.deepcopy(model)
    data = tuple(t.to(cell.device) for t in batch())
    start = [p.detach().double() for p in model.parameters()]
    ks, alone = [], []
    for net, apply_to in ((model, "gradient"), (other, "update")):
        optimizer = SGD(net.parameters(), lr=rate)
        ogm = OGM(net.encoders, noise=False, apply_to=apply_to, backend=cell.backend)
        if apply_to == "update":
            ogm.attach(optimizer)
        loss, logits = losses(net, data)
        ks.append(ogm.backward(loss, logits, data[2]).coefficients.tolist())
        alone = [p.grad.double() for p in net.parameters()]
        optimizer.step()
    assert ks[0] == ks[1] and ks[0][0] < 0.9
    names = [name for name, _ in model.named_parameters()]
    u = UNIT_ROUNDOFF[dtype]
    for name, w0, g, by_gradient, by_update in zip(
        names, start, alone, model.parameters(), other.parameters(), strict=True
    ):
        modality = name.split("_")[0]
        k = {"audio": ks[0][0], "visual": ks[0][1]}.get(modality, 1.0)
        moved = rate * g.abs()
        stepped = w0 - rate * g
        expected = w0 - k * rate * g
        # Scaling the gradient rounds k·g, the product with the rate and the difference; scaling the
        # update rounds the latter two before, which enters k times, and then what `assert_scaled`
        # allows. The rate is a float64 that either side rounds to `dtype` once.
        zero = torch.zeros((), dtype=torch.float64, device=g.device)
        scaled = updated_grad(
            dtype, expected, stepped, (k - 1) * (stepped.abs() + w0.abs()), zero, zero
        )
        bound = (
            u * (3 * k * moved + expected.abs())
            + k * u * (2 * moved + stepped.abs())
            + UNIT_ROUNDOFF[torch.float32] * moved
            + scaled
        )
        assert_within(by_update, by_gradient, bound, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [False, True])
def test_outside_the_epochs_the_optimizer_is_left_alone(
    cell: Cell, dtype: torch.dtype, noise: bool
) -> None:
    model = Logits(SMALL).to(cell.device, dtype)
    spread = together(OPTIMIZERS["adam"])
    twin, optimizer = Twin(model, spread), spread(model)[0]
    ogm = OGM(model.encoders, apply_to="update", noise=noise, starts=1, backend=cell.backend)
    ogm.attach(optimizer)
    logits, labels = scores()
    ogm.set_epoch(0)
    model.set_gradients()
    before, alone = twin.step(model)
    out = ogm.step({n: z.to(cell.device) for n, z in logits.items()}, labels.to(cell.device))
    optimizer.step()
    assert out.coefficients.tolist() == [1.0, 1.0]
    for p, w0, w1 in zip(model.parameters(), before, alone, strict=True):
        assert torch.equal(p, w1) and not torch.equal(p, w0)
    assert ogm.stream.state[1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_modality_behind_is_left_alone(cell: Cell, dtype: torch.dtype) -> None:
    model = Logits(SMALL).to(cell.device, dtype)
    spread = together(OPTIMIZERS["adamw-foreach"])
    twin, optimizer = Twin(model, spread), spread(model)[0]
    ogm = OGM(model.encoders, apply_to="update", noise=False, backend=cell.backend)
    ogm.attach(optimizer)
    logits, labels = scores(ahead=1)
    model.set_gradients()
    before, alone = twin.step(model)
    out = ogm.step({n: z.to(cell.device) for n, z in logits.items()}, labels.to(cell.device))
    optimizer.step()
    k_a, k_b = out.coefficients.tolist()
    assert k_a == 1.0 and k_b < 0.9
    count = len(model.encoders["a"])
    for p, w1 in zip(model.encoders["a"], alone[:count], strict=True):
        assert torch.equal(p, w1)
    for p, w0, w1 in zip(model.encoders["b"], before[count:], alone[count:], strict=True):
        assert_scaled(p, w0, w1, k_b)


def noisy_steps(
    model: nn.Module,
    ogm: OGM,
    spread: Callable[[Any], list[Optimizer]],
    ids: list[int | None],
    steps: int,
) -> None:
    """Steps of OGM-GE on the updates, each compared with the twin and the stream's own numbers.

    `ids` holds each parameter's place among those that take part; None for those that do not.
    """
    twin, optimizers = Twin(model, spread), spread(model)
    for optimizer in optimizers:
        ogm.attach(optimizer)
    counted = ogm.modalities.modality
    for step in range(steps):
        logits, labels = scores(ahead=step % 2)
        model.set_gradients()
        before, alone = twin.step(model)
        stream = NoiseStream.from_state(ogm.stream.state.clone())
        device = ogm.modalities.device
        out = ogm.step({n: z.to(device) for n, z in logits.items()}, labels.to(device))
        for optimizer in optimizers:
            optimizer.step()
        k = out.coefficients.tolist()
        assert min(k) < 0.9
        for p, w0, w1, i in zip(model.parameters(), before, alone, ids, strict=True):
            if i is None:
                assert torch.equal(p, w1)
            elif p.numel() == 1:
                assert_scaled(p, w0, w1, k[counted[i]])
            else:
                assert_noisy(p, w0, w1, k[counted[i]], stream, i)
        assert bool(out.finite)
        assert ogm.stream.state.tolist() == [stream.state[0].item(), stream.state[1].item() + 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_is_that_of_the_stream_with_the_updates_deviation(
    cell: Cell, dtype: torch.dtype
) -> None:
    model = Logits(SMALL).to(cell.device, dtype)
    stream = NoiseStream(3, cell.device)
    stream.advance(6)
    ogm = OGM(model.encoders, apply_to="update", stream=stream, backend=cell.backend)
    noisy_steps(model, ogm, together(OPTIMIZERS["adamw"]), list(range(6)), steps=2)


def test_a_modality_that_no_sample_has_gets_no_noise() -> None:
    """As where gradients are changed; nor does one that the user's numbers leave out."""
    everybody = torch.ones(4, dtype=torch.bool)
    z = {name: torch.randn(4, 3) for name in SMALL}
    given = [
        {"present": {name: everybody & (m > 0) for m, name in enumerate(SMALL)}},
        {"coefficients": {name: 1.0 if m else torch.nan for m, name in enumerate(SMALL)}},
    ]
    for more in given:
        model = Logits(SMALL)
        plain = copy.deepcopy(model)
        ogm = OGM(model.encoders, apply_to="update", stream=NoiseStream(3))
        optimizers = [SGD(net.parameters(), lr=0.1) for net in (model, plain)]
        ogm.attach(optimizers[0])
        model.set_gradients()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = p.grad.clone()
        own = (z, torch.arange(4) % 3) if "present" in more else ()
        ogm.step(*own, **more)
        for optimizer in optimizers:
            optimizer.step()
        for m, name in enumerate(SMALL):
            pairs = zip(model.nets[name], plain.nets[name], strict=True)
            same = [torch.equal(p, q) for p, q in pairs if p.numel() > 1]
            assert all(same) if m == 0 else not any(same), (name, more)


def test_noise_goes_by_the_place_in_the_method_not_in_the_optimizer() -> None:
    model = Logits(SMALL)
    ogm = OGM(model.encoders, apply_to="update", select="matrix", stream=NoiseStream(4))

    def backwards(net: nn.Module) -> list[Optimizer]:
        return [Adam(list(net.parameters())[::-1], lr=0.01)]

    noisy_steps(model, ogm, backwards, [0, 1, None, 2, None, None], steps=2)


@pytest.mark.parametrize("reverse", [False, True])
def test_two_optimizers_take_one_step_of_the_stream(reverse: bool) -> None:
    """The noise does not depend on how the parameters are spread over optimizers."""

    def spread(net: nn.Module) -> list[Optimizer]:
        parameters = list(net.parameters())
        made = [Adam(parameters[::2], lr=0.01), Adam(parameters[1::2], lr=0.01)]
        return made[::-1] if reverse else made

    model = Logits(SMALL)
    ogm = OGM(model.encoders, apply_to="update", stream=NoiseStream(5))
    noisy_steps(model, ogm, spread, list(range(6)), steps=3)


def test_noise_reaches_parameters_in_another_memory_format() -> None:
    model = Logits({"a": ((4, 3, 5, 5), (6,)), "b": ((5, 2, 3, 3),)})
    model.to(memory_format=torch.channels_last)
    assert not model.encoders["a"][0].is_contiguous()
    ogm = OGM(model.encoders, apply_to="update", stream=NoiseStream(8))
    noisy_steps(model, ogm, together(OPTIMIZERS["adam"]), [0, 1, 2], steps=2)
    assert not model.encoders["a"][0].is_contiguous()


def test_noise_is_normal_with_the_deviation_of_each_update() -> None:
    """It is compared with the normal distribution, whatever stream it comes from."""
    n = 40_000
    model = Logits({"a": ((200, 200), (n,)), "b": ((n,),)}).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # then nothing is lost where a small update is added to a weight
    spread = together(lambda p: SGD(p, lr=0.1))
    twin, optimizer = Twin(model, spread), spread(model)[0]
    ogm = OGM(model.encoders, apply_to="update", stream=NoiseStream(6))
    ogm.attach(optimizer)
    model.set_gradients()
    for i, p in enumerate(model.parameters()):
        p.grad.mul_(10.0**i).add_(3 * 10.0**i)  # other deviations, and means that are no noise
    before, alone = twin.step(model)
    k = ogm.step(*scores()).coefficients.tolist()
    optimizer.step()
    found = []
    for p, w0, w1, m in zip(model.parameters(), before, alone, (0, 0, 1), strict=True):
        update = w1 - w0
        z = ((p.detach() - w0 - k[m] * update) / update.std()).flatten()
        # Five deviations of the mean, 1/√n, and of the variance, √(2/n), of n normal numbers.
        assert abs(z.mean().item()) < 5 / n**0.5
        assert abs(z.var().item() - 1) < 5 * (2 / n) ** 0.5
        # The fourth moment is 3, with variance 96/n: the noise is neither uniform nor heavy-tailed.
        assert abs(z.pow(4).mean().item() - 3) < 5 * (96 / n) ** 0.5
        found.append(z)
    # Correlations of independent numbers have the deviation 1/√n.
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs((found[i] * found[j]).mean().item()) < 5 / n**0.5


def test_single_elements_and_parameters_that_do_not_move_get_no_noise() -> None:
    model = Logits({"a": ((1,), (), (5, 4)), "b": ((3, 3), (8,), (6,), (2, 0))})
    optimizer = Adam(model.parameters(), lr=0.01)
    ogm = OGM(model.encoders, apply_to="update", stream=NoiseStream(9))
    ogm.attach(optimizer)
    one, scalar, moving = model.encoders["a"]
    without, frozen, late, _ = model.encoders["b"]
    frozen.requires_grad_(False)
    model.set_gradients()
    without.grad = frozen.grad = None
    late.grad.zero_()  # Adam does not move it either
    twin = Twin(model, together(lambda p: Adam(p, lr=0.01)))
    before, alone = twin.step(model)
    k = ogm.step(*scores()).coefficients.tolist()
    optimizer.step()
    assert k[0] < 0.9
    for p, w0, w1 in zip((one, scalar), before, alone, strict=False):
        assert_scaled(p, w0, w1, k[0])
    assert_noisy(moving, before[2], alone[2], k[0], NoiseStream(9), 2)
    for p, w0 in zip((without, frozen, late), before[3:], strict=False):
        assert torch.equal(p, w0)
    assert ogm.stream.state.tolist() == [9, 1]


def test_without_gradients_nothing_moves_and_nothing_is_drawn() -> None:
    model = Logits(SMALL)
    before = copy.deepcopy(model.state_dict())
    optimizer = Adam(model.parameters(), lr=0.01)
    ogm = OGM(model.encoders, apply_to="update")
    ogm.attach(optimizer)
    ogm.step(*scores())
    optimizer.step()  # no parameter has a gradient
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert ogm.stream.state[1] == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("noise", [False, True])
def test_a_step_that_a_scaler_skips_changes_nothing(fused: bool, noise: bool) -> None:
    """A fused optimizer is called and does nothing, others are not called."""
    model = Logits(SMALL)
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ogm = OGM(model.encoders, apply_to="update", noise=noise, stream=NoiseStream(2))
    ogm.attach(optimizer)

    def step() -> mmfuse.OGMResult:
        optimizer.zero_grad()
        logits, labels = scores()
        scaler.scale(sum((p * g).sum() for p, g in zip(parameters, grads, strict=True))).backward()
        out = ogm.step(logits, labels)
        scaler.step(optimizer)
        scaler.update()
        return out

    parameters = list(model.parameters())
    grads = [torch.randn_like(p) for p in parameters]
    first = grads[0][0, 0].clone()
    grads[0][0, 0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    step()
    assert scaler.get_scale() == 2.0  # it was skipped
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert ogm.stream.state.tolist() == [2, 0]

    grads[0][0, 0] = first
    out = step()
    assert scaler.get_scale() == 2.0
    assert not any(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert bool(out.finite)
    assert ogm.stream.state.tolist() == [2, 1 if noise else 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("ahead", [0, 1])
def test_an_update_that_is_not_finite_shows(
    cell: Cell, ahead: int, noise: bool, bad: float
) -> None:
    """The modality may have the factor one; the other tensors are not touched by it."""
    model = Logits(SMALL).to(cell.device)
    spread = together(lambda p: SGD(p, lr=0.1))
    twin, optimizer = Twin(model, spread), spread(model)[0]
    stream = NoiseStream(7, cell.device)
    ogm = OGM(model.encoders, apply_to="update", noise=noise, stream=stream, backend=cell.backend)
    ogm.attach(optimizer)
    model.set_gradients()
    model.encoders["a"][1].grad[0, 0, 0, 0] = bad
    before, alone = twin.step(model)
    logits, labels = scores(ahead)
    out = ogm.step({n: z.to(cell.device) for n, z in logits.items()}, labels.to(cell.device))
    assert bool(out.finite)  # nothing has happened yet
    optimizer.step()
    assert not bool(out.finite)
    assert stream.state.tolist() == [7, 0]
    k = out.coefficients.tolist()
    for i, (p, w0, w1) in enumerate(zip(model.parameters(), before, alone, strict=True)):
        if i == 1:
            assert not p[0, 0, 0, 0].isfinite()
        elif noise and p.numel() > 1:
            assert_noisy(p, w0, w1, k[i // 3], NoiseStream(7, cell.device), i)
        else:
            assert_scaled(p, w0, w1, k[i // 3])


@pytest.mark.parametrize("noise", [False, True])
def test_gradients_are_left_alone(noise: bool) -> None:
    model = AudioVisual()
    data = batch()
    optimizer = Adam(model.parameters(), lr=0.01)
    ogm = OGM(model.encoders, apply_to="update", noise=noise)
    ogm.attach(optimizer)
    loss, logits = losses(model, data)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    ogm.backward(loss, logits, data[2])
    optimizer.step()
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, g)


def test_the_scores_of_all_micro_batches_decide() -> None:
    model = Logits(SMALL)
    optimizer = Adam(model.parameters(), lr=0.01)
    ogm = OGM(model.encoders, apply_to="update", noise=False)
    ogm.attach(optimizer)
    first, second = scores(0), scores(1)
    ogm.observe(*first)
    out = ogm.step(*second)
    # Both modalities were ahead once, in micro-batches of one size.
    assert out.coefficients.tolist() == [1.0, 1.0]
    assert out.scores[0] == out.scores[1]
    optimizer.step()


def test_a_model_that_is_cast_in_between_keeps_its_precision() -> None:
    model = Logits(SMALL)
    spread = together(lambda p: SGD(p, lr=0.1))
    optimizer = spread(model)[0]
    ogm = OGM(model.encoders, apply_to="update", noise=False)
    ogm.attach(optimizer)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()  # numbers that the last dtype cannot hold
        model.set_gradients()
        before, alone = Twin(model, spread).step(model)
        k = ogm.step(*scores()).coefficients.tolist()
        optimizer.step()
        for i, (p, w0, w1) in enumerate(zip(model.parameters(), before, alone, strict=True)):
            assert_scaled(p, w0, w1, k[i // 3])


def test_parameters_that_the_optimizer_gets_later_are_scaled() -> None:
    """Until then their encoder is frozen."""
    model = Logits(SMALL)
    model.encoders["a"].requires_grad_(False)
    optimizer = SGD(model.encoders["b"].parameters(), lr=0.1)
    ogm = OGM(model.encoders, apply_to="update", noise=False)
    ogm.attach(optimizer)
    for added in (False, True):
        if added:
            optimizer.add_param_group({"params": model.encoders["a"].parameters()})
            model.encoders["a"].requires_grad_(True)
        model.set_gradients()
        before = [p.detach().clone() for p in model.parameters()]
        alone = [p.detach() - 0.1 * p.grad for p in model.parameters()]
        k = ogm.step(*scores()).coefficients.tolist()
        optimizer.step()
        assert k[0] < 0.9
        for i, (p, w0, w1) in enumerate(zip(model.parameters(), before, alone, strict=True)):
            if i >= 3:
                assert torch.equal(p, torch.add(w0, p.grad, alpha=-0.1))
            elif added:
                # The product with the rate may be rounded or not before the difference.
                once = UNIT_ROUNDOFF[torch.float32] * (0.1 * p.grad.abs() + w1.abs())
                expected = w0 + k[0] * (w1 - w0)
                zero = torch.zeros(())
                pulled = (k[0] - 1) * (w1.abs() + w0.abs())
                scaled = updated_grad(torch.float32, expected, w1, pulled, zero, zero)
                # `expected` is float32 arithmetic itself: as many roundings again.
                assert_within(p, expected, 2 * (once + scaled) + UNDERFLOW[torch.float32])
            else:
                assert torch.equal(p, w0)


def test_an_interrupted_run_goes_on_with_the_same_numbers() -> None:
    def parts(net: Logits) -> tuple[Optimizer, OGM]:
        optimizer = Adam(net.parameters(), lr=0.01)
        ogm = OGM(net.encoders, apply_to="update", stream=NoiseStream(1))
        ogm.attach(optimizer)
        return optimizer, ogm

    def step(net: Logits, optimizer: Optimizer, ogm: OGM, grads: list[Tensor]) -> None:
        for p, g in zip(net.parameters(), grads, strict=True):
            p.grad = g.clone()
        ogm.step(*scores())
        optimizer.step()

    model = Logits(SMALL)
    grads = [[torch.randn_like(p) for p in model.parameters()] for _ in range(4)]
    optimizer, ogm = parts(model)
    for mine in grads[:2]:
        step(model, optimizer, ogm, mine)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), ogm.state_dict()))
    for mine in grads[2:]:
        step(model, optimizer, ogm, mine)

    resumed = Logits(SMALL)
    optimizer, ogm = parts(resumed)
    for part, state in zip((resumed, optimizer, ogm), saved, strict=True):
        part.load_state_dict(state)
    for mine in grads[2:]:
        step(resumed, optimizer, ogm, mine)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


# Mistakes are refused, and then nothing has changed.


def test_attach_is_for_updates() -> None:
    model = Logits(SMALL)
    with pytest.raises(ValueError, match='apply_to="update"'):
        OGM(model.encoders).attach(SGD(model.parameters(), lr=0.1))


def test_apply_to_is_checked() -> None:
    with pytest.raises(ValueError, match="apply_to must be 'gradient' or 'update', got 'weights'"):
        OGM(Logits(SMALL).encoders, apply_to="weights")


def test_noise_from_a_callable_is_for_gradients() -> None:
    with pytest.raises(ValueError, match="noise from a callable is for gradients"):
        OGM(Logits(SMALL).encoders, apply_to="update", noise=torch.randn_like)


def test_an_optimizer_is_attached_once() -> None:
    model = Logits(SMALL)
    spread = together(lambda p: SGD(p, lr=0.1))
    twin, optimizer = Twin(model, spread), spread(model)[0]
    ogm = OGM(model.encoders, apply_to="update", noise=False)
    ogm.attach(optimizer)
    with pytest.raises(ValueError, match="this SGD is attached already"):
        ogm.attach(optimizer)
    model.set_gradients()
    before, alone = twin.step(model)
    k = ogm.step(*scores()).coefficients.tolist()
    optimizer.step()
    assert_scaled(model.encoders["a"][0], before[0], alone[0], k[0])  # once, not k²


def test_a_detached_optimizer_is_left_alone() -> None:
    model = Logits(SMALL)
    spread = together(lambda p: SGD(p, lr=0.1))
    twin, optimizer = Twin(model, spread), spread(model)[0]
    ogm = OGM(model.encoders, apply_to="update", noise=False)
    with pytest.raises(ValueError, match="this SGD is not attached"):
        ogm.detach(optimizer)
    ogm.attach(optimizer)
    ogm.detach(optimizer)
    model.set_gradients()
    _, alone = twin.step(model)
    optimizer.step()  # without a decision, which an attached one would ask for
    assert torch.equal(model.encoders["a"][0], alone[0])
    with pytest.raises(RuntimeError, match=r"pass the optimizer to attach\(\)"):
        ogm.step(*scores())


def test_an_optimizer_without_encoders_is_refused() -> None:
    model = AudioVisual()
    head = SGD(model.fc.parameters(), lr=0.1)
    ogm = OGM(model.encoders, apply_to="update")
    with pytest.raises(ValueError, match="this SGD has no parameter of the encoders"):
        ogm.attach(head)
    # No hook is left behind.
    head.step()
    # Parameters that `select` leaves out are none of the encoders' here.
    vectors = Adam([p for p in model.audio_net.parameters() if p.dim() == 1], lr=0.1)
    with pytest.raises(ValueError, match="this Adam has no parameter of the encoders"):
        OGM(model.encoders, apply_to="update", select="matrix").attach(vectors)


@pytest.mark.parametrize("wrong", [None, "adam", Adam])
def test_what_is_no_optimizer_is_refused(wrong: object) -> None:
    ogm = OGM(Logits(SMALL).encoders, apply_to="update")
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=f"expected a torch.optim.Optimizer, got {kind}"):
        ogm.attach(wrong)


def test_a_step_without_a_decision_changes_nothing() -> None:
    model = Logits(SMALL)
    optimizer = Adam(model.parameters(), lr=0.01)
    ogm = OGM(model.encoders, apply_to="update")
    ogm.attach(optimizer)
    message = r"OGM with apply_to=\"update\" has not decided .* before every optimizer.step\(\)"
    for decided in (0, 1):
        model.set_gradients()
        if decided:
            ogm.step(*scores())
            optimizer.step()
        before = copy.deepcopy(model.state_dict())
        state = copy.deepcopy(optimizer.state_dict()["state"])
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
        now = optimizer.state_dict()["state"]
        assert now.keys() == state.keys() and len(now) == 6 * decided
        assert all(torch.equal(v, state[i][key]) for i in now for key, v in now[i].items())
    assert ogm.stream.state[1] == 1


def test_a_decision_without_an_optimizer_is_refused() -> None:
    model = AudioVisual()
    data = batch()
    ogm = OGM(model.encoders, apply_to="update")
    loss, logits = losses(model, data)
    message = r"pass the optimizer to attach\(\) first"
    with pytest.raises(RuntimeError, match=message):
        ogm.step(logits, data[2])
    with pytest.raises(RuntimeError, match=message):
        ogm.backward(loss, logits, data[2])
    assert all(p.grad is None for p in model.parameters())
    ogm.attach(Adam(model.parameters()))
    with pytest.raises(RuntimeError, match="nothing was observed"):
        ogm.step()  # the refused call has left nothing behind


@pytest.mark.parametrize("ahead", ["a", "b"])
def test_an_encoder_whose_optimizer_is_not_attached_is_named(ahead: str) -> None:
    """Its updates would not be scaled, whatever is decided."""
    model = Logits(SMALL)
    first, second = (Adam(model.encoders[name].parameters(), lr=0.01) for name in "ab")
    ogm = OGM(model.encoders, apply_to="update")
    ogm.attach(second if ahead == "a" else first)
    model.set_gradients()
    message = rf"no attached optimizer has a parameter of the encoder of '{ahead}'.* to attach\(\)"
    for verb in (ogm.step, ogm.observe):
        with pytest.raises(RuntimeError, match=message):
            verb(*scores())
    with pytest.raises(RuntimeError, match=message):
        ogm.backward(torch.ones(1, requires_grad=True).sum(), *scores())
    assert ogm.stream.state[1] == 0
    # All ways out.
    model.encoders[ahead].requires_grad_(False)
    ogm.step(*scores())
    model.encoders[ahead].requires_grad_(True)
    ogm.attach(first if ahead == "a" else second)
    ogm.step(*scores())
    ogm.detach(first if ahead == "a" else second)
    with pytest.raises(RuntimeError, match=message):
        ogm.step(*scores())


MOVED = r"parameters have moved since the last decision, but the attached {} that has them has not"


@pytest.mark.parametrize("make", ["sgd", "adam-foreach", "adamw"])
@pytest.mark.parametrize("rebuilt", ["a", "b"])
def test_an_optimizer_that_was_made_anew_is_missed(rebuilt: str, make: str) -> None:
    """The attached one steps no more; the new one's updates are not scaled. It is said once."""
    model = Logits(SMALL)
    optimizers = {name: OPTIMIZERS[make](net.parameters()) for name, net in model.encoders.items()}
    ogm = OGM(model.encoders, apply_to="update")
    for optimizer in optimizers.values():
        ogm.attach(optimizer)
    kind = type(optimizers["a"]).__name__
    for step in range(5):
        if step == 2:
            old = optimizers[rebuilt]
            optimizers[rebuilt] = OPTIMIZERS[make](model.encoders[rebuilt].parameters())
        model.set_gradients()
        if step == 3:
            with pytest.warns(RuntimeWarning, match=MOVED.format(kind)):
                ogm.step(*scores())
        else:
            ogm.step(*scores())
        for optimizer in optimizers.values():
            optimizer.step()
    ogm.detach(old)
    ogm.attach(optimizers[rebuilt])
    with pytest.raises(RuntimeError, match="has not decided"):
        optimizers[rebuilt].step()


def test_decisions_that_wait_for_a_step_are_no_mistake() -> None:
    """Optimizers that take turns or step rarely, skipped steps, a copy, a frozen encoder."""
    model = Logits(SMALL)
    first, second = (Adam(model.encoders[name].parameters(), lr=0.01) for name in "ab")
    ogm = OGM(model.encoders, apply_to="update")
    ogm.attach(first)
    ogm.attach(second)
    for turn in range(6):
        model.set_gradients()
        ogm.step(*scores())
        if turn % 3:
            (first if turn % 2 else second).step()
    ogm.step(*scores())
    ogm.step(*scores())
    first.step()
    other, copied, _ = copy.deepcopy((model, ogm, first))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)  # a copy's parameters count from anew
    copied.step(*scores())
    model.encoders["b"].requires_grad_(False)
    ogm.step(*scores())
    first.step()
    ogm.step(*scores())


def test_one_parameter_in_two_optimizers_that_take_turns() -> None:
    model = Logits(SMALL)
    ogm = OGM(model.encoders, apply_to="update")
    both = [Adam(model.parameters(), lr=0.01), SGD(model.parameters(), lr=0.01)]
    for optimizer in both:
        ogm.attach(optimizer)
    for turn in range(4):
        model.set_gradients()
        ogm.step(*scores())
        both[turn % 2].step()


def test_a_closure_that_decides_several_times() -> None:
    model = Logits(SMALL)
    ogm = OGM(model.encoders, apply_to="update")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)
    ogm.attach(optimizer)
    decided = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        loss.backward()
        decided.append(ogm.step(*scores()))
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert len(decided) > 4


def _sharded_steps(rank: int, bad: int | None) -> list[Any]:
    """Two steps under FSDP2, of which the first may have a NaN in a tensor of one row."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(11)
    model = nn.ModuleDict({"a": nn.Linear(4, 1, bias=False), "b": nn.Linear(4, 6)})
    whole = copy.deepcopy(model)
    for part in model.values():
        fully_shard(part)
    optimizer = SGD(model.parameters(), lr=0.1)
    ogm = OGM(dict(model), apply_to="update", stream=NoiseStream(12))
    ogm.attach(optimizer)
    seen: list[Any] = []
    for step in range(2):
        optimizer.zero_grad()
        x = torch.ones(2, 4) * (1 + torch.arange(4))
        if step == bad:
            x[0, 0] = float("nan")
        y = torch.ones(2, 4)
        (model["a"](x).sum() + (model["b"](y) * torch.arange(6.0)).sum()).backward()
        out = ogm.step(*scores())
        optimizer.step()
        seen.append((bool(out.finite), ogm.stream.state.tolist()))
    full = [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]
    return [seen, full, [p.detach() for p in whole.parameters()]]


@pytest.mark.parametrize("bad", [None, 0])
def test_ranks_agree_on_the_stream_whoever_holds_the_nan(bad: int | None) -> None:
    """The tensor of one row is on the first rank alone, the second has no element of it."""
    first, second = ranks.ranks(2).run(_sharded_steps, bad)
    assert first[0] == second[0]
    wanted = [(True, [12, 1]), (True, [12, 2])] if bad is None else [(False, [12, 0])]
    assert first[0][: len(wanted)] == wanted
    for p, q in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


def test_a_closure_may_decide_within_the_step() -> None:
    """Lightning's closure does so: the whole training step runs in it."""
    model = Logits(SMALL)
    spread = together(OPTIMIZERS["adamw"])
    twin, optimizer = Twin(model, spread), spread(model)[0]
    ogm = OGM(model.encoders, apply_to="update", noise=False)
    ogm.attach(optimizer)
    model.set_gradients()
    before, alone = twin.step(model)
    seen = []

    def closure() -> Tensor:
        seen.append(ogm.step(*scores()).coefficients.tolist())
        return torch.zeros(())

    optimizer.step(closure)
    assert len(seen) == 1 and seen[0][0] < 0.9
    for i, (p, w0, w1) in enumerate(zip(model.parameters(), before, alone, strict=True)):
        assert_scaled(p, w0, w1, seen[0][i // 3])


def test_a_step_that_moves_nothing_needs_no_decision() -> None:
    """With the rate 0 a checkpoint is loaded into a new optimizer: it makes the state so."""
    model = Logits(SMALL)
    optimizer = Adam(model.parameters(), lr=0.0)
    ogm = OGM(model.encoders, apply_to="update")
    ogm.attach(optimizer)
    model.set_gradients()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert len(optimizer.state) == 6
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert ogm.stream.state[1] == 0
