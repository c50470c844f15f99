"""Mixed precision: real autocast, real GradScalers, fused optimizers and clipping, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from balancing import (
    ANCHORED,
    IN_FORWARD,
    KINDS,
    NEEDS,
    NOISY,
    ON_GRADIENTS,
    ON_UPDATES,
    STATEFUL,
    TWO_GRADIENTS,
    Shown,
    arguments,
    balance,
    make,
    see,
    show,
    start,
    strength,
)
from cells import Cell
from epochs import next_epoch
from networks import AudioVisual, batch
from states import differences
from tolerances import (
    UNIT_ROUNDOFF,
    assert_within,
    growth,
    noise,
    softmax_score,
)
from torch import Tensor, nn

import mmfuse
from mmfuse import NoiseStream

U = UNIT_ROUNDOFF[torch.float32]
AUTOCAST = [torch.bfloat16, torch.float16]
# Without the 1e-8 that is added to the noise's standard deviation, which is not scaled.
EXACT = [kind for kind in KINDS if kind not in NOISY]

Data = tuple[Tensor, Tensor, Tensor]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def fused_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=True)


def fused_adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


def fused_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def scaler_of(scale: float = 2.0**10, *, enabled: bool = True) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, enabled=enabled)


# The parameter, the element of its gradient, and what that becomes.
Spoil = tuple[str, tuple[int, ...], float] | None
INF_IN_ENCODER: Spoil = ("visual_net.conv2.weight", (0, 0, 1, 1), torch.inf)
NAN_IN_ENCODER: Spoil = ("audio_net.bn1.bias", (2,), torch.nan)
INF_IN_HEAD: Spoil = ("fc.weight", (0, 0), -torch.inf)


@contextmanager
def spoiled(model: nn.Module, spoil: Spoil) -> Iterator[None]:
    """Gradients with the Inf or the NaN that a backward pass may make."""
    if spoil is None:
        yield
        return
    name, place, value = spoil

    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[place] = value
        return gradient

    handle = model.get_parameter(name).register_hook(hook)
    yield
    handle.remove()


class Trainer:
    """A model, one method, an optimizer and a scaler; `step` is a user's training step."""

    def __init__(
        self,
        kind: str,
        model: AudioVisual,
        make_optimizer: MakeOptimizer = sgd,
        *,
        scaler: torch.amp.GradScaler | None = None,
        dtype: torch.dtype | None = torch.bfloat16,
        **options: Any,
    ) -> None:
        self.kind = kind
        self.model = copy.deepcopy(model)
        self.dtype = dtype
        self.scaler = scaler or scaler_of(enabled=False)
        self.optimizer = make_optimizer(list(self.model.parameters()))
        self.method = make(kind, self.model.encoders, stream=NoiseStream(5), **options)
        self.regulated = 0.0

    def warm_up(self, data: list[Data], **how: Any) -> None:
        """Two epochs of one step each, and the start of a third one: InfoReg's window is open."""
        for item in data[:2]:
            next_epoch(self.method)
            self.step(item, **how)
        next_epoch(self.method)

    def forward(self, data: Data) -> Shown:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            a, v = self.model.features(data[0], data[1])
            inputs = {"audio": data[0], "visual": data[1]}
            seen = see(self.model.fc, {"audio": a, "visual": v}, inputs, data[2])
            return show(self.method, self.model.fc, seen)

    def backward(self, data: Data) -> Shown:
        """Forward and scaled backward pass."""
        shown = self.forward(data)
        self.scaler.scale(shown.loss).backward()
        return shown

    def step(
        self, data: Data, *, way: str = "unscale first", spoil: Spoil = None, found: bool = False
    ) -> Any:
        """One step; `way` says when the gradients are unscaled, `spoil` what becomes infinite.

        A method that makes the backward passes acts in them, before anything can be unscaled.
        """
        shown = self.forward(data)
        more: dict[str, Any] = {}

        def unscale() -> dict[str, Any]:
            if way == "unscale first":
                self.scaler.unscale_(self.optimizer)
            return {"found_inf": mmfuse.amp.found_inf(self.scaler, self.optimizer)} if found else {}

        if way != "unscale first" and self.kind in (*ANCHORED, *TWO_GRADIENTS):
            more["grad_scale"] = mmfuse.amp.grad_scale(self.scaler, "cpu")
        with spoiled(self.model, spoil):
            between = None if self.kind in TWO_GRADIENTS else unscale
            out = balance(self.method, shown, scale=self.scaler.scale, between=between, **more)
        self.regulated += strength(self.method, shown.seen, out)
        if way == "unscale after" or (between is None and way == "unscale first"):
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return out

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def state(self) -> dict[str, Any]:
        """The method's whole state, copied."""
        return copy.deepcopy(dict(self.method.state_dict()))


