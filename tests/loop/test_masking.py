"""Each modality's outputs by masking the inputs of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from balancing import ACTING, LOGITS_ONLY, acted, start
from ranks import ranks
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse
from mmfuse import METHODS, unimodal_outputs

SIZES = {"audio": 5, "visual": 7, "text": 3}
LABELS = torch.tensor([0, 1, 2, 0, 1, 1])


class Fusion(nn.Module):
    """Attention over the modalities, batch norm and dropout: no encoder is one modality's own."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.names = list(SIZES)[:count]
        self.stems = nn.ModuleDict({n: nn.Linear(SIZES[n], 8) for n in self.names})
        self.norm = nn.BatchNorm1d(8)
        self.mix = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.4), nn.Linear(8, 3))

    def forward(self, **given: Tensor) -> Tensor:
        tokens = torch.stack([self.norm(self.stems[n](given[n])) for n in self.names], dim=1)
        return self.head(self.mix(tokens, tokens, tokens)[0].sum(1))


class TwoArguments(nn.Module):
    """Takes its inputs by position, and calls them something else."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Fusion()

    def forward(self, a: Tensor, v: Tensor) -> Tensor:
        return self.model(audio=a, visual=v)


def data(count: int = 2, rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(rows, SIZES[n], generator=generator) for n in list(SIZES)[:count]}


def made(count: int = 2) -> Fusion:
    torch.manual_seed(0)
    model = Fusion(count)
    for _ in range(3):  # the statistics are of something
        model(**data(count))
    return model


def from_yesterday(name: str, x: Tensor) -> Tensor:
    return torch.full_like(x, float(len(name)))


BASELINES: dict[str, tuple[Any, Callable[[str, Tensor], Tensor]]] = {
    "zero": ("zero", lambda n, x: torch.zeros_like(x)),
    "mean": ("mean", lambda n, x: x.mean(0, keepdim=True).expand_as(x)),
    "callable": (from_yesterday, from_yesterday),
}


def loop(
    model: nn.Module, given: dict[str, Tensor], mask: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """The masked forward passes, one after another."""
    return {
        name: model(**{n: x if n == name else mask(n, x) for n, x in given.items()})
        for name in given
    }


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", BASELINES)
class TestEqualToALoop:
    """They agree to the bit; scores of evaluation mode, a loss of the module's own."""

    def test_scores(self, kind: str, count: int) -> None:
        baseline, mask = BASELINES[kind]
        model, given = made(count), data(count)
        found = unimodal_outputs(model, given, baseline=baseline)
        with torch.no_grad():
            expected = loop(copy.deepcopy(model).eval(), given, mask)
        assert list(found) == list(given)
        for name, z in expected.items():
            assert torch.equal(found[name], z) and not found[name].requires_grad
        assert not torch.equal(*list(found.values())[:2])

    def test_a_loss(self, kind: str, count: int) -> None:
        """The passes draw what the loop does, and batch norm uses the batch's statistics."""
        baseline, mask = BASELINES[kind]
        model, given = made(count), data(count)
        other = copy.deepcopy(model)
        torch.manual_seed(7)
        found = unimodal_outputs(model, given, baseline=baseline, differentiable=True)
        torch.manual_seed(7)
        expected = loop(other, given, mask)
        for z in (found, expected):
            sum(F.cross_entropy(each, LABELS) for each in z.values()).backward()
        for name, z in expected.items():
            assert torch.equal(found[name], z), name
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert p.grad is not None and torch.equal(p.grad, q.grad)


