"""Sharded parameters with real ranks: FSDP2's fully_shard and tensor parallelism over gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from balancing import (
    DRAWING,
    NEEDS,
    NOISY,
    ON_GRADIENTS,
    ON_UPDATES,
    STATEFUL,
    STEPPING,
    TWO_GRADIENTS,
    Shown,
    arguments,
    balance,
    make,
    unimodal_losses,
)
from epochs import next_epoch
from parallel import CLASSES, SAME, counted
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.nn import functional as F

import mmfuse
from mmfuse.loop import shards
from mmfuse.loop.modalities import Modalities
from mmfuse.ops import grad_stats


class Net(nn.Module):
    """Two encoders of which 4 ranks get uneven shards and empty ones, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(5 * 6 * 6, 6))
        self.visual_net = nn.Sequential(nn.Linear(10, 3), nn.Tanh(), nn.Linear(3, 6))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, ...]:
        a, v = self.audio_net(audio), self.visual_net(visual)
        # The head on each part alone, as a module: its sharded weight cannot be sliced outside.
        zeros = torch.zeros_like(a)
        parts = (torch.cat(pair, 1) for pair in ((a, v), (a, zeros), (zeros, v)))
        return a, v, *(self.fc(part) for part in parts)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"audio": self.audio_net, "visual": self.visual_net}


def make_net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(3)
    return Net().to(dtype)