def assert_same(a: Trainer, b: Trainer) -> None:
    named = zip(a.model.named_parameters(), b.model.parameters(), strict=True)
    assert [name for (name, p), q in named if not torch.equal(p, q)] == []
    assert differences(a.state(), b.state()) == []


# A power of two, by which nothing rounds in float32 or bfloat16; 2**-40 of fp16's is normal too.
SCALE = 2.0**16


@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
def test_noise_has_the_right_scale_before_and_after_unscaling(
    cell: Cell, dtype: torch.dtype
) -> None:
    """Its standard deviation is taken from the gradients as they are, scaled or not."""
    if cell.device != "cpu":
        pytest.skip("the GradScaler under test is that of the CPU")
    cell.skip_slow(dtype == torch.float16)
    model, data = AudioVisual(), batch()
    lr, results, gradients = 0.1, [], []

    def plain_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr)

    for way in ("unscale first", "unscale after"):
        trainer = Trainer(
            "OGM-GE", model, plain_sgd, scaler=scaler_of(SCALE), dtype=dtype, backend=cell.backend
        )
        trainer.step(data, way=way)
        results.append(trainer.parameters())
        gradients.append([p.grad for p in trainer.model.parameters()])
        assert trainer.regulated > 0
        assert trainer.method.stream.state.tolist() == [5, 1]
    plain = Trainer("OGM-GE", model, plain_sgd, scaler=scaler_of(SCALE), dtype=dtype)
    plain.backward(data)
    plain.scaler.unscale_(plain.optimizer)
    ids = {id(p): i for i, p in enumerate(plain.method.modalities.parameters)}
    for p, g1, g2, w1, w2 in zip(plain.model.parameters(), *gradients, *results, strict=True):
        if id(p) not in ids:  # the head
            assert torch.equal(w1, w2)
            continue
        z = NoiseStream(5).normal(p.numel(), ids[id(p)]).view_as(p)
        z = z.abs() + noise(z)
        std = p.grad.std() + 1e-8
        # Both sides are the same arithmetic times a power of two, but for the 1e-8 that is added to
        # std: it differs by 1e-8 (1 - 1/scale), the sum and its product with z round differently,
        # and so does the gradient's sum with the noise.
        bound = 1e-8 * z + 2 * U * (2 * std * z + g1.abs())
        assert_within(g2, g1, bound, "gradient")
        # w - lr g rounds the product and the difference, on either side.
        bound = lr * bound + 2 * U * (lr * g1.abs() + w1.abs())
        assert_within(w2, w1, bound, "parameter")
        # Not vacuous: noise that does not scale along is off by nearly a whole std.
        assert float(bound.max()) < lr * 0.01 * float(std)


def test_autocast_logits_are_scored(cell: Cell) -> None:
    for dtype in AUTOCAST:
        trainer = Trainer("OGM-GE", AudioVisual(), dtype=dtype, backend=cell.backend)
        trainer.model.to(cell.device)
        data = batch()
        with torch.autocast(cell.device, dtype):
            a, v, _ = trainer.model(data[0].to(cell.device), data[1].to(cell.device))
            logits = mmfuse.unimodal_logits(trainer.model.fc, {"audio": a, "visual": v})
        assert {z.dtype for z in logits.values()} == {dtype}
        trainer.model.requires_grad_(False)  # there is nothing but scores
        out = trainer.method.step(logits, data[2].to(cell.device))
        for m, z in enumerate(logits.values()):
            log_p = z.detach().cpu().double().log_softmax(1)[range(12), data[2]]
            # The logits are taken as they are; the scores are formed in float32.
            per_row = log_p.exp() * (1 + log_p.abs())
            bound = softmax_score(torch.float32, per_row, 5)
            assert_within(out.scores[m], log_p.exp().mean(), bound, f"score {m}, {dtype}")


@pytest.mark.parametrize("kind", EXACT)
def test_a_scaled_run_is_the_unscaled_one_bit_for_bit(kind: str) -> None:
    """Displacements do not scale with the loss: `grad_scale` makes up for it."""
    model, data = AudioVisual(), [batch() for _ in range(6)]
    runs = {}
    # bfloat16 has float32's exponents: a scale that is a power of two rounds nothing anywhere.
    for way, scaler in {
        "unscaled": scaler_of(enabled=False),
        "unscale first": scaler_of(),
        "unscale after": scaler_of(),
    }.items():
        run = runs[way] = Trainer(kind, model, scaler=scaler)
        run.warm_up(data, way=way)
        for item in data[2:]:
            run.step(item, way=way)
        assert run.regulated > 0
    assert_same(runs["unscale first"], runs["unscaled"])
    assert_same(runs["unscale after"], runs["unscaled"])