class Forgetful(nn.Module):
    """Counts calls in a buffer and draws a random number in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(audio=audio, visual=visual) + torch.rand(())


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        lambda m: {"model": m},
        lambda m: {"model": lambda **given: m(**given)},
        lambda m: {"model": m, "forward": lambda given: m(**given)},
        lambda m: {"model": m, "forward": lambda given: m.forward(**given)},
        lambda m: {"model": nn.Linear(1, 1), "forward": lambda given: m(**given)},
    ],
    ids=["module", "callable", "forward", "a method of the module", "forward of another"],
)
def test_nothing_is_left_in_the_model(call: Any, differentiable: bool) -> None:
    model = Forgetful()
    called = call(model)
    model.inner.head[0].eval()
    before = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    shuffled = unimodal_outputs(
        **called,
        inputs=data(),
        baseline=lambda name, x: x[torch.randperm(len(x))],
        differentiable=differentiable,
    )
    assert all(z.requires_grad is differentiable for z in shuffled.values())
    assert {n: id(b) for n, b in model.named_buffers()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(b, before[name][1]) for name, b in model.named_buffers())
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())
    assert not nn.modules.module._global_forward_pre_hooks


class InPlace(nn.Module):
    """Changes its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made()

    def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
        return self.inner(audio=audio.add_(1), visual=visual.mul_(2).add_(1))


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("baseline", ["zero", lambda name, x: torch.full_like(x, 0.5)])
def test_nothing_is_left_in_the_inputs(baseline: Any, differentiable: bool) -> None:
    """The model changes them in place: each pass begins with the given ones."""
    model, given = InPlace().eval(), data()
    found = unimodal_outputs(model, given, baseline=baseline, differentiable=differentiable)
    for name, x in data().items():
        assert torch.equal(given[name], x)
        others = {n: torch.full_like(v, 0.5 * (baseline != "zero")) for n, v in data().items()}
        torch.testing.assert_close(found[name], model(**{**others, name: x}))


def test_a_lazy_model() -> None:
    """A pass of ours would give it its first weights."""
    model = nn.Sequential(nn.LazyLinear(3))
    for call in ({"model": model}, {"model": len, "forward": model}):
        with pytest.raises(ValueError, match="is lazy and has no weight yet: call the model once"):
            unimodal_outputs(**call, inputs={"input": torch.ones(2, 4)})
    assert model[0].has_uninitialized_params()