def data(step: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(50 + step)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    audio = torch.randn(size, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    return audio.to(dtype), torch.randn(size, 10, generator=generator).to(dtype), labels


ON_UPDATE = " on the update"
UPDATES = [kind + ON_UPDATE for kind in ON_UPDATES]


def method_for(name: str, encoders: dict[str, nn.Module], optimizer: Any) -> Any:
    kind = name.removesuffix(ON_UPDATE)
    if kind == name:
        return make(kind, encoders)
    method = make(kind, encoders, apply_to="update")
    method.attach(optimizer)
    return method


ROWS = 8  # of the whole batch; the ranks take equal parts, as FSDP2's mean over ranks wants it


def train(
    model: Net, name: str, rank: int, size: int, steps: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    torch.manual_seed(90 + rank)
    if name in UPDATES:
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=False)
    torch.manual_seed(90)
    method = method_for(name, model.encoders, optimizer)
    mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    results = []
    with counted(dist) as reductions:
        for step in range(steps):
            if step % 2 == 0:
                next_epoch(method)
            optimizer.zero_grad()
            audio, visual, labels = (x[mine] for x in data(step, ROWS, dtype))
            a, v, out, out_a, out_v = model(audio, visual)
            seen = {
                "logits": {"audio": out_a, "visual": out_v},
                "labels": labels,
                "features": {"audio": a, "visual": v},
                "inputs": {"audio": audio, "visual": visual},
            }
            shown = Shown(F.cross_entropy(out, labels), unimodal_losses(seen), seen)
            result = balance(method, shown)
            optimizer.step()
            results.append([x.detach() for x in vars(result).values() if isinstance(x, Tensor)])
    state = method.state_dict()
    return {
        "parameters": [whole(p) for p in model.parameters()],
        "results": results,
        "state": dict(state["state"]),
        "stream": state.get("stream", {}),
        "reductions": reductions,
    }


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_by_rows(model: Net, size: int, **options: Any) -> None:
    mesh = init_device_mesh("cpu", (size,))
    for part in (model.audio_net, model.visual_net, model.fc, model):
        fully_shard(part, mesh=mesh, **options)


def shard_by_columns(model: Net, size: int) -> None:
    """The last dimension of every matrix: parts that are no contiguous piece of the whole."""

    def placement(parameter: nn.Parameter) -> Shard:
        # FSDP2 wants dimensions other than the first to divide evenly.
        dim = parameter.dim() - 1
        return Shard(dim if parameter.shape[dim] % size == 0 else 0)

    shard_by_rows(model, size, shard_placement_fn=placement)


def shard_hybrid(model: Net, size: int) -> None:
    """Replicas of shards: two groups of ranks hold the same."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    for part in (model.audio_net, model.visual_net, model.fc, model):
        fully_shard(part, mesh=mesh)


LAYOUTS: dict[str, Callable[[Net, int], None]] = {
    "rows": shard_by_rows,
    "columns": shard_by_columns,
    "hybrid": shard_hybrid,
}


def train_sharded(rank: int, name: str, layout: str, steps: int) -> dict[str, Any]:
    size = dist.get_world_size()
    model = make_net()
    LAYOUTS[layout](model, size)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return train(model, name, rank, size, steps)


METHODS = [*ON_GRADIENTS, *UPDATES]
# Updates without noise are shards of less.
CASES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in UPDATES and kind not in NOISY else [])
    for name in METHODS
    for kind in [name.removesuffix(ON_UPDATE)]
]
STEPS = 6


@pytest.fixture(scope="module")
def unsharded() -> dict[str, dict[str, Any]]:
    return {name: train(make_net(), name, 0, 1, STEPS) for name in METHODS}


# Noise is float32 arithmetic in vectors of 8: at another offset another rounding, up to
# 5e-7 · (1 + |z|) of a deviate, times the standard deviations and rates of 6 steps, below 1. Adam
# divides by the gradient's size, here by down to 1e-3 of the largest.
NOISY = {"rtol": 1e-5, "atol": 5e-6}
TOLERANCES = {kind: SAME for kind in ON_GRADIENTS if kind not in DRAWING}


def assert_same_run(found: list[dict[str, Any]], expected: dict[str, Any], name: str) -> None:
    tolerance = TOLERANCES.get(name, NOISY)
    for one in found:
        for key in ("parameters", "results", "state"):
            torch.testing.assert_close(one[key], expected[key], **tolerance, equal_nan=True)
        torch.testing.assert_close(one["stream"], expected["stream"], rtol=0, atol=0)
    for other in found[1:]:  # the same on every rank, to the bit
        same = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(other["results"], found[0]["results"], **same)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_the_sharded_run_equals_the_unsharded_one(
    name: str, size: int, unsharded: dict[str, dict[str, Any]]
) -> None:
    found = ranks(size).run(train_sharded, name, "rows", STEPS)
    assert_same_run(found, unsharded[name], name)


@pytest.mark.slow_except_for("OGM")
@pytest.mark.parametrize("layout", ["columns", pytest.param("hybrid", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_other_layouts_of_the_shards(
    name: str, layout: str, unsharded: dict[str, dict[str, Any]]
) -> None:
    found = ranks(2 if layout == "columns" else 4).run(train_sharded, name, layout, STEPS)
    assert_same_run(found, unsharded[name], name)


def test_the_noise_matters_in_these_runs(unsharded: dict[str, dict[str, Any]]) -> None:
    # Otherwise the comparisons above would say nothing about it.
    pairs = zip(unsharded["OGM"]["parameters"], unsharded["OGM-GE"]["parameters"], strict=True)
    assert max((a - b).abs().max() for a, b in pairs) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_two_small_reductions_a_step(name: str) -> None:
    steps, modalities, tensors = 2, 2, 8
    for found in ranks(2).run(train_sharded, name, "rows", steps):
        kind = name.removesuffix(ON_UPDATE)
        need = NEEDS[kind]
        wanted = [4 * modalities] * (kind not in TWO_GRADIENTS)
        # A state that goes on only where all ranks' parts are finite.
        kept = kind in STATEFUL
        wanted += [5 * tensors] * (need.stats or need.squares is not None or kept)
        per_step = len(wanted)
        assert len(found["reductions"]) == per_step * steps
        # An update is changed after the optimizers' next step.
        sizes = sorted(found["reductions"][:per_step])
        assert all(n <= most for n, most in zip(sizes, wanted, strict=True))


def local_shapes(rank: int) -> list[tuple[int, ...]]:
    model = make_net()
    shard_by_rows(model, dist.get_world_size())
    return [tuple(p.to_local().shape) for p in model.parameters()]


def test_the_shards_are_uneven_and_some_are_empty() -> None:
    shapes = ranks(4).run(local_shapes)
    rows = list(zip(*[[shape[0] for shape in of_rank] for of_rank in shapes], strict=True))
    assert any(len(set(r)) > 1 for r in rows)
    assert any(0 in r for r in rows)


def train_bf16(rank: int, name: str) -> dict[str, Any]:
    size = dist.get_world_size()
    model = make_net(torch.bfloat16)
    shard_by_rows(model, size)
    return train(model, name, rank, size, 3, torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_parameters_in_bfloat16(name: str) -> None:
    expected = train(make_net(torch.bfloat16), name, 0, 1, 3, torch.bfloat16)
    found = ranks(2).run(train_bf16, name)
    for one in found:
        assert {p.dtype for p in one["parameters"]} == {torch.bfloat16}
        # Each rank rounds its half of the gradient to 2⁻⁹ of itself before the halves are added,
        # and the halves may cancel; gradients and noise here are below 4, the rate is 0.05, for
        # 3 steps: 3 · 0.05 · 4 · 2 · 2⁻⁹ ≈ 2.4e-3; and the parameter, below 2, rounds to 2⁻⁸.
        # Adam's step is the rate times a number of order 1 whose sign a rounding can turn.
        atol = 3 * 0.05 * 2 + 2**-8 if name in UPDATES else 2.4e-3 + 3 * 2**-8
        torch.testing.assert_close(one["parameters"], expected["parameters"], rtol=0, atol=atol)
        assert all(p.isfinite().all() for p in one["parameters"])


def mixed_precision(rank: int) -> list[torch.dtype]:
    model = make_net(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard_by_rows(model, dist.get_world_size(), mp_policy=policy)
    found = train(model, "OGM-GE", rank, dist.get_world_size(), 3, torch.float32)
    assert all(p.isfinite().all() for p in found["parameters"])
    return [p.grad.to_local().dtype for p in model.parameters()]


def test_fsdp_mixed_precision_keeps_float32_gradients() -> None:
    assert set(ranks(2).run(mixed_precision)[0]) == {torch.float32}


def one_inf(rank: int, name: str) -> tuple[bool, bool]:
    """An Inf on the first rank alone, in a tensor of which the last rank holds nothing."""
    model = make_net()
    shard_by_rows(model, dist.get_world_size())
    method = method_for(name, model.encoders, None)
    next_epoch(method)
    audio, visual, labels = data(0, ROWS)
    a, v, out, out_a, out_v = model(audio, visual)
    F.cross_entropy(out, labels).backward()
    part = model.visual_net[0].weight.grad.to_local()
    if rank == 0:
        part[0, 0] = torch.inf
    assert part.numel() or rank == 3
    before = {k: x.clone() for k, x in flat_state(method).items()}
    seen = {
        "logits": {"audio": out_a, "visual": out_v},
        "labels": labels,
        "features": {"audio": a, "visual": v},
        "inputs": {"audio": audio, "visual": visual},
    }
    result = method.step(**arguments(method, seen))
    after = flat_state(method)
    return bool(result.finite), all(torch.equal(before[k], after[k]) for k in before)


def flat_state(method: Any) -> dict[str, Tensor]:
    state = method.state_dict()
    found: dict[str, Tensor] = {**state["state"], **state.get("stream", {})}
    assert found
    return found


@pytest.mark.parametrize("name", [kind for kind in STATEFUL if kind in STEPPING])
def test_an_inf_on_one_rank_is_known_to_all_and_advances_nothing(name: str) -> None:
    assert ranks(4).run(one_inf, name) == 4 * [(False, True)]


def tensor_parallel(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Rows over one mesh dimension, columns over the other: noise by the index in the whole."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    placements = [[Shard(0), Shard(1)], [Shard(0), Shard(0)], [Replicate(), Shard(1)]]
    parameters, gradients = [], []
    generator = torch.Generator().manual_seed(5)
    for placement in placements:
        value = torch.randn(7, 6, generator=generator, dtype=torch.float64)
        gradient = torch.randn(7, 6, generator=generator, dtype=torch.float64)
        parameter = nn.Parameter(distribute_tensor(value, mesh, placement))
        parameter.grad = distribute_tensor(gradient, mesh, placement)
        parameters.append(parameter)
        gradients.append(gradient)
    logits, labels = seen_alike()
    ogm = mmfuse.OGM({"a": parameters[:2], "b": parameters[2:]}, stream=mmfuse.NoiseStream(11))
    ogm.step(logits, labels)
    return [whole(p.grad) for p in parameters], gradients


def seen_alike() -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(6)
    labels = torch.randint(0, 3, (8,), generator=generator)
    logits = {name: torch.randn(8, 3, generator=generator).double() for name in "ab"}
    logits["a"][torch.arange(8), labels] += 2
    return logits, labels


def test_shards_over_two_mesh_dimensions() -> None:
    found = ranks(4).run(tensor_parallel)
    gradients = found[0][1]
    encoders: dict[str, list[Tensor]] = {"a": [], "b": []}
    for i, gradient in enumerate(gradients):
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        encoders["a" if i < 2 else "b"].append(parameter)
    logits, labels = seen_alike()
    mmfuse.OGM(encoders, stream=mmfuse.NoiseStream(11)).step(logits, labels)
    expected = [p.grad for parameters in encoders.values() for p in parameters]
    for sharded, _ in found:
        torch.testing.assert_close(sharded, expected, **NOISY)


def partial_sum(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])
    other = nn.Parameter(torch.ones(2, 2))
    other.grad = torch.ones(2, 2)
    logits, labels = seen_alike()
    try:
        mmfuse.OGM({"a": [partial], "b": [other]}).step(logits, labels)
    except TypeError as error:
        return str(error)
    return ""


def test_partial_sums_are_refused() -> None:
    for message in ranks(2).run(partial_sum):
        assert "encoders['a'][0] is a DTensor of partial sums" in message


def sequence_parallel(rank: int, kind: str) -> tuple[list[Tensor], dict[str, Tensor], list[Any]]:
    """Norms whose weights are whole on each rank, and see a part of the sequence there.

    Returns:
        The gradients after the step, whole; the state; how the gradients lay before it.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    nets, x = norms()
    for net in nets.values():
        parallelize_module(net, mesh, SequenceParallel())
    parts = {n: z.chunk(dist.get_world_size(), 1)[rank].contiguous() for n, z in x.items()}
    features = {n: net(parts[n]).full_tensor() for n, net in nets.items()}
    method = make(kind, nets, stream=mmfuse.NoiseStream(11), process_group=False)
    placed = stepped(method, nets, features)
    grads = [whole(p.grad) for net in nets.values() for p in net.parameters()]
    return grads, method.state_dict()["state"], placed


def norms() -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    torch.manual_seed(4)
    nets: dict[str, nn.Module] = {n: nn.LayerNorm(6, dtype=torch.float64) for n in ("a", "b")}
    return nets, {n: torch.randn(3, 8, 6, dtype=torch.float64) for n in nets}


def stepped(method: Any, nets: dict[str, nn.Module], features: dict[str, Tensor]) -> list[Any]:
    next_epoch(method)
    signs = torch.linspace(-1, 1, 6, dtype=torch.float64)
    losses = {n: (z * signs).square().mean() for n, z in features.items()}
    joint = (features["a"] * features["b"] * signs).sum()
    if isinstance(method, mmfuse.MMPareto):
        method.backward(joint, unimodal_losses=losses)
        return []
    joint.backward()
    every = [p.grad for net in nets.values() for p in net.parameters()]
    placed = [getattr(g, "placements", None) for g in every]
    method.step(*seen_alike())
    return placed


@pytest.mark.parametrize("kind", ["OGM-GE", "InfoReg", "MMPareto"])
def test_gradients_that_are_partial_sums_of_whole_parameters(kind: str) -> None:
    nets, x = norms()
    method = make(kind, nets, stream=mmfuse.NoiseStream(11))
    stepped(method, nets, {n: net(x[n]) for n, net in nets.items()})
    expected = [p.grad for net in nets.values() for p in net.parameters()]
    for found, state, placed in ranks(2).run(sequence_parallel, kind):
        torch.testing.assert_close(found, expected, **NOISY)
        torch.testing.assert_close(state, method.state_dict()["state"], **SAME, equal_nan=True)
        assert all(any(p.is_partial() for p in each) for each in placed)


def sharded_too_late(rank: int) -> str:
    model = make_net()
    ogm = mmfuse.OGM(model.encoders)
    shard_by_rows(model, dist.get_world_size())
    audio, visual, labels = data(0, ROWS)
    _, _, out, out_a, out_v = model(audio, visual)
    F.cross_entropy(out, labels).backward()
    try:
        ogm.step({"audio": out_a, "visual": out_v}, labels)
    except ValueError as error:
        return str(error)
    return ""


def test_a_method_made_before_sharding_says_so() -> None:
    for message in ranks(2).run(sharded_too_late):
        assert "since this object was made" in message
        assert "encoders['audio']" in message


def flat_parameters(rank: int) -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def refused(encoders: Any) -> str:
        try:
            mmfuse.OGM(encoders)
        except TypeError as error:
            return str(error)
        return ""

    encoders = {"audio": nn.Linear(3, 2), "visual": nn.Linear(3, 2)}
    encoders["visual"] = FullyShardedDataParallel(encoders["visual"], device_id="cpu")
    found = [refused(encoders)]
    whole = nn.ModuleDict({"audio": nn.Linear(3, 2), "visual": nn.Linear(3, 2)})
    FullyShardedDataParallel(whole, device_id="cpu", use_orig_params=True)
    found.append(refused(dict(whole.items())))
    found.append(refused({name: list(net.parameters()) for name, net in whole.items()}))
    return found


@pytest.mark.filterwarnings("ignore")
def test_fsdp1_is_refused() -> None:
    """Also where it wraps the model alone, whose encoders look as they always did."""
    for encoder, model, parameters in ranks(2).run(flat_parameters):
        assert "encoders['visual'] is wrapped in FullyShardedDataParallel" in encoder
        assert "encoders['audio'].weight is wrapped in FullyShardedDataParallel" in model
        assert "encoders['audio'][0] is wrapped in FullyShardedDataParallel" in parameters


def merged(rank: int, wholes: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in wholes]
    places = [shards.shard_of(str(i), p) for i, p in enumerate(parameters)]
    parts = [shards.local_part(p.detach()) for p in parameters]
    zeros = [torch.zeros_like(p) for p in parts]
    stats = shards.merge_stats(grad_stats(parts, parts, zeros), places)
    return list(stats), [stats.std]


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e6])
def test_merged_statistics_are_those_of_the_whole(shift: float) -> None:
    """A mean of 1e6 standard deviations does not cancel the variance."""
    torch.manual_seed(1)
    wholes = [torch.randn(n, 3, dtype=torch.float64) + shift for n in (1, 2, 5, 64, 1000)]
    expected = grad_stats(wholes, wholes, [torch.zeros_like(w) for w in wholes])
    for stats, std in ranks(4).run(merged, wholes):
        assert torch.equal(stats[0], expected.numel)
        torch.testing.assert_close(stats[1], expected.mean, rtol=1e-14, atol=1e-14)
        # Σg² − (Σg)²/n in float64: a relative 2⁻⁵² · shift² of the variance, times a few roundings.
        rtol = 8 * 2**-52 * (1 + shift**2)
        torch.testing.assert_close(stats[2], expected.m2, rtol=rtol + 1e-13, atol=0)
        torch.testing.assert_close(std[0], expected.std, rtol=rtol + 1e-13, atol=0)
        torch.testing.assert_close(stats[3], expected.dot, rtol=1e-13, atol=0)
        torch.testing.assert_close(stats[4], expected.disp_sq, rtol=1e-13, atol=0)