@pytest.mark.parametrize("make_optimizer", [fused_sgd, fused_adam, fused_adamw])
@pytest.mark.parametrize("kind", EXACT)
def test_fused_optimizers_that_unscale_on_their_own(
    kind: str, make_optimizer: MakeOptimizer
) -> None:
    model, data = AudioVisual(), [batch() for _ in range(5)]
    runs = []
    for scaler in (scaler_of(enabled=False), scaler_of()):
        run = Trainer(kind, model, make_optimizer, scaler=scaler)
        assert run.optimizer.param_groups[0]["fused"]
        run.warm_up(data, way="fused")
        for item in data[2:]:
            run.step(item, way="fused")
        assert run.regulated > 0
        runs.append(run)
    # The kernel divides by a power of two: bit for bit.
    assert_same(*runs)


@pytest.mark.parametrize("kind", EXACT)
def test_fp16_autocast_with_a_fused_optimizer(kind: str) -> None:
    """fp16's gradients underflow differently without a scale: compare the two ways of unscaling."""
    model, data = AudioVisual(), [batch() for _ in range(5)]
    runs = []
    for way in ("unscale first", "fused"):
        run = Trainer(kind, model, fused_sgd, scaler=scaler_of(), dtype=torch.float16)
        run.warm_up(data, way=way)
        for item in data[2:]:
            run.step(item, way=way)
        assert run.regulated > 0
        runs.append(run)
    assert_same(*runs)


@pytest.mark.parametrize("fused", [fused_sgd, fused_adam, fused_adamw])
@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_fused_optimizers_are_the_others_but_for_rounding(
    fused: MakeOptimizer, apply_to: str
) -> None:
    """One step from the same weights."""
    plain = {
        fused_sgd: sgd,
        fused_adam: lambda ps: torch.optim.Adam(ps, lr=0.01),
        fused_adamw: lambda ps: torch.optim.AdamW(ps, lr=0.01),
    }[fused]
    model, data = AudioVisual(), batch()
    after = []
    for make_optimizer in (plain, fused):
        kind = "OGM-GE" if apply_to == "gradient" else "OGM"
        run = Trainer(kind, model, make_optimizer, apply_to=apply_to)
        if apply_to == "update":
            run.method.attach(run.optimizer)
        run.step(data)
        assert run.regulated > 0
        after.append(run.parameters())
    for w0, w1, w2 in zip(model.parameters(), *after, strict=True):
        # Adam's update is at most lr = 0.01, and takes 12 roundings or fewer (two averages, square,
        # root, two bias corrections, two divisions, epsilon, product); SGD's takes three, of which
        # one is the weight decay's. w - update rounds once, decoupled decay twice, k times the
        # update, where it is applied, twice more.
        update = (w1 - w0).abs() + 0.05 * 1e-3 * w0.abs()
        bound = 2 * U * (14 * update + 5 * (w0.abs() + w1.abs()))
        assert_within(w2, w1, bound, "parameter")


WAYS = [
    ("unscale first", sgd),
    ("unscale after", sgd),
    ("scaler does it", sgd),
    ("fused", fused_sgd),
    ("fused", fused_adam),
]


def advanced(kind: str) -> list[str]:
    """The entries of the state that a skipped step still advances.

    The host does not know of the skip: the number of calls, after which RedReg monitors every k-th.
    """
    return ["state.step"] if NEEDS[kind].draws else []