def test_nothing_is_left_after_an_error() -> None:
    model, given = made(), data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given["visual"] = given["visual"][:, :3]
    for differentiable in (True, False):
        with pytest.raises(RuntimeError, match="shapes"):
            unimodal_outputs(model, given, differentiable=differentiable)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_training_pass_goes_on_as_without(when: str) -> None:
    """Autocast, which keeps weights from one pass to the next, is among the cases."""
    results = []
    for scored in (True, False):
        model, given = made(), data()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if scored and when == "before":
                unimodal_outputs(model, given)
            loss = F.cross_entropy(model(**given), LABELS)
            if scored and when == "after":
                unimodal_outputs(model, given)
        loss.backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_loss_of_both_passes_goes_back() -> None:
    """The training's own pass may come between: its buffers are not those of the graph."""
    model, given = made(), data()
    alone = unimodal_outputs(model, given, differentiable=True)
    joint = model(**given)
    sum(F.cross_entropy(z, LABELS) for z in (joint, *alone.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        own_mode = unimodal_outputs(model, given, differentiable=True)
    assert not any(z.requires_grad for z in own_mode.values())


class TestForms:
    """The ways to call a model, and the kinds of its outputs."""

    def expected(self, model: Fusion) -> dict[str, Tensor]:
        return unimodal_outputs(model, data())

    def check(self, found: dict[str, Tensor], model: Fusion) -> None:
        for name, z in self.expected(model).items():
            assert torch.equal(found[name], z)

    def test_by_position(self) -> None:
        model = TwoArguments()
        found = unimodal_outputs(model, data(), forward=lambda x: model(x["audio"], x["visual"]))
        self.check(found, model.model)

    def test_one_mapping(self) -> None:
        inner = made()
        model = Taking(inner, lambda batch: inner(**batch))
        self.check(unimodal_outputs(model, data(), forward=model), inner)

    def test_what_is_no_modalitys(self) -> None:
        inner = made()
        seen = []

        def with_mask(audio: Tensor, visual: Tensor, mask: Tensor) -> Tensor:
            seen.append(mask)
            return inner(audio=audio, visual=visual)

        mask = torch.ones(6)
        found = unimodal_outputs(inner, data(), forward=lambda x: with_mask(**x, mask=mask))
        assert [m is mask for m in seen] == [True, True]
        self.check(found, inner)

    def test_nested_outputs(self) -> None:
        inner = made()
        for wrap, pick in (
            (lambda z: Output(z.sum(), z), lambda out: out.logits),
            (lambda z: {"logits": z}, lambda out: out["logits"]),
            (lambda z: (z, None), lambda out: out[0]),
        ):
            model = Taking(inner, lambda wrap=wrap, **x: wrap(inner(**x)))
            self.check(unimodal_outputs(model, data(), output=pick), inner)
            with pytest.raises(TypeError, match=r"the model returns \w+ where 'audio' is alone"):
                unimodal_outputs(model, data())
            with pytest.raises(TypeError, match="output= must return a tensor, got NoneType"):
                unimodal_outputs(model, data(), output=lambda out: None)

    def test_parallel_and_compiled(self) -> None:
        model = made()
        self.check(unimodal_outputs(nn.DataParallel(model), data()), model)
        compiled = torch.compile(model, backend="eager")
        self.check(unimodal_outputs(compiled, data()), model)

    def test_one_modality_is_not_masked(self) -> None:
        def never(name: str, x: Tensor) -> Tensor:
            raise AssertionError(name)

        model, given = made(1), data(1)
        found = unimodal_outputs(model, given, baseline=never)
        assert torch.equal(found["audio"], model.eval()(**given))

    def test_a_callable_is_called_once_for_each(self) -> None:
        asked = []
        unimodal_outputs(
            made(3), data(3), baseline=lambda n, x: (asked.append(n), torch.ones_like(x))[1]
        )
        assert asked == list(SIZES)

    def test_token_ids(self) -> None:
        words, dense = nn.Embedding(9, 3), nn.Linear(5, 3)
        given = {"text": torch.tensor([[1, 2], [3, 0]]), "audio": torch.randn(2, 5)}

        def model(text: Tensor, audio: Tensor) -> Tensor:
            return words(text).mean(1) + dense(audio)

        found = unimodal_outputs(model, given)
        torch.testing.assert_close(found["audio"], words.weight[0] + dense(given["audio"]))
        wanted = r"inputs\['text'\] has dtype torch.int64, whose mean the model cannot take"
        with pytest.raises(TypeError, match=wanted):
            unimodal_outputs(model, given, baseline="mean")

    def test_a_mean_that_the_model_looks_at_from_another_side(self) -> None:
        given = {n: torch.randn(4, 3, 2) for n in ("a", "b")}
        found = unimodal_outputs(lambda a, b: a.view(12, 2) + b.view(12, 2), given, baseline="mean")
        mean = given["b"].mean(0).expand(4, 3, 2).reshape(12, 2)
        torch.testing.assert_close(found["a"], given["a"].view(12, 2) + mean)

    def test_an_empty_batch(self) -> None:
        for baseline in ("zero", "mean"):
            found = unimodal_outputs(made().eval(), data(rows=0), baseline=baseline)
            assert {z.shape for z in found.values()} == {(0, 3)}


class Output(NamedTuple):
    """An output like those of Hugging Face's models."""

    loss: Tensor
    logits: Tensor


class Taking(nn.Module):
    """Another module, called as a function says."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.call(*given, **named)


@pytest.mark.slow
@pytest.mark.parametrize("differentiable", [True, False])
def test_it_compiles_whole(differentiable: bool) -> None:
    torch._dynamo.reset()
    model, given = made(3), data(3)
    model.head[0].p = model.mix.dropout = 0.0  # a compiled graph draws other numbers
    compiled = torch.compile(unimodal_outputs, backend="aot_eager", fullgraph=True)
    before = {name: b.clone() for name, b in model.named_buffers()}
    for baseline in ("zero", "mean"):
        more = {"baseline": baseline, "differentiable": differentiable}
        expected = unimodal_outputs(model, given, **more)
        for name, z in compiled(model, given, **more).items():
            torch.testing.assert_close(z, expected[name])
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert model.training


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", LOGITS_ONLY)
def test_methods_take_them_as_logits(name: str, count: int) -> None:
    """Modalities meet right behind their stems, which are what is balanced."""
    model, given = made(count), data(count)
    method = METHODS[name](dict(model.stems), **ACTING.get(name, {}))
    results = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        start(method)
        optimizer.zero_grad()
        F.cross_entropy(model(**given), LABELS).backward()
        results.append(method.step(unimodal_outputs(model, given), LABELS))
        optimizer.step()
    assert acted(method, results)
    assert all(bool(out.finite) for out in results)
    assert results[0].coefficients.shape == (count,)


def test_mmpareto_takes_losses_of_them() -> None:
    model, given = made(), data()
    method = mmfuse.MMPareto(dict(model.stems))
    alone = unimodal_outputs(model, given, differentiable=True)
    losses = {name: F.cross_entropy(z, LABELS) for name, z in alone.items()}
    out = method.backward(F.cross_entropy(model(**given), LABELS), unimodal_losses=losses)
    assert out.finite and model.stems["audio"].weight.grad.abs().sum() > 0


class TestErrors:
    """They name what was given, and what to do."""

    def test_types(self) -> None:
        model, given = made(), data()
        for arguments, message in (
            ((given, model), "model must be .*got dict .are model and inputs swapped"),
            ((3, given), "model must be a module or another callable, got int"),
            ((model, tuple(given.values())), "inputs must map names to tensors, got tuple"),
            ((model, {**given, "mask": None}), r"inputs\['mask'\] is not a tensor but NoneType"),
        ):
            with pytest.raises(TypeError, match=message):
                unimodal_outputs(*arguments)
        with pytest.raises(ValueError, match="at least one modality"):
            unimodal_outputs(model, {})

    def test_baselines(self) -> None:
        model, given = made(), data()
        for baseline in ("noise", 0.0, None):
            with pytest.raises(ValueError, match="baseline must be one of 'zero', 'mean' or a"):
                unimodal_outputs(model, given, baseline=baseline)
        for made_of, message in (
            (lambda n, x: x[:1], r"of 'audio' must be like the input, \[6, 5\] torch.float32 on"),
            (lambda n, x: x.double(), r"it is \[6, 5\] torch.float64 on cpu"),
            (lambda n, x: x.to("meta"), "on meta"),
        ):
            with pytest.raises(ValueError, match=message):
                unimodal_outputs(model, given, baseline=made_of)
        with pytest.raises(TypeError, match=r"baseline of 'audio' must be a tensor .*got float"):
            unimodal_outputs(model, given, baseline=lambda n, x: 0.0)
        with pytest.raises(ValueError, match=r"inputs\['a'\] has no batch"):
            unimodal_outputs(
                lambda a, b: a + b, dict.fromkeys("ab", torch.ones(())), baseline="mean"
            )

    def test_names_that_the_model_does_not_take(self) -> None:
        model = TwoArguments()
        message = (
            r"cannot be called with arguments \['audio', 'visual'\]: missing a required argument: "
            r"'a'; give forward="
        )
        with pytest.raises(TypeError, match=message):
            unimodal_outputs(model, data())

    def test_a_type_error_of_the_models_own_is_left_alone(self) -> None:
        def model(audio: Tensor, visual: Tensor) -> Tensor:
            raise TypeError("not today")

        with pytest.raises(TypeError, match=r"^not today$"):
            unimodal_outputs(model, data())


def _of_ranks(rank: int) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Outputs in DistributedDataParallel, and each rank's statistics before and after."""
    model = made()
    ddp = nn.parallel.DistributedDataParallel(model)
    model.norm.running_mean.fill_(float(rank))
    before = [b.clone() for b in model.buffers()]
    if rank == 0:  # nothing is synchronised, so that one rank may ask alone
        unimodal_outputs(ddp, data())
    return unimodal_outputs(ddp, data()), before, list(model.buffers())


def test_ranks_are_not_synchronised() -> None:
    """DistributedDataParallel itself would give all of them the first rank's statistics."""
    for rank, (found, before, after) in enumerate(ranks(2).run(_of_ranks)):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        model = made()
        model.norm.running_mean.fill_(float(rank))
        for name, z in unimodal_outputs(model, data()).items():
            torch.testing.assert_close(found[name], z)