def test_runs_cover_a_part_in_order() -> None:
    """Each run of a part names its place in the flattened whole tensor."""
    whole_tensor = torch.arange(2 * 5 * 6).view(2, 5, 6)
    boxes = [((0, 2), (0, 5), (0, 6)), ((0, 1), (0, 5), (0, 6)), ((0, 2), (1, 4), (0, 6))]
    boxes += [((0, 2), (0, 5), (2, 4)), ((1, 2), (1, 2), (3, 6)), ((2, 2), (0, 5), (0, 6))]
    for box in boxes:
        part = whole_tensor[tuple(slice(a, b) for a, b in box)]
        place = shards.Shard((2, 5, 6), tuple(part.shape), tuple(a for a, _ in box), groups=())
        found = [
            run.offset + i for run in shards.runs(part, place) for i in range(run.tensor.numel())
        ]
        assert found == part.flatten().tolist()
        values = [x for run in shards.runs(part, place) for x in run.tensor.flatten().tolist()]
        assert values == found


def test_a_plain_tensor_is_one_run() -> None:
    tensor = torch.randn(3, 4)
    assert [(r.tensor is tensor, r.offset) for r in shards.runs(tensor, None)] == [(True, 0)]
    assert shards.shard_of("p", tensor) is None
    assert shards.local_part(tensor) is tensor
    parameters = [nn.Parameter(tensor), nn.Parameter(torch.ones(2))]
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert not Modalities({"a": parameters[:1], "b": parameters[1:]}).active().shards
