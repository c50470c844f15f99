"""InfoReg against its paper's formulas; its state and its errors."""

from __future__ import annotations

import copy
import gc
import io
import math

import pytest
import tolerances
import torch
from cells import Cell
from epochs import next_epoch
from no_sync import no_host_sync
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse
from mmfuse import InfoReg

NAMES = ["audio", "visual", "text", "depth"]
Step = tuple[dict[str, Tensor], Tensor]


def networks(count: int, device: str = "cpu") -> nn.ModuleDict:
    """One encoder per modality, whose output are its logits."""
    return nn.ModuleDict(
        {n: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)) for n in NAMES[:count]}
    ).to(device)


def batches(count: int, steps: int, device: str = "cpu") -> list[Step]:
    """Inputs of which the first modality says most about the label, the last least."""
    out = []
    for _ in range(steps):
        labels = torch.randint(0, 3, (12,), device=device)
        hint = F.one_hot(labels, 5).float()
        out.append(
            (
                {
                    n: torch.randn(12, 5, device=device) + (3.0 - i) * hint
                    for i, n in enumerate(NAMES[:count])
                },
                labels,
            )
        )
    return out


def backward(nets: nn.ModuleDict, step: Step, scale: float = 1.0) -> dict[str, Tensor]:
    nets.zero_grad()
    logits = {n: net(step[0][n]) for n, net in nets.items()}
    (scale * F.cross_entropy(sum(logits.values()), step[1])).backward()
    return logits


def opened(nets: nn.ModuleDict, **options: object) -> InfoReg:
    """An InfoReg in its third epoch; the trace has grown a hundredfold between the first two."""
    inforeg = InfoReg(dict(nets), **options)
    for scale in (1.0, 10.0):
        next_epoch(inforeg)
        step = batches(len(nets), 1, str(next(nets.parameters()).device))[0]
        inforeg.step(backward(nets, step, scale), step[1])
    next_epoch(inforeg)
    assert inforeg.window_open.all()
    return inforeg