@pytest.mark.parametrize(
    ("kind", "way", "make_optimizer"),
    # See above for the noise: what is added to std depends on the scale, which the skip halves.
    [(k, *w) for k in ON_GRADIENTS for w in WAYS if k not in NOISY or w[0] == "unscale first"],
)
def test_a_skipped_step_has_not_been(kind: str, way: str, make_optimizer: MakeOptimizer) -> None:
    """Parameters and the method's whole state stay, and training goes on as if it had not been."""
    model, data = AudioVisual(), [batch() for _ in range(5)]
    run = Trainer(kind, model, make_optimizer, scaler=scaler_of())
    other = Trainer(kind, model, make_optimizer, scaler=scaler_of())
    for each in (run, other):
        each.warm_up(data, way=way)
        each.step(data[2], way=way)
    for spoil in (INF_IN_ENCODER, NAN_IN_ENCODER):
        parameters, state, scale = run.parameters(), run.state(), run.scaler.get_scale()
        statistics = copy.deepcopy(dict(run.model.named_buffers()))
        out = run.step(data[3], way=way, spoil=spoil)
        assert not bool(out.finite)
        assert run.scaler.get_scale() == scale / 2
        assert differences(run.state(), state) == advanced(kind)
        assert differences(run.parameters(), parameters) == []
        # Batch norm has seen the batch in the forward pass; that is not the method's to undo.
        run.model.load_state_dict(statistics, strict=False)
    for each in (run, other):
        each.step(data[4], way=way)
    assert run.regulated > other.regulated > 0  # the skipped steps decided something too
    assert differences(run.parameters(), other.parameters()) == []
    a, b = run.state(), other.state()
    if advanced(kind):
        assert (a.pop("step"), b.pop("step")) == (6, 4)
    assert differences(a, b) == []


@pytest.mark.parametrize("kind", ON_GRADIENTS)
def test_a_step_that_overflows_fp16_is_skipped(kind: str) -> None:
    """The test plants nothing: the scale is so large that the backward pass leaves fp16's range."""
    model, data = AudioVisual(), [batch() for _ in range(3)]
    run = Trainer(kind, model, scaler=scaler_of(2.0**40), dtype=torch.float16)
    next_epoch(run.method)
    state = run.state()
    for item in data:
        out = run.step(item)
        assert not bool(out.finite)
    assert run.scaler.get_scale() == 2.0**37
    run.model.load_state_dict(dict(model.named_buffers()), strict=False)
    assert differences(run.parameters(), [p.detach() for p in model.parameters()]) == []
    assert differences(run.state(), state) == advanced(kind)
    run.scaler.update(2.0**8)
    assert bool(run.step(data[0]).finite)
    assert (differences(run.state(), state) != []) == (kind in STATEFUL)


@pytest.mark.parametrize("kind", [kind for kind in STATEFUL if kind not in TWO_GRADIENTS])
def test_an_inf_in_the_head_needs_found_inf(kind: str) -> None:
    """No method looks at the head; the scaler does, and `found_inf` says what it has found."""
    model, data = AudioVisual(), [batch() for _ in range(4)]
    run = Trainer(kind, model, scaler=scaler_of())
    run.warm_up(data, found=True)
    parameters, state = run.parameters(), run.state()
    out = run.step(data[2], spoil=INF_IN_HEAD, found=True)
    assert bool(out.finite)  # the encoders' gradients are
    assert differences(run.state(), state) == advanced(kind)
    assert differences(run.parameters(), parameters) == []
    run.step(data[2], spoil=INF_IN_HEAD, found=False)
    counted = set(differences(run.state(), state))
    assert counted > set(advanced(kind))
    assert differences(run.parameters(), parameters) == []
    # Without an Inf anywhere, `found_inf` changes nothing.
    state = run.state()
    run.step(data[3], found=True)
    assert set(differences(run.state(), state)) >= counted


@pytest.mark.parametrize("kind", ON_GRADIENTS)
def test_found_inf_in_backward(kind: str) -> None:
    run = Trainer(kind, AudioVisual())
    start(run.method)
    for found in (torch.tensor(1.0), torch.tensor(0.0), None):
        shown, state = run.forward(batch()), run.state()
        seen = arguments(run.method, shown.seen)
        losses = shown.unimodal_losses
        run.method.backward(shown.loss, **seen, unimodal_losses=losses, found_inf=found)
        counts = kind in STATEFUL and not (found is not None and found)
        after = [d for d in differences(run.state(), state) if d not in advanced(kind)]
        assert bool(after) == counts


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_what_acts_in_the_forward_pass_has_acted_before_a_step_is_skipped(kind: str) -> None:
    model, data = AudioVisual(), [batch() for _ in range(3)]
    run = Trainer(kind, model, scaler=scaler_of())
    run.warm_up(data)
    parameters, state = run.parameters(), run.state()
    run.step(data[2], spoil=INF_IN_ENCODER)
    assert differences(run.parameters(), parameters) == []
    skipped = differences(run.state(), state)
    # A step that counts changes the same: nothing where a schedule goes by the epoch, or where
    # prototypes are taken between epochs.
    run.step(data[1])
    assert differences(run.parameters(), parameters)
    assert differences(run.state(), state) == skipped


