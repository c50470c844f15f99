"""How many kernels a step of OGM launches on a GPU: two large ones and six tiny ones at most.

With mmfuse._C, which reads a table of gradients, compiled backends have three tiny ones at most.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from balancing import make, start
from cells import Cell
from cuda_on_cpu.launches import counted_launches
from dispatched import launches_of
from torch import Tensor, nn

from mmfuse import OGM, NoiseStream, _native, ogm_backward, ops
from mmfuse.ops._registry import OPS

# In the limit are grad_stats and update_grads_, which read and write the gradients; modality_scores
# and what finishes it for a large batch, what finishes grad_stats, the factors, `finite`, and the
# stream's next step.
LIMITS = {False: 5, True: 8}
# The decision is what finishes grad_stats, and has `finite`; the update takes the stream on.
FEW = {False: 4, True: 5}


def decides_at_once(backend: str) -> bool:
    """True where a step of OGM or MLB has `FEW` launches."""
    return backend != "triton" and _native.read_gradients is not None


class Nets:
    """M small encoders after a forward pass, with each one's logits."""

    def __init__(self, count: int, device: str, rows: int = 9) -> None:
        self.encoders = {
            f"m{i}": nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).to(device)
            for i in range(count)
        }
        x = torch.randn(rows, 6, device=device)
        self.labels = torch.randint(0, 4, (rows,), device=device)
        self.attached = {n: (i + 1) * net(x) for i, (n, net) in enumerate(self.encoders.items())}
        self.loss = nn.functional.cross_entropy(sum(self.attached.values()), self.labels)

    @property
    def logits(self) -> Mapping[str, Tensor]:
        return {name: z.detach() for name, z in self.attached.items()}

    def backward(self) -> None:
        for net in self.encoders.values():
            net.zero_grad()
        self.loss.backward(retain_graph=True)


@pytest.fixture
def gpu_like(cell: Cell) -> Cell:
    if cell.backend == "reference":
        pytest.skip("the reference is many operators behind one name")
    return cell


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("formula", ["tpami", "cvpr"])
@pytest.mark.parametrize("noise", [False, True], ids=["ogm", "ogm-ge"])
def test_a_step(gpu_like: Cell, noise: bool, formula: str, count: int) -> None:
    nets = Nets(count, gpu_like.device)
    ogm = OGM(nets.encoders, noise=noise, formula=formula, ends=0, backend=gpu_like.backend)
    nets.backward()
    logits, labels = nets.logits, nets.labels
    ogm.set_epoch(0)

    def step() -> None:
        ogm.step(logits, labels)

    step()  # the first one puts on the device what is kept there
    for _ in range(2):
        nets.backward()
        found = launches_of(step)
        assert found.kernels <= LIMITS[noise], found.operators
        # It did work, and it was this library's.
        assert found.operators["update_grads_"] == found.operators["modality_scores"] == 1
        few = decides_at_once(gpu_like.backend)
        assert found.operators["grad_stats"] == (noise and not few)
        assert found.operators["ones"] == (not few)
        assert found.kernels <= (FEW if few else LIMITS)[noise], found.operators
    ogm.set_epoch(1)
    nets.backward()
    outside = launches_of(step)
    assert not ogm.modulating
    assert outside.kernels <= LIMITS[False], outside.operators


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not in the shim")
@pytest.mark.parametrize("noise", [False, True], ids=["ogm", "ogm-ge"])
def test_the_kernels_that_were_really_launched(noise: bool) -> None:
    """The host shim shows them, for a batch of 700, which needs every kernel that a step can."""
    nets = Nets(2, "cpu", rows=700)
    ogm = OGM(nets.encoders, noise=noise, backend="cuda")
    nets.backward()
    logits, labels = nets.logits, nets.labels
    ogm.step(logits, labels)
    nets.backward()
    with counted_launches() as kernels:
        found = launches_of(lambda: ogm.step(logits, labels))
    names = {kernel.split("<")[0] for kernel in kernels}
    assert {"modality_scores_kernel", "update_grads_kernel"} <= names
    assert ("grad_stats_kernel" in names) == noise
    of_pytorch = sum(n for name, n in found.operators.items() if name not in OPS)
    assert kernels.total() == found.kernels - of_pytorch
    few = decides_at_once("cuda")
    assert kernels.total() + of_pytorch == (FEW if few else LIMITS)[noise]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not in the shim")