@pytest.mark.parametrize("threshold", [0.04, -50.0])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_training_follows_the_paper(cell: Cell, count: int, threshold: float) -> None:
    """Five epochs of three steps next to a plain transcription of the equations, in float64."""
    cell.skip_slow(count != 3)
    nets = networks(count, cell.device).double()
    plain = copy.deepcopy(nets)
    beta = 0.7
    inforeg = InfoReg(dict(nets), beta=beta, threshold=threshold, backend=cell.backend)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.5) for n in (nets, plain)]
    traces: list[list[float]] = []
    pulled = []
    for _ in range(3 if cell.slow else 5):
        next_epoch(inforeg)
        anchors = [p.detach().clone() for p in plain.parameters()]
        is_open = [
            len(traces) >= 2 and (traces[-1][m] - traces[-2][m]) / traces[-1][m] > threshold
            for m in range(count)
        ]
        assert inforeg.window_open.tolist() == is_open
        squares = []
        for step in batches(count, 1 if cell.slow else 3, cell.device):
            step = ({n: x.double() for n, x in step[0].items()}, step[1])
            result = inforeg.step(backward(nets, step), step[1])

            logits = backward(plain, step)
            s = [float(-F.cross_entropy(z.detach(), step[1])) for z in logits.values()]
            squares.append(
                [sum(float(p.grad.square().sum()) for p in n.parameters()) for n in plain.values()]
            )
            deltas, alphas = [], []
            for m in range(count):
                behind = [s[m] - other for other in s if other < s[m]]
                deltas.append(sum(behind) / len(behind) if behind else 0.0)
                regulated = is_open[m] and deltas[m] > 0
                alphas.append(math.exp(beta * math.tanh(deltas[m])) if regulated else 0.0)
            rest = iter(anchors)
            for alpha, net in zip(alphas, plain.values(), strict=True):
                for p in net.parameters():
                    p.grad += alpha * (p.detach() - next(rest))
            pulled += alphas
            torch.testing.assert_close(result.scores.tolist(), s)
            torch.testing.assert_close(result.information_gap.tolist(), deltas)
            torch.testing.assert_close(inforeg.information_gap.tolist(), deltas)
            torch.testing.assert_close(result.coefficients.tolist(), alphas)
            for p, q in zip(nets.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
            for optimizer in optimizers:
                optimizer.step()
        traces.append(torch.tensor(squares).mean(dim=0).tolist())
        torch.testing.assert_close(inforeg.fisher_trace.tolist(), traces[-1], rtol=1e-5, atol=0)
    assert max(pulled) > 0.0 or threshold > 0.0


@pytest.mark.parametrize("through_file", [False, True])
def test_resumes_bit_for_bit_within_an_epoch(cell: Cell, through_file: bool) -> None:
    cell.skip_slow(through_file)
    nets = networks(2, cell.device)
    length = 2 if cell.slow else 4
    data = batches(2, 3 * length, cell.device)

    def run(model: nn.ModuleDict, method: InfoReg, first: int, last: int) -> None:
        for i in range(first, last):
            if i % length == 0:
                next_epoch(method)
            method.step(backward(model, data[i]), data[i][1])
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad

    straight = InfoReg(dict(nets), threshold=-10.0, backend=cell.backend)
    other = copy.deepcopy(nets)
    run(nets, straight, 0, 3 * length)
    before = InfoReg(dict(other), threshold=-10.0, backend=cell.backend)
    run(other, before, 0, 3 * length - 1)
    state = before.state_dict()
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file)
    after = InfoReg(dict(other), threshold=-10.0, backend=cell.backend)
    after.load_state_dict(copy.deepcopy(state))
    run(other, after, 3 * length - 1, 3 * length)
    for p, q in zip(nets.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for value, expected in zip(
        (after.fisher_trace, after.window_open, after.information_gap),
        (straight.fisher_trace, straight.window_open, straight.information_gap),
        strict=True,
    ):
        assert torch.equal(value, expected)


def test_no_host_sync_in_a_step(cell: Cell) -> None:
    nets = networks(2, cell.device)
    inforeg = opened(nets, backend=cell.backend)
    step = batches(2, 1, cell.device)[0]
    logits = backward(nets, step)
    inforeg.step(logits, step[1])  # compiles and fills caches
    logits = backward(nets, step)
    with no_host_sync(cell.device):
        inforeg.step(logits, step[1])


@pytest.mark.slow
def test_the_anchor_is_the_only_memory_as_large_as_the_model() -> None:
    size = 123_457
    nets = nn.ModuleDict({n: nn.Linear(size, 1, bias=False) for n in ("a", "b")})
    for net in nets.values():
        net.weight.grad = torch.ones_like(net.weight)
    labels = torch.zeros(4, dtype=torch.int64)
    logits = {n: torch.randn(4, 2) for n in nets}

    def large() -> int:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
        return sum(t.numel() >= size for t in tensors)

    before = large()
    inforeg = InfoReg(dict(nets))
    for _ in range(3):
        next_epoch(inforeg)
        for net in nets.values():
            net.weight.grad.zero_().fill_(1.0)
        inforeg.step(logits, labels)
    assert large() == before + 2


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_anchors_in_another_dtype(cell: Cell, dtype: torch.dtype | None) -> None:
    nets = networks(2, cell.device)
    inforeg = opened(nets, anchor_dtype=dtype, anchor_device=cell.device, backend=cell.backend)
    anchors = [p.detach().clone().to(dtype or p.dtype).float() for p in nets.parameters()]
    with torch.no_grad():
        for p in nets.parameters():
            p += torch.randn_like(p)
    step = batches(2, 1, cell.device)[0]
    logits = backward(nets, step)
    plain = [p.grad.clone() for p in nets.parameters()]
    alpha = inforeg.step(logits, step[1]).coefficients
    assert (alpha > 0).any()
    for i, (p, g, w0) in enumerate(zip(nets.parameters(), plain, anchors, strict=True)):
        torch.testing.assert_close(p.grad, g + alpha[i // 4] * (p.detach() - w0))


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [1, 2**30])
def test_anchors_on_the_cpu(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("mmfuse.loop.anchors._CHUNK_BYTES", chunk)
    nets = networks(2, "cuda")
    other = copy.deepcopy(nets)
    step = batches(2, 1, "cuda")[0]
    for net, device in ((nets, None), (other, "cpu")):
        torch.manual_seed(1)
        inforeg = opened(net, anchor_device=device)
        assert inforeg.anchors.tensors[0].device.type == (device or "cuda")
        with torch.no_grad():
            for p in net.parameters():
                p += 0.5
        logits = backward(net, step)
        with no_host_sync("cuda"):
            inforeg.step(logits, step[1])
    for p, q in zip(nets.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_step_that_is_not_finite_counts_for_nothing() -> None:
    nets = networks(2)
    inforeg = opened(nets)
    step = batches(2, 1)[0]
    logits = backward(nets, step)
    inforeg.step(logits, step[1])
    trace = inforeg.fisher_trace
    logits = backward(nets, step)
    broken = next(nets["audio"].parameters())
    broken.grad[0] = torch.inf
    out = inforeg.step(logits, step[1])
    assert not out.finite
    assert torch.equal(inforeg.fisher_trace, trace)
    others = [p for p in nets.parameters() if p is not broken]
    assert not broken.grad.isfinite().all() and all(p.grad.isfinite().all() for p in others)


def test_an_epoch_without_steps_leaves_the_history_alone() -> None:
    nets = networks(2)
    inforeg = opened(nets)
    for _ in range(2):
        next_epoch(inforeg)
        assert inforeg.window_open.all(), "the window still follows from the last two epochs"
        assert inforeg.fisher_trace.isnan().all()


def test_a_step_without_a_modality_does_not_enter_its_trace() -> None:
    """Its encoder may have gradients nonetheless, of the zeros in the place of its inputs."""
    nets = networks(2)
    inforeg = InfoReg(dict(nets))
    next_epoch(inforeg)
    here = {"audio": torch.ones(12, dtype=torch.bool), "visual": torch.ones(12, dtype=torch.bool)}
    gone = {**here, "visual": torch.zeros(12, dtype=torch.bool)}
    traces = []
    for step, present in zip(batches(2, 3), (here, gone, gone), strict=True):
        inforeg.step(backward(nets, step), step[1], present=present)
        assert all(p.grad.abs().sum() > 0 for p in nets["visual"].parameters())
        traces.append(inforeg.fisher_trace)
    assert traces[0][1] == traces[1][1] == traces[2][1] > 0
    assert traces[0][0] != traces[1][0]
    # The same for coefficients of one's own.
    step = batches(2, 1)[0]
    backward(nets, step)
    inforeg.step(coefficients={"audio": 0.0, "visual": torch.nan})
    assert inforeg.fisher_trace[1] == traces[0][1]


def test_a_modality_that_comes_later_has_no_window_before_its_third_epoch() -> None:
    """From nothing to its first trace is no growth."""
    nets = networks(2)
    inforeg = InfoReg(dict(nets), threshold=0.04)
    everybody = torch.ones(12, dtype=torch.bool)
    windows = []
    for epoch in range(5):
        next_epoch(inforeg)
        windows.append(inforeg.window_open.tolist())
        step = batches(2, 1)[0]
        present = {"audio": everybody, "visual": everybody & (epoch >= 2)}
        inforeg.step(backward(nets, step, 4.0**epoch), step[1], present=present)
    assert windows[2] == [True, False] and windows[3] == [True, False] and windows[4][1]


def test_gradients_of_zero_close_the_window() -> None:
    nets = networks(2)
    inforeg = InfoReg(dict(nets), threshold=-1e9)
    step = batches(2, 1)[0]
    for _ in range(4):
        next_epoch(inforeg)
        assert not inforeg.window_open.any()  # 0 / 0 is above no threshold
        logits = backward(nets, step, 0.0)
        out = inforeg.step(logits, step[1])
        assert out.finite and all((p.grad == 0).all() for p in nets.parameters())
        assert inforeg.fisher_trace.tolist() == [0.0, 0.0]


def test_a_batch_of_one_and_no_gradients() -> None:
    nets = networks(2)
    inforeg = opened(nets)
    inputs, labels = batches(2, 1)[0]
    one = ({n: x[:1] for n, x in inputs.items()}, labels[:1])
    assert inforeg.step(backward(nets, one), one[1]).coefficients.max() > 0
    nets.zero_grad()
    nets.requires_grad_(False)
    assert inforeg.step({n: net(one[0][n]) for n, net in nets.items()}, one[1]).finite


def test_frozen_and_missing_gradients_are_skipped() -> None:
    nets = networks(2)
    inforeg = opened(nets)
    frozen = nets["audio"][0].weight
    frozen.requires_grad_(False)
    step = batches(2, 1)[0]
    logits = backward(nets, step)
    assert frozen.grad is None
    squares = [
        sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None)
        for net in nets.values()
    ]
    inforeg.step(logits, step[1])
    torch.testing.assert_close(inforeg.fisher_trace.tolist(), squares, rtol=1e-5, atol=0)


def test_order_of_calls() -> None:
    nets = networks(2)
    inforeg = InfoReg(dict(nets))
    step = batches(2, 1)[0]
    logits = backward(nets, step)
    with pytest.raises(RuntimeError, match=r"InfoReg: call set_epoch\(epoch\) first"):
        inforeg.step(logits, step[1])
    with pytest.raises(RuntimeError, match=r"InfoReg: call set_epoch\(epoch\) first"):
        inforeg.observe(logits, step[1])
    inforeg.set_epoch(0)
    inforeg.step(logits, step[1])


def test_the_same_epoch_again_changes_nothing_and_a_new_run_begins_it_anew() -> None:
    nets = networks(2)
    inforeg = InfoReg(dict(nets))
    inforeg.set_epoch(3)
    anchors = [a.clone() for a in inforeg.anchors.tensors]
    step = batches(2, 1)[0]
    inforeg.step(backward(nets, step), step[1])
    trace = inforeg.fisher_trace
    with torch.no_grad():
        for p in nets.parameters():
            p += 1.0
    inforeg.set_epoch(3)
    assert torch.equal(inforeg.fisher_trace, trace)
    for ours, anchor in zip(inforeg.anchors.tensors, anchors, strict=True):
        assert torch.equal(ours, anchor)
    inforeg.begin()
    with pytest.raises(RuntimeError, match="call set_epoch"):
        inforeg.step(backward(nets, step), step[1])
    inforeg.set_epoch(3)
    assert inforeg.fisher_trace.isnan().all()
    assert torch.equal(inforeg._state["traces"][:, -1], trace), "the epoch before has ended"
    for ours, p in zip(inforeg.anchors.tensors, nets.parameters(), strict=True):
        assert torch.equal(ours, p)


def test_changed_encoders_are_named() -> None:
    nets = networks(2)
    inforeg = opened(nets)
    nets["visual"][0] = nn.Linear(5, 8)
    with pytest.raises(ValueError, match=r"encoders\['visual'\].0.weight is new .*2 such"):
        next_epoch(inforeg)
    nets["visual"] = networks(2)["visual"]  # another module than the one that is watched
    nets["audio"].append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"encoders\['audio'\].3.weight is new"):
        next_epoch(inforeg)
    nets = networks(2)
    inforeg = opened(nets)
    del nets["audio"][2]
    with pytest.raises(ValueError, match=r"encoders\['audio'\].2.weight is gone"):
        next_epoch(inforeg)


def test_a_parameter_that_changes_its_shape_within_an_epoch_is_named() -> None:
    nets = networks(2)
    inforeg = opened(nets)
    nets["audio"][2].weight.data = torch.randn(4, 8)
    nets["audio"][2].bias.data = torch.randn(4)
    step = batches(2, 1)[0]
    nets["visual"][2].weight.data, nets["visual"][2].bias.data = torch.randn(4, 8), torch.randn(4)
    logits = backward(nets, step)
    grads = [p.grad.clone() for p in nets["audio"].parameters()]
    state = copy.deepcopy(inforeg.state_dict())
    with pytest.raises(ValueError, match=r"encoders\['audio'\].2.weight had shape \[3, 8\]"):
        inforeg.step(logits, step[1])
    assert all(map(torch.equal, grads, (p.grad for p in nets["audio"].parameters())))
    assert torch.equal(inforeg._state["squares"], state["state"]["squares"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, y: ({"audio": z["audio"]}, y), r"missing \['visual'\]"),
        (lambda z, y: ({**z, "smell": z["audio"]}, y), r"unknown \['smell'\]"),
        (lambda z, y: (z, y + 3), r"labels\[0\] = \d is out of range for logits\['audio'\]"),
        (
            lambda z, y: ({**z, "audio": z["audio"][:5]}, y),
            r"logits\['audio'\] has 5 rows, labels 12",
        ),
    ],
)
def test_bad_input_changes_nothing(change: object, message: str) -> None:
    nets = networks(2)
    inforeg = opened(nets)
    step = batches(2, 1)[0]
    logits = backward(nets, step)
    grads = [p.grad.clone() for p in nets.parameters()]
    state = copy.deepcopy(inforeg.state_dict())
    with pytest.raises(ValueError, match=message):
        inforeg.step(*change(logits, step[1]))
    assert all(map(torch.equal, grads, (p.grad for p in nets.parameters())))
    for key in ("squares", "steps", "information_gap"):
        assert torch.equal(inforeg._state[key], state["state"][key])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": -1.0}, ValueError, "beta must be a finite number of at least 0, got -1.0"),
        ({"beta": math.nan}, ValueError, "beta must be"),
        ({"threshold": math.inf}, ValueError, "threshold must be a finite number"),
        ({"anchor_dtype": torch.int8}, TypeError, "anchor_dtype must be a floating dtype"),
        ({"select": "conv"}, ValueError, r"encoders\['audio'\] has no parameter"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InfoReg(dict(networks(2)), **options)


def test_official_wants_two_encoders() -> None:
    with pytest.raises(ValueError, match="two modalities"):
        InfoReg.official(dict(networks(3)))


def test_official_wants_a_release_that_there_is() -> None:
    with pytest.raises(ValueError, match="release must be 'november' or 'march', got 'april'"):
        InfoReg.official(dict(networks(2)), release="april")


def test_official_counts_layers_of_bare_parameters() -> None:
    nets = networks(2)
    modules = InfoReg.official(dict(nets))
    bare = InfoReg.official({n: list(net.parameters()) for n, net in nets.items()})
    step = batches(2, 1)[0]
    for inforeg in (modules, bare):
        next_epoch(inforeg)
        inforeg.step(backward(nets, step), step[1])
    assert torch.equal(modules.fisher_trace, bare.fisher_trace)
    assert modules.window_open.all(), "the released code regulates in its first epoch"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"].pop("traces"), r"the state of InfoReg lacks \['traces'\]"),
        (
            lambda s: s["state"].update(traces=torch.zeros(2, 5)),
            r"'traces' in the state of InfoReg must be a tensor of shape \[2, 2\], got \[2, 5\]",
        ),
        (lambda s: s["anchors"]["tensors"].pop(), "holds 7 anchors, the encoders have 8"),
        (
            lambda s: s["anchors"]["tensors"].__setitem__(1, torch.zeros(3)),
            r"anchor of encoders\['audio'\].0.bias has shape \[3\], the parameter \[8\]",
        ),
    ],
)
def test_a_state_that_does_not_fit(change: object, message: str) -> None:
    nets = networks(2)
    inforeg = opened(nets)
    state = copy.deepcopy(inforeg.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        mmfuse.InfoReg(dict(nets)).load_state_dict(state)


def _mixed(device: str) -> nn.ModuleDict:
    """Encoders in float32, float64 and bfloat16; their outputs meet in float32."""
    nets = networks(3, device)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for net, dtype in zip(nets.values(), dtypes, strict=True):
        net.to(dtype)
    return nets


@pytest.mark.slow_except_on("reference", "cpu", "cuda")
@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "in parts"])
@pytest.mark.parametrize("opened_window", [False, True], ids=["closed", "open"])
def test_the_trace_comes_with_the_pull(
    cell: Cell, parts: int, opened_window: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read of each gradient gives what grad_stats and a pull of its own gave."""
    nets = _mixed(cell.device)
    inforeg = InfoReg(dict(nets), threshold=-10.0 if opened_window else 2.0, backend=cell.backend)
    whole = inforeg.anchors.parts

    def cut(active: object) -> object:
        (_, anchors), *_ = whole(active)
        for part in (slice(None, 5), slice(5, None)):
            yield part, anchors[part]

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("InfoReg has read the gradients twice")

    monkeypatch.setattr("mmfuse.loop._active.grad_stats", refused)
    if parts == 2:
        monkeypatch.setattr(inforeg.anchors, "parts", cut)
    found_pull = False
    for _ in range(3):
        next_epoch(inforeg)
        for step in range(2):
            x = {n: torch.randn(6, 5, device=cell.device) for n in nets}
            labels = torch.randint(0, 3, (6,), device=cell.device)
            nets.zero_grad()
            logits = {n: net(x[n].to(net[0].weight.dtype)).float() for n, net in nets.items()}
            F.cross_entropy(sum(logits.values()), labels).backward()
            parameters = list(nets.parameters())
            before = [p.grad.clone() for p in parameters]
            already = inforeg._state["squares"].clone() if step else torch.zeros(1)
            out = inforeg.step(logits, labels)

            stats = mmfuse.ops.grad_stats(before, backend=cell.backend)
            squares = inforeg._state["squares"] - already.to(cell.device)
            # Either sum has its bound; n·mean² has twice that of the mean on top.
            bound = 4 * tolerances.sum_of_products(torch.float32, stats.sq_norm)
            tolerances.assert_within(squares, stats.sq_norm, bound)
            pull = out.coefficients.repeat_interleave(4)
            found_pull |= bool((pull != 0).any())
            anchors = [a.clone() for a in inforeg.anchors.tensors]
            mmfuse.ops.update_grads_(
                before,
                torch.ones_like(pull),
                params=[p.detach() for p in parameters],
                anchors=anchors,
                pull=pull,
                backend=cell.backend,
            )
            for p, g in zip(parameters, before, strict=True):
                assert torch.equal(p.grad, g)
            with torch.no_grad():
                for p in parameters:
                    p -= 0.1 * p.grad
    assert found_pull == opened_window
