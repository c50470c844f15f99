"""Logits of each modality from a head that sees all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import mmfuse
from mmfuse.loop.shards import whole_state

SIZES = {"a": 3, "b": 5, "c": 2}


def features(rows: int = 6) -> dict[str, Tensor]:
    return {n: torch.randn(rows, d).double() for n, d in SIZES.items()}


def joined(given: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(given.values()), dim=1)


def linear() -> nn.Linear:
    return nn.Linear(10, 4).double()


class Standardised(nn.Linear):
    """Weight standardisation: affine, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean(dim=1, keepdim=True)
        return F.linear(x, w / w.std(dim=1, keepdim=True), self.bias)


class LowRank(nn.Linear):
    """LoRA: a frozen weight and a product beside it."""

    def __init__(self) -> None:
        super().__init__(10, 4)
        self.up, self.down = nn.Linear(2, 4, bias=False), nn.Linear(10, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def with_hook() -> nn.Linear:
    head = linear()
    head.register_forward_hook(lambda module, args, output: 2.0 * output + 1.0)
    return head


def with_pre_hook() -> nn.Linear:
    head = linear()
    head.register_forward_pre_hook(lambda module, args: (args[0] * 3.0,))
    return head


def old_norm(norm: Callable[..., nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return norm(linear())


def patched() -> nn.Linear:
    head = linear()
    head.forward = lambda x: F.linear(x, head.weight * 2, head.bias)
    return head


AFFINE: dict[str, Callable[[], Any]] = {
    "plain": linear,
    "without bias": lambda: nn.Linear(10, 4, bias=False).double(),
    "weight standardisation": lambda: Standardised(10, 4).double(),
    "LoRA": lambda: LowRank().double(),
    "forward hook": with_hook,
    "forward pre-hook": with_pre_hook,
    "another forward": patched,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(linear()),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(linear()).eval(),
    "old weight_norm": lambda: old_norm(nn.utils.weight_norm),
    "old spectral_norm": lambda: old_norm(nn.utils.spectral_norm).eval(),
    "Sequential": lambda: nn.Sequential(linear()),
    "DataParallel": lambda: nn.DataParallel(linear()),
    "compiled": lambda: torch.compile(linear(), backend="eager"),
    "compiled Sequential": lambda: torch.compile(nn.Sequential(linear()), backend="eager"),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", AFFINE)
def test_the_logits_of_an_affine_head_add_up(kind: str, grad: bool) -> None:
    head, given = AFFINE[kind](), features()
    with torch.set_grad_enabled(grad):
        output = head(joined(given))
        logits = mmfuse.unimodal_logits(head, given, output=output)
    assert list(logits) == ["a", "b", "c"]
    torch.testing.assert_close(sum(logits.values()), output)
    # Each is what its own features do, and a third of what nothing does.
    nothing = head(torch.zeros(1, 10, dtype=torch.float64))
    others = {n: f if n == "b" else torch.zeros_like(f) for n, f in given.items()}
    torch.testing.assert_close(logits["b"], head(joined(others)) - 2 / 3 * nothing)
    assert all(z.requires_grad is grad for z in logits.values())


def test_the_weight_of_a_plain_head_is_read() -> None:
    head, given = linear(), features()
    calls: list[int] = []
    hook = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    logits = mmfuse.unimodal_logits(nn.Sequential(head), given)
    hook.remove()
    assert not calls
    expected = given["b"] @ head.weight[:, 3:8].t() + head.bias / 3
    torch.testing.assert_close(logits["b"], expected)


def test_other_heads_see_one_modality_at_a_time() -> None:
    head = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 4)).double()
    given = features()
    for call in (head, lambda x: head(x)):
        logits = mmfuse.unimodal_logits(call, given)
        alone = {n: f if n == "b" else torch.zeros_like(f) for n, f in given.items()}
        torch.testing.assert_close(logits["b"], head(joined(alone)))


class Doubling(nn.Sequential):
    """A Sequential with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + 1


def hooked_wrapper() -> nn.Module:
    head = nn.Sequential(linear())
    head.register_forward_hook(lambda module, args, output: 2 * output + 1)
    return head


@pytest.mark.parametrize("make", [hooked_wrapper, lambda: Doubling(linear())])
def test_a_wrapper_that_changes_the_output_is_called(make: Callable[[], nn.Module]) -> None:
    head, given = make(), features()
    for name, z in mmfuse.unimodal_logits(head, given).items():
        alone = {n: f if n == name else torch.zeros_like(f) for n, f in given.items()}
        torch.testing.assert_close(z, head(joined(alone)))


def stateful() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(10), nn.Dropout(0.4), nn.Linear(10, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)
    ).double()


class Counting(nn.Linear):
    """A subclass that notes every call in a buffer, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__(10, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(F.dropout(x, 0.3, self.training))


STATEFUL = {"a head with batch norm": stateful, "a subclass": lambda: Counting().double()}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: lambda x: m(x)], ids=["module", "callable"]
)
@pytest.mark.parametrize("kind", STATEFUL)
def test_nothing_is_left_in_the_head(kind: str, wrap: Any, grad: bool) -> None:
    """Batch norm's statistics, random numbers and flags are those of the training's pass alone."""
    head, given = STATEFUL[kind](), features()
    frozen = next((m for m in head.modules() if isinstance(m, nn.BatchNorm1d)), None)
    if frozen is not None:
        frozen.eval()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    tensors = {name: id(value) for name, value in head.named_buffers()}
    flags = [module.training for module in head.modules()]
    state = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        mmfuse.unimodal_logits(wrap(head), given)
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {name: id(value) for name, value in head.named_buffers()} == tensors
    assert [module.training for module in head.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_left_after_an_error() -> None:
    head = nn.Sequential(nn.BatchNorm1d(10), nn.Linear(9, 4)).double()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="shapes"):
            mmfuse.unimodal_logits(head, features())
        assert head.training and head[0].training
        assert all(torch.equal(v, before[name]) for name, v in head.state_dict().items())


def test_a_loss_goes_through_a_head_with_buffers() -> None:
    """The training's own pass may come between: its buffers are not those of the graph."""
    head, given = stateful(), features()
    logits = mmfuse.unimodal_logits(head, given)
    head(joined(given))
    sum(z.square().sum() for z in logits.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_scores_are_of_evaluation_mode_and_a_loss_of_training() -> None:
    head, given = (
        nn.Sequential(nn.Dropout(0.5), nn.Linear(10, 7), nn.Linear(7, 4)).double(),
        features(),
    )
    with torch.no_grad():
        scores = mmfuse.unimodal_logits(head, given)
    again = mmfuse.unimodal_logits(head.eval(), given)
    torch.testing.assert_close(scores["a"], again["a"])
    assert not torch.equal(mmfuse.unimodal_logits(head.train(), given)["a"], again["a"])


def test_300_steps_leave_the_model_as_good_as_without() -> None:
    """The report that this follows: 0.56 instead of 0.97 in evaluation mode."""
    states = []
    for scored in (True, False):
        torch.manual_seed(0)
        head = nn.Sequential(nn.BatchNorm1d(10), nn.Dropout(0.1), nn.Linear(10, 3)).double()
        optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
        for step in range(300):
            generator = torch.Generator().manual_seed(step)
            given = {
                n: torch.randn(8, d, generator=generator, dtype=torch.float64)
                for n, d in SIZES.items()
            }
            optimizer.zero_grad()
            head(joined(given)).square().sum().backward()
            if scored:
                mmfuse.unimodal_logits(head, given)
            optimizer.step()
        states.append(head.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["weight standardisation", "Sequential", "weight_norm"])
def test_it_compiles_whole(kind: str, grad: bool) -> None:
    torch._dynamo.reset()
    head, given = AFFINE[kind](), features()
    compiled = torch.compile(mmfuse.unimodal_logits, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        for name, z in compiled(head, given).items():
            torch.testing.assert_close(z, mmfuse.unimodal_logits(head, given)[name])


def test_batch_norm_compiles_whole_and_counts_one_pass() -> None:
    torch._dynamo.reset()
    head, given = stateful().eval(), features()
    head[0].train()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(given: dict[str, Tensor]) -> Tensor:
        logits = mmfuse.unimodal_logits(head, given)
        return head(joined(given)).sum() + sum(z.sum() for z in logits.values())

    step(given)
    assert head[0].num_batches_tracked == 1


def test_an_empty_batch() -> None:
    for kind in ("plain", "weight standardisation"):
        logits = mmfuse.unimodal_logits(AFFINE[kind](), features(0))
        assert {z.shape for z in logits.values()} == {(0, 4)}


class TestErrors:
    """They name what was given, and what to do."""

    def test_shapes(self) -> None:
        head = nn.Linear(5, 4)
        two = {"a": torch.ones(1, 3), "b": torch.ones(1, 3)}
        for each in (head, nn.Sequential(head), Standardised(5, 4)):
            message = r"takes 5 features, but \{'a': 3, 'b': 3\} add up to 6"
            with pytest.raises(ValueError, match=message):
                mmfuse.unimodal_logits(each, two)
        with pytest.raises(ValueError, match=r"takes 5 features, but .* add up to 3"):
            mmfuse.unimodal_logits(head, {"a": torch.ones(1, 3)})
        with pytest.raises(ValueError, match=r"features\['a'\] must be \[B, D\], got \[3\]"):
            mmfuse.unimodal_logits(head, {"a": torch.ones(3)})
        with pytest.raises(ValueError, match=r"features\['b'\] has 2 rows, features\['a'\] 1"):
            mmfuse.unimodal_logits(head, {"a": torch.ones(1, 3), "b": torch.ones(2, 2)})
        with pytest.raises(ValueError, match="at least one modality"):
            mmfuse.unimodal_logits(head, {})

    def test_types(self) -> None:
        head, given = linear(), features()
        with pytest.raises(TypeError, match="features must map names to tensors, got tuple"):
            mmfuse.unimodal_logits(head, tuple(given.values()))
        with pytest.raises(TypeError, match=r"got Linear .are head and features swapped"):
            mmfuse.unimodal_logits(given, head)
        with pytest.raises(TypeError, match="head must be a module or another callable, got int"):
            mmfuse.unimodal_logits(4, given)
        with pytest.raises(TypeError, match="head must be a module, got the class Linear"):
            mmfuse.unimodal_logits(nn.Linear, {"a": torch.randn(2, 3)})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"features\['a'\] has dtype torch.int64"):
            mmfuse.unimodal_logits(nn.Linear(3, 2), {"a": torch.ones(2, 3).long()})
        with pytest.raises(TypeError, match=r"features\['a'\] is not a tensor but list"):
            mmfuse.unimodal_logits(head, {"a": [1.0], "b": torch.ones(1, 2)})
        with pytest.raises(TypeError, match=r"features\['a'\] has layout torch.sparse_coo"):
            mmfuse.unimodal_logits(nn.Linear(3, 2), {"a": torch.ones(2, 3).to_sparse()})

    def test_features_of_another_dtype_or_place_than_the_head(self) -> None:
        head, half = nn.Linear(3, 2), torch.ones(2, 3, dtype=torch.bfloat16)
        with pytest.raises(
            TypeError, match=r"features\['a'\] has dtype torch.bfloat16, the head t"
        ):
            mmfuse.unimodal_logits(head, {"a": half})
        with torch.autocast("cpu", torch.bfloat16):
            assert mmfuse.unimodal_logits(head, {"a": half})["a"].dtype == torch.bfloat16
            with pytest.raises(TypeError, match=r"has dtype torch\.float64, the head torch"):
                mmfuse.unimodal_logits(head, {"a": half.double()})
        with pytest.raises(ValueError, match=r"features\['a'\] is on meta, the head on cpu"):
            mmfuse.unimodal_logits(head, {"a": half.to("meta")})
        with pytest.raises(TypeError, match=r"has dtype torch\.bfloat16, the head torch"):
            mmfuse.unimodal_logits(head.to("meta"), {"a": half.to("meta")})
        with pytest.raises(ValueError, match=r"features\['b'\] is on meta, features\['a'\] on cpu"):
            mmfuse.unimodal_logits(head, {"a": half, "b": half.to("meta")})

    def test_a_lazy_head(self) -> None:
        for head in (nn.LazyLinear(4), nn.Sequential(nn.LazyLinear(7), nn.Linear(7, 4))):
            with pytest.raises(ValueError, match="lazy and has no weight yet: call the model once"):
                mmfuse.unimodal_logits(head, features())

    def test_an_output_that_cancels_is_the_same(self) -> None:
        """Its rounding is that of its terms."""
        given = {"a": torch.randn(1, 500), "b": torch.randn(1, 500)}
        head = nn.Linear(1000, 4)
        with torch.no_grad():
            head.bias -= head(joined(given))[0]
        output = head(joined(given))
        assert output.abs().max() < 1e-5
        logits = mmfuse.unimodal_logits(head, given, output=output)
        assert not torch.equal(sum(logits.values()), output)

    def test_an_output_that_is_off_in_the_tenth_digit(self) -> None:
        """float64 shows it, since its rounding is smaller; in float32 rounding is larger."""
        head, given = linear(), features()
        output = head(joined(given)) + 1e-7
        with pytest.raises(ValueError, match=r"by up to 1e-07"):
            mmfuse.unimodal_logits(head, given, output=output)
        given = {n: f.float() for n, f in given.items()}
        mmfuse.unimodal_logits(head.float(), given, output=output.float())

    def test_features_in_another_order_than_the_head_gets_them(self) -> None:
        head = nn.Linear(6, 4)
        given = {"a": torch.randn(5, 3), "b": torch.randn(5, 3)}
        output = head(torch.cat([given["b"], given["a"]], dim=1))
        with pytest.raises(
            ValueError, match=r"of \['a', 'b'\] add up to something else than output"
        ):
            mmfuse.unimodal_logits(head, given, output=output)
        swapped = {"b": given["b"], "a": given["a"]}
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            head, swapped = head.to(dtype), {n: f.to(dtype) for n, f in swapped.items()}
            output = head(joined(swapped))
            mmfuse.unimodal_logits(head, swapped, output=output)
            wrong = {"a": swapped["a"], "b": swapped["b"]}
            with pytest.raises(ValueError, match="add up to something else"):
                mmfuse.unimodal_logits(head, wrong, output=output)
        with pytest.raises(ValueError, match=r"output must have shape \[5, 4\]"):
            mmfuse.unimodal_logits(head, swapped, output=output[0])
        mlp = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).double()
        with pytest.raises(ValueError, match="output= is for affine heads"):
            mmfuse.unimodal_logits(mlp, swapped, output=output)


def _of_ranks(rank: int, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Logits, the gradient of the head from a loss of them, and the head's output; whole."""
    torch.manual_seed(0)
    head: nn.Module = linear()
    given = features()
    if kind == "fully_shard":
        fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    elif kind == "ddp":
        head = nn.parallel.DistributedDataParallel(head)
    output = head(joined(given))
    logits = mmfuse.unimodal_logits(head, given, output=output)
    (output.square().sum() + sum(z.square().sum() for z in logits.values())).backward()
    grads = {n.removeprefix("module."): p.grad for n, p in head.named_parameters()}
    return whole_state(logits), whole_state(grads), output.detach()


@pytest.mark.parametrize("kind", ["fully_shard", "ddp"])
def test_a_head_of_two_ranks(kind: str) -> None:
    """FSDP2 gathers the weight when the head is called; its own part alone would be wrong."""
    logits, grads, output = _of_ranks(0, "alone")
    for others, of_head, joint in ranks(2).run(_of_ranks, kind):
        torch.testing.assert_close(joint, output)
        for name, z in logits.items():
            torch.testing.assert_close(others[name], z)
        for name, grad in grads.items():
            torch.testing.assert_close(of_head[name], grad)
