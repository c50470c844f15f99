"""Compiled code where an eager program would notice something: the same numbers, or an error."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import mmfuse
from mmfuse.ops import _tensors

# PyTorch's own, when it imports its compiler, and when it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


Region = Callable[[Any, Tensor, Tensor, Tensor], Any]

# How each module is called with two modalities' numbers and labels.
CALLS: dict[str, Region] = {
    "OPM": lambda m, a, v, y: m({"a": a, "v": v}, {"a": a, "v": v}, y).features,
    "ModalityDropout": lambda m, a, v, y: m({"a": a, "v": v}).features,
    "AGM": lambda m, a, v, y: m({"a": a, "v": v}, y).logits,
    "ARL": lambda m, a, v, y: m({"a": a, "v": v}, {"a": a, "v": v}, y).features,
    "MCR": lambda m, a, v, y: {"loss": m({"a": a, "v": v}, {"a": a, "v": v}, y).loss},
    "ARM": lambda m, a, v, y: m({"a": a, "v": v}, a + v, {"a": a, "v": v}, a + v, y).features,
}
MADE: dict[str, Callable[[], nn.Module]] = {
    "OPM": lambda: mmfuse.OPM(0.9, stream=mmfuse.NoiseStream(3)),
    "ModalityDropout": lambda: mmfuse.ModalityDropout(0.5, stream=mmfuse.NoiseStream(3)),
    "MCR": lambda: mmfuse.MCR(stream=mmfuse.NoiseStream(3)),
    "ARM": lambda: mmfuse.ARM(bins=4),
}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    a, v = (torch.randn(16, 4, requires_grad=True) for _ in range(2))
    return a, v, torch.randint(0, 4, (16,))


@pytest.mark.slow_except_for("ARM", "OPM")
@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_module_in_a_checkpoint(name: str) -> None:
    """Its forward pass is repeated in the backward pass: an error, but ARM counts once."""
    module = MADE.get(name, getattr(mmfuse, name))()
    plain = copy.deepcopy(module)
    fast = torch.compile(module, backend="aot_eager")

    def region(m: Any, a: Tensor, v: Tensor, y: Tensor) -> Tensor:
        return sum((t * t).sum() for t in CALLS[name](m, a, v, y).values())

    for _ in range(2):
        a, v, y = batch()
        loss = checkpoint(region, fast, a, v, y, use_reentrant=False)
        region(plain, a, v, y)
        if name != "ARM":
            with pytest.raises(RuntimeError, match=f"{name} is called in a backward pass, as act"):
                loss.backward()
        else:
            loss.backward()
        for key, buffer in plain.named_buffers():
            assert torch.equal(dict(module.named_buffers())[key], buffer), key


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_turns_of_a_compiled_mla(backend: str) -> None:
    heads = [nn.Linear(6, 3) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    plain, other = (mmfuse.MLA(head, batches=3) for head in heads)
    steps = [plain.step, torch.compile(other.step, backend=backend)]
    for _ in range(4):
        x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
        for head, step in zip(heads, steps, strict=True):
            head.zero_grad()
            F.cross_entropy(head(x), y).backward()
            step(x)
    assert int(other.turns) == int(plain.turns) == 4
    assert torch.allclose(heads[1].weight.grad, heads[0].weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_flags_and_states_without_dimensions(backend: str) -> None:
    @torch.compile(backend=backend, fullgraph=True)
    def update(grad: Tensor, finite: Tensor) -> None:
        mmfuse.ops.update_grads_([grad], torch.ones(1), finite=finite)

    finite = torch.ones((), dtype=torch.bool)
    update(torch.tensor([torch.nan, 1.0]), finite)
    assert not bool(finite)

    @torch.compile(backend=backend, fullgraph=True)
    def keep(state: Tensor, new: Tensor, condition: Tensor) -> None:
        mmfuse.ops.keep_state_([state], [new], condition)

    state = torch.zeros(())
    keep(state, torch.ones(()), torch.ones((), dtype=torch.bool))
    assert float(state) == 1


def test_names_that_an_average_has_written() -> None:
    """The average's own state knows them; the first call of it is a compiled one."""
    module = mmfuse.ARM(bins=4)
    average = AveragedModel(module, use_buffers=True)
    for _ in range(3):
        a, v, y = batch()
        module({"a": a, "v": 3 * v}, a + v, {"a": a, "v": v}, a + v, y)
        average.update_parameters(module)
    plain, other = copy.deepcopy(average).eval(), copy.deepcopy(average).eval()
    a, v, _ = batch()
    turned = {"v": v, "a": a}
    expected = plain(turned)
    found = torch.compile(other, backend="aot_eager")(turned)
    assert expected.weights[0] != expected.weights[1]
    assert found.modalities == expected.modalities == ("a", "v")
    assert torch.equal(found.features["a"], expected.features["a"])


@pytest.mark.parametrize("first", ["fake", "real"])
def test_tensors_of_a_fake_mode_are_not_kept(first: str) -> None:
    """A run that only estimates memory leaves nothing to those after it, and takes nothing."""
    _tensors._kept.clear()
    for kind in ("fake", "real", "real") if first == "fake" else ("real", "fake", "real"):
        with FakeTensorMode() if kind == "fake" else contextlib.nullcontext():
            found = _tensors.index_tensor((0, 0, 1), torch.device("cpu"))
            torch.arange(2).index_select(0, found)
        assert isinstance(found, FakeTensor) == (kind == "fake")


class Official(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.v, self.head = nn.Linear(5, 6), nn.Linear(7, 6), nn.Linear(12, 4)
        self.opm = mmfuse.OPM.official(1.0, p_exe=1.0, starts=0, stream=mmfuse.NoiseStream(3))

    def forward(self, a: Tensor, v: Tensor, y: Tensor) -> Tensor:
        features = {"a": self.a(a), "v": self.v(v)}
        out = self.opm(features, mmfuse.unimodal_logits(self.head, features), y)
        return F.cross_entropy(self.head(torch.cat(list(out.features.values()), 1)), y[out.rows])


def test_thetas_gradient_is_not_left_out_in_silence() -> None:
    model = Official()
    fast = torch.compile(model, backend="aot_eager")
    with (
        torch._functorch.config.patch(donated_buffer=False),
        pytest.warns(RuntimeWarning, match=r"theta's gradient is left out.* compile the encoders"),
    ):
        fast(torch.randn(32, 5), torch.randn(32, 7), torch.randint(0, 4, (32,)))


def test_gradients_that_a_replayed_graph_has_written() -> None:
    """PyTorch counts no change then; played here by `p.grad.data`."""
    nets = {"a": nn.Linear(4, 3), "v": nn.Linear(4, 3)}
    ogm = mmfuse.OGM(nets, noise=False)
    given = {"a": torch.tensor(0.5), "v": torch.tensor(1.0)}
    sum(net(torch.randn(8, 4)).sum() for net in nets.values()).backward()
    ogm.step(coefficients=given)
    for net in nets.values():
        net.weight.grad.data.fill_(1)
        net.bias.grad.data.fill_(1)
    with pytest.raises(RuntimeError, match=r"If a replayed CUDA graph .*, call forget\(\) before"):
        ogm.step(coefficients=given)
    ogm.forget()
    ogm.step(coefficients=given)
    assert float(nets["a"].weight.grad[0, 0]) == 0.5