@pytest.mark.parametrize("count", [1, 127, 128, 129])
def test_a_short_list_does_not_pay_for_a_long_table(count: int) -> None:
    """The lists hold tensors of one kind; the empty tensor is in no table."""
    grads = [torch.full((3,), 1.0 + i, device="cpu") for i in range(count)]
    grads.insert(0, torch.empty(0))
    scale, squares = torch.full((count + 1,), 0.5), torch.empty(count + 1)
    with counted_launches() as kernels:
        stats = ops.grad_stats(grads, backend="cuda")
        ops.update_grads_(grads, scale, backend="cuda")
        ops.update_grads_(grads, scale, sq_norm=squares, backend="cuda")
    short = str(count <= 128).lower()
    # The sums are of all tensors, also of the empty one.
    length = 128 if count + 1 <= 128 else 2000
    assert set(kernels) == {
        f"grad_stats_kernel<float, Anchors 0, {short}>",
        f"grad_stats_finalise_kernel<{length}, NoDecision>",
        f"update_grads_kernel<float, Anchors 0, false, {short}>",
        f"update_grads_squares_kernel<float, Anchors 0, {short}>",
        f"update_grads_sq_norm_kernel<{length}>",
    }
    values = 1.0 + torch.arange(count)
    assert torch.equal(stats.mean[1:], values)
    assert torch.equal(squares[1:], 3 * (values / 2).square())
    assert torch.equal(torch.stack(grads[1:]), (values / 4).unsqueeze(1).expand(-1, 3))


@pytest.mark.parametrize("noise", [False, True], ids=["ogm", "ogm-ge"])
def test_what_ogm_backward_adds_to_the_backward_pass(gpu_like: Cell, noise: bool) -> None:
    nets, stream = Nets(2, gpu_like.device), NoiseStream(3, gpu_like.device)

    def modulated() -> None:
        for net in nets.encoders.values():
            net.zero_grad()
        ogm_backward(
            nets.loss,
            nets.encoders,
            nets.attached,
            nets.labels,
            noise=noise,
            stream=stream,
            retain_graph=True,
            backend=gpu_like.backend,
        )

    modulated()
    added = launches_of(modulated).kernels - launches_of(nets.backward).kernels
    assert 0 < added <= LIMITS[noise]


@pytest.mark.parametrize("noise", [False, True], ids=["ogm", "ogm-ge"])
def test_micro_batches_change_the_scores_alone(gpu_like: Cell, noise: bool) -> None:
    """The step after two `observe` takes as many launches as one with one batch's scores."""
    nets = Nets(2, gpu_like.device)
    ogm = OGM(nets.encoders, noise=noise, backend=gpu_like.backend)
    nets.backward()
    for _ in range(2):
        ogm.observe(nets.logits, nets.labels)
        ogm.observe(nets.logits, nets.labels)
        nets.backward()
        step = launches_of(ogm.step)
    assert step.operators["modulation_factors"] == 1
    assert step.operators["update_grads_"] == 1
    assert step.operators["index_select"] == 0


# Beside the scores, the flag that all is finite, and the update of all gradients.
DECIDING = {
    "CGGM": {"progress_factors": 1, "keep_state_": 1},
    "MLB": {"modulation_factors": 1},
    # The sums of squares so far, with this step's.
    "InfoReg": {"information_pull": 1, "add": 1, "keep_state_": 1},
    # The gate with its threshold in the features' dtype, and the stream's next step.
    "RedReg": {
        "grad_stats": 1,
        "_to_copy": 1,
        "co_information_gate": 1,
        "redundancy_pull": 1,
        "keep_state_": 1,
        "add_": 1,
    },
}

SCORES = {"CGGM": "modality_accuracies"}


@pytest.mark.parametrize("kind", DECIDING)
def test_a_decision_is_a_launch(gpu_like: Cell, kind: str) -> None:
    """So is the change of CGGM's, InfoReg's and RedReg's state."""
    nets = Nets(3, gpu_like.device)
    options = {"monitor_every": 100} if kind == "RedReg" else {}
    method = make(kind, nets.encoders, backend=gpu_like.backend, **options)
    features = {name: torch.randn(9, 4, device=gpu_like.device) for name in nets.encoders}
    inputs = {name: torch.randn(9, 6, device=gpu_like.device) for name in nets.encoders}
    start(method)
    arguments = [nets.logits, nets.labels, features, inputs][: 4 if kind == "RedReg" else 2]
    for _ in range(2):  # the first has RedReg's monitor
        nets.backward()
        method.step(*arguments)
    nets.backward()
    found = launches_of(lambda: method.step(*arguments))
    few = decides_at_once(gpu_like.backend)
    assert dict(found.operators) == {
        **DECIDING[kind],
        SCORES.get(kind, "modality_scores"): 1,
        **({} if kind == "MLB" and few else {"ones": 1}),
        "update_grads_": 1,
    }


def test_two_gradients_need_no_list_of_zeros(gpu_like: Cell) -> None:
    """Each op is one operator, as it is with anchors: nothing is made in their place."""
    g1, g2 = ([torch.ones(n, device=gpu_like.device) for n in (5, 700)] for _ in range(2))
    factors = torch.full((2,), 0.5, device=gpu_like.device)
    backend = gpu_like.backend
    sensed = launches_of(lambda: ops.grad_stats(g1, g2, backend=backend))
    assert sensed.operators == {"grad_stats": 1}
    acted = launches_of(
        lambda: ops.update_grads_(g1, factors, params=g2, pull=factors, backend=backend)
    )
    assert acted.operators == {"update_grads_": 1}
    assert all(bool((g == 1).all()) for g in g1)