def test_disabled_scalers() -> None:
    model, data = AudioVisual(), [batch() for _ in range(4)]
    scaler = scaler_of(enabled=False)
    one = mmfuse.amp.grad_scale(scaler, "cpu")
    assert (one.shape, one.dtype, one.tolist()) == ((), torch.float32, 1.0)
    assert mmfuse.amp.found_inf(scaler, sgd(list(model.parameters()))) is None
    for kind in KINDS:
        runs = []
        for way, found in (("unscale first", True), ("unscale after", False)):
            run = Trainer(kind, model, scaler=scaler_of(enabled=False))
            run.warm_up(data, way=way, found=found)
            run.step(data[2], way=way, found=found)
            runs.append(run)
        assert_same(*runs)


def test_what_a_scaler_knows() -> None:
    run = Trainer("OGM-GE", AudioVisual(), scaler=scaler_of(2.0**7))
    assert mmfuse.amp.grad_scale(run.scaler, torch.device("cpu")).tolist() == 128.0
    with pytest.raises(RuntimeError, match=r"call scaler.unscale_\(optimizer\) first"):
        mmfuse.amp.found_inf(run.scaler, run.optimizer)
    data = batch()
    run.backward(data)
    with pytest.raises(RuntimeError, match=r"call scaler.unscale_\(optimizer\) first"):
        mmfuse.amp.found_inf(run.scaler, run.optimizer)
    run.scaler.unscale_(run.optimizer)
    assert mmfuse.amp.found_inf(run.scaler, run.optimizer).tolist() == 0.0
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.backward(data)
    with pytest.raises(RuntimeError, match=r"call scaler.unscale_\(optimizer\) first"):
        mmfuse.amp.found_inf(run.scaler, run.optimizer)
    run.model.fc.weight.grad[0, 0] = -torch.inf
    run.scaler.unscale_(run.optimizer)
    assert mmfuse.amp.found_inf(run.scaler, run.optimizer).tolist() == 1.0


@pytest.mark.parametrize("kind", ON_UPDATES)
@pytest.mark.parametrize("make_optimizer", [sgd, fused_sgd, fused_adam, fused_adamw])
def test_skipped_updates_are_left_alone(make_optimizer: MakeOptimizer, kind: str) -> None:
    """A fused optimizer's step is called and moves nothing; the other's is not called."""
    model, data = AudioVisual(), [batch() for _ in range(4)]
    fused = make_optimizer is not sgd
    way = "fused" if fused else "unscale first"
    runs = []
    for skips in (True, False):
        run = Trainer(kind, model, make_optimizer, scaler=scaler_of(), apply_to="update")
        run.method.attach(run.optimizer)
        run.step(data[0], way=way)
        if skips:
            statistics = copy.deepcopy(dict(run.model.named_buffers()))
            for spoil in (INF_IN_ENCODER, INF_IN_HEAD):
                parameters, state = run.parameters(), run.state()
                run.step(data[1], way=way, spoil=spoil)
                assert differences(run.parameters(), parameters) == []
                assert differences(run.state(), state) == []
            assert run.scaler.get_scale() == 2.0**8
            run.model.load_state_dict(statistics, strict=False)
        for item in data[2:]:
            run.step(item, way=way)
        assert run.regulated > 0
        if kind in NOISY:
            assert run.method.stream.state.tolist() == [5, 3]
        runs.append(run)
    assert_same(*runs)


@pytest.mark.parametrize("order", ["modulate, then clip", "clip, then modulate"])
def test_clipping_comes_after_modulation(order: str) -> None:
    """Noise of the gradient's own standard deviation makes a clipped gradient longer again."""
    run = Trainer("OGM-GE", AudioVisual(), scaler=scaler_of(), alpha=0.1)
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.stack([g.double().square().sum() for g in grads]).sum().sqrt())

    run.optimizer.register_step_pre_hook(look)
    bound = 0.05
    for _ in range(4):
        shown = run.backward(batch())
        run.scaler.unscale_(run.optimizer)
        if order == "modulate, then clip":
            run.method.step(**arguments(run.method, shown.seen))
        before = nn.utils.clip_grad_norm_(run.model.parameters(), bound)
        assert float(before) > bound  # there is something to clip
        if order == "clip, then modulate":
            run.method.step(**arguments(run.method, shown.seen))
        run.scaler.step(run.optimizer)
        run.scaler.update()
    assert len(seen) == 4
    # The norm that is divided by is summed in float32, the quotient and its products are rounded.
    count = sum(p.numel() for p in run.model.parameters())
    above = [float(norm) > bound * (1 + (growth(count) + 4) * U) for norm in seen]
    assert above == [order == "clip, then modulate"] * 4
