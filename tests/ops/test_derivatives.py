"""Every op has its derivatives or says that it has none: no wrong number, no 0."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import samples
import torch
from cells import ON_THE_CPU, Cell
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

import mmfuse
from mmfuse import NoiseStream, ops
from mmfuse.ops._registry import OPS, Op

#: The operators that have a gradient of some kind, those of backward passes among them.
WITH_FORMULA = sorted(name for name, op in OPS.items() if op._formula is not None)
#: Their public ops, each with an operator for its gradient or a gradient in plain PyTorch.
DIFFERENTIABLE = sorted({OPS[name].public for name in WITH_FORMULA})
#: Without those that write into what they are given.
CONSTANT = sorted(n for n in set(OPS) - set(WITH_FORMULA) if not n.endswith("_"))
#: The others say so when they are differentiated twice.
TWICE = {"drop_modalities", "noisy_views", "redundancy_ratio", "scale_grad"}

ROWS, WIDTH, CLASSES = 6, 4, 3

# PyTorch's own, at the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


class Example(NamedTuple):
    """A call of a public op on two [ROWS, WIDTH] features, and the same in plain PyTorch."""

    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]


class _Scaled(torch.autograd.Function):
    """scale_grad in plain PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grads[0], None


def examples(cell: Cell) -> dict[str, Example]:
    """One for each differentiable op: a scalar that is curved in both features."""
    backend, device = cell.backend, cell.device
    labels = torch.tensor([0, 1, 2, 1, -100, 2], device=device)
    stream = NoiseStream(3, device)
    q = torch.tensor([0.4, 0.6], device=device)
    half = torch.tensor(0.5, dtype=torch.float64, device=device)

    def kept(m: int) -> Tensor:
        return (stream.uniform(ROWS, m, 0) > q[m])[:, None]

    def scores(a: Tensor, b: Tensor) -> Tensor:
        found = ops.modality_scores([a, b], labels, backend=backend)
        return (found.prob + found.log_prob).square().sum()

    def plain_scores(a: Tensor, b: Tensor) -> Tensor:
        rows = labels != -100
        index = labels[rows, None]
        p = [z[rows].softmax(1).gather(1, index).squeeze(1) for z in (a, b)]
        return sum((x.mean() + x.log().mean()).square() for x in p)

    def drop(a: Tensor, b: Tensor) -> Tensor:
        left = ops.drop_modalities([a, b], q, stream, scale=half, backend=backend).features
        return (left[0] * left[1].square() + left[0]).exp().sum()

    def plain_drop(a: Tensor, b: Tensor) -> Tensor:
        left = [torch.where(kept(m), half * x, 0) for m, x in enumerate((a, b))]
        return (left[0] * left[1].square() + left[0]).exp().sum()

    def views(a: Tensor, b: Tensor) -> Tensor:
        first, second, _ = ops.noisy_views(a * b, 0.3, stream, backend=backend)
        return (first.square() * second).sum()

    def plain_views(a: Tensor, b: Tensor) -> Tensor:
        nothing = torch.zeros(ROWS, WIDTH, dtype=torch.float64, device=device)
        one, two, _ = ops.noisy_views(nothing, 0.3, stream, backend=backend)
        return ((a * b + one).square() * (a * b + two)).sum()

    def scale(a: Tensor, b: Tensor) -> Tensor:
        return (ops.scale_grad(a, half, backend=backend).square() * b).sum()

    def histogram(a: Tensor, b: Tensor) -> Tensor:
        return ops.soft_histogram(a.T, b.T, 3, backend=backend).square().sum()

    def plain_table(a: Tensor, b: Tensor) -> Tensor:
        def shares(x: Tensor) -> Tensor:
            x = x.T
            low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
            t = (x - low) / (high - low) * 2
            return (1 - (t[:, :, None] - torch.arange(3, device=device)).abs()).clamp(min=0)

        return torch.einsum("pni,pnj->pij", shares(a), shares(b))

    def plain_histogram(a: Tensor, b: Tensor) -> Tensor:
        return plain_table(a, b).square().sum()

    def information(a: Tensor, b: Tensor) -> Tensor:
        found = ops.mutual_information(a.T, b.T, 3, "soft", backend=backend)
        return (found.mi + found.nmi * found.h_x).sum()

    def plain_information(a: Tensor, b: Tensor) -> Tensor:
        p = plain_table(a, b) / ROWS
        parts = (p.sum(2), p.sum(1), p.flatten(1))
        h_x, h_y, h_xy = (-(q * q.clamp(min=1e-300).log()).sum(1) for q in parts)
        mi = h_x + h_y - h_xy
        return (mi + 2 * mi / (h_x + h_y) * h_x).sum()

    def plain_nce(a: Tensor, b: Tensor) -> Tensor:
        similarity, i = a @ b.T / half, torch.arange(ROWS, device=device)
        return -(F.cross_entropy(similarity, i) + F.cross_entropy(similarity.T, i)) / 2

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return ops.logit_divergence([a], [b], kind="mixture", backend=backend)[0].square()

    def plain_divergence(a: Tensor, b: Tensor) -> Tensor:
        log_p, log_q = a.log_softmax(1), b.log_softmax(1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (log_m.exp() * (log_m - (log_p + log_q) / 2)).sum(1).mean().square()

    return {
        "modality_scores": Example(scores, plain_scores),
        "drop_modalities": Example(drop, plain_drop),
        "noisy_views": Example(views, plain_views),
        "redundancy_ratio": Example(
            lambda a, b: ops.redundancy_ratio(a, b, a.square().mean(), backend=backend).square(),
            lambda a, b: ((a - b).square().mean() / (a.square().mean() + 1e-12)).square(),
        ),
        "scale_grad": Example(scale, lambda a, b: (_Scaled.apply(a, 0.5).square() * b).sum()),
        "paired_cosine": Example(
            lambda a, b: ops.paired_cosine(a, b, backend=backend),
            lambda a, b: (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).mean(),
        ),
        "soft_histogram": Example(histogram, plain_histogram),
        "mutual_information": Example(information, plain_information),
        "logit_divergence": Example(divergence, plain_divergence),
        "info_nce": Example(lambda a, b: ops.info_nce(a, b, half, backend=backend), plain_nce),
    }


def features(cell: Cell) -> list[Tensor]:
    return [torch.randn(ROWS, WIDTH, dtype=torch.float64, device=cell.device) for _ in range(2)]


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """A wrong derivative is off by percents; sums of some dozens of float64 numbers by 1e-14."""
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10 * float(y.detach().abs().max()))


def penalties(function: Callable[..., Tensor], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a gradient penalty."""
    leaves = [v.clone().requires_grad_() for v in values]
    grads = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


def arguments_of(op: Op, cell: Cell) -> list[Any]:
    """A sample's arguments, new and without graphs."""
    first = samples.arguments(cell.device)[op.name][0]
    return list(tree_map_only(Tensor, lambda t: t.detach().clone(), first))


def floats(values: Any) -> list[Tensor]:
    leaves = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    return [t for t in leaves if t.is_floating_point()]


def named(name: str) -> str:
    """A pattern for the op's public name, as its errors say it."""
    return rf"mmfuse\.ops\.{name} "


def test_every_op_is_either_constant_or_has_an_example() -> None:
    """Every gradient's operator also says which gradient it has itself."""
    assert set(examples(Cell("reference", "cpu"))) == set(DIFFERENTIABLE)
    assert {name for name in OPS if name.endswith("_backward")} <= set(WITH_FORMULA)
    assert set(DIFFERENTIABLE).isdisjoint(CONSTANT)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_first_derivatives_also_under_torch_func(cell: Cell, name: str) -> None:
    call, plain = examples(cell)[name]
    values = features(cell)
    leaves = [v.clone().requires_grad_() for v in values]
    expected = torch.autograd.grad(plain(*leaves), leaves)
    close(torch.autograd.grad(call(*leaves), leaves), expected)
    close(torch.func.grad(call, (0, 1))(*values), expected)
    close(torch.func.vjp(call, *values)[1](leaves[0].new_ones(())), expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_right_or_an_error(cell: Cell, name: str) -> None:
    call, plain = examples(cell)[name]
    values = features(cell)

    def penalty(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *v: sum(g.square().sum() for g in torch.func.grad(function, (0, 1))(*v))

    if name in TWICE:
        expected = penalties(plain, values)
        assert all(bool(x.any()) for x in expected)
        close(penalties(call, values), expected)
        close(torch.func.grad(penalty(call), (0, 1))(*values), expected)
        return
    for twice in (penalties, lambda f, v: torch.func.grad(penalty(f), (0, 1))(*v)):
        with pytest.raises(RuntimeError, match=named(name) + "has no second derivative"):
            twice(call, values)
    assert '"Equivalent to"' in _message(lambda: penalties(call, values))
    assert "Equivalent to" in inspect.getdoc(getattr(ops, name))


def _message(call: Callable[[], object]) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_graph_that_nobody_differentiates_is_no_error(cell: Cell, name: str) -> None:
    call, plain = examples(cell)[name]
    leaves = [v.requires_grad_() for v in features(cell)]
    close(
        torch.autograd.grad(call(*leaves), leaves, create_graph=True),
        torch.autograd.grad(plain(*leaves), leaves),
    )


def test_the_mask_of_drop_modalities_has_derivatives_of_any_order(cell: Cell) -> None:
    call, plain = examples(cell)["drop_modalities"]

    def third(function: Callable[..., Tensor], values: Sequence[Tensor]) -> Tensor:
        leaf = values[0].clone().requires_grad_()
        found = function(leaf, values[1])
        for _ in range(3):
            (grad,) = torch.autograd.grad(found, leaf, create_graph=True)
            found = grad.square().sum()
        return grad

    values = [0.1 * v for v in features(cell)]
    close([third(call, values)], [third(plain, values)])


@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_an_error(cell: Cell, name: str, recording: bool) -> None:
    """no_grad, which does not switch it off, and reverse mode over it are among the cases."""
    call = examples(cell)[name].call
    values = features(cell)
    error = pytest.raises(NotImplementedError, match=named(name) + "has no forward-mode")
    with torch.set_grad_enabled(recording):
        with forward_ad.dual_level(), error:
            call(forward_ad.make_dual(values[0], values[1]), values[1])
        with error:
            torch.func.jvp(call, tuple(values), tuple(values))
        with forward_ad.dual_level():
            call(*values)  # no tangent comes in
    with error:
        torch.func.jvp(torch.func.grad(call), tuple(values), tuple(values))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_is_an_error(cell: Cell, name: str) -> None:
    call = examples(cell)[name].call
    batches = [torch.stack([v, v + 1]) for v in features(cell)]
    for function in (call, torch.func.grad(call)):
        with pytest.raises(NotImplementedError, match=named(name) + r"does not go .*\.vmap"):
            torch.func.vmap(function)(*batches)


@pytest.mark.parametrize("name", WITH_FORMULA)
def test_operators_called_by_themselves_lose_no_tangent(cell: Cell, name: str) -> None:
    """Compiled code calls them so: past the public functions."""
    overload = OPS[name].overloads[cell.backend]
    arguments = arguments_of(OPS[name], cell)
    public = OPS[name].public
    with forward_ad.dual_level():
        dual = tree_map_only(Tensor, _with_tangent, arguments)
        with pytest.raises(NotImplementedError, match=named(public) + "has no forward-mode"):
            overload(*dual)
    leaves = tree_map_only(Tensor, lambda t: t.requires_grad_(t.is_floating_point()), arguments)
    with pytest.raises(RuntimeError, match=r"under torch\.func"):
        torch.func.grad(lambda factor: floats(overload(*_times(leaves, factor)))[0].sum())(
            torch.ones((), device=cell.device)
        )
    if name.endswith("_backward") and public not in TWICE:
        found = floats(overload(*leaves))
        with pytest.raises(RuntimeError, match=named(public) + "has no second derivative"):
            sum(x.sum() for x in found).backward()


def _with_tangent(t: Tensor) -> Tensor:
    return forward_ad.make_dual(t, torch.ones_like(t)) if t.is_floating_point() else t


def _times(arguments: Any, factor: Tensor) -> Any:
    return tree_map_only(
        Tensor, lambda t: (t * factor).to(t.dtype) if t.is_floating_point() else t, arguments
    )


@pytest.mark.parametrize("name", CONSTANT)
def test_results_without_a_gradient_are_constants(cell: Cell, name: str) -> None:
    """An operator by itself and the op have neither gradient nor tangent, as after detach."""
    op = OPS[name]
    arguments = arguments_of(op, cell)
    device = torch.device(cell.device)
    leaves = tree_map_only(Tensor, lambda t: t.requires_grad_(t.is_floating_point()), arguments)
    for call in (op.overloads[cell.backend], lambda *a: op(cell.backend, device, *a)):
        plain = floats(call(*leaves))
        assert plain
        assert not any(x.requires_grad for x in plain)
        with forward_ad.dual_level():
            dual = tree_map_only(Tensor, _with_tangent, leaves)
            found = floats(call(*dual))
            assert all(forward_ad.unpack_dual(x).tangent is None for x in found)
            assert not any(x.requires_grad for x in found)
        assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))


@pytest.mark.parametrize("what", ["labels", "weight", "pos_weight"])
@pytest.mark.parametrize("name", ["modality_scores", "sample_scores"])
def test_derivatives_in_targets_and_weights_are_errors(cell: Cell, name: str, what: str) -> None:
    """There are none; a learned weight or a mixed target would stay as it is in silence."""
    logits = features(cell)
    given = {
        "labels": torch.full((ROWS, WIDTH), 0.25, dtype=torch.float64, device=cell.device),
        "weight": torch.ones(WIDTH, dtype=torch.float64, device=cell.device),
    }
    if what == "pos_weight":
        given["pos_weight"] = torch.ones_like(given["weight"])

    def call(value: Tensor) -> Tensor:
        values = {**given, what: value}
        many = "pos_weight" in values
        scores = getattr(ops, name)(logits, **values, multilabel=many, backend=cell.backend)
        return scores.prob.sum()

    value = given[what]
    with pytest.raises(ValueError, match=f"{what} must not require a gradient"):
        call(value.clone().requires_grad_())
    with pytest.raises(ValueError, match=f"{what} must not require a gradient"):
        torch.func.grad(call)(value)
    tangent = pytest.raises(NotImplementedError, match=f"{what} carries a forward-mode tangent")
    for recording in (True, False):
        with torch.set_grad_enabled(recording), forward_ad.dual_level(), tangent:
            call(forward_ad.make_dual(value, value))
    with tangent:
        torch.func.jvp(call, (value,), (value,))
    with torch.no_grad():
        assert torch.equal(call(value.clone().requires_grad_()), call(value))
    with forward_ad.dual_level():
        assert call(value).isfinite()


@pytest.mark.parametrize("name", CONSTANT)
def test_vmap_of_constants_is_an_error(cell: Cell, name: str) -> None:
    op = OPS[name]
    arguments = arguments_of(op, cell)
    device = torch.device(cell.device)

    def call(factor: Tensor) -> list[Tensor]:
        return floats(op(cell.backend, device, *_times(arguments, factor)))

    with pytest.raises(NotImplementedError, match=named(op.public) + r"does not go .*\.vmap"):
        torch.func.vmap(call)(torch.ones(2, device=cell.device))


def test_an_update_in_place_leaves_no_stale_derivative(cell: Cell) -> None:
    scale = torch.full((1,), 0.5, device=cell.device)

    def update(grad: Tensor) -> None:
        ops.update_grads_([grad], scale, backend=cell.backend)

    overload = OPS["update_grads_"].overloads[cell.backend]
    by_itself = [[], [], None, None, None, [], [], None, None]
    for call in (update, lambda grad: overload([grad], scale, *by_itself)):
        grad = 2 * torch.ones(5, device=cell.device, requires_grad=True)
        with pytest.raises(RuntimeError, match=named("update_grads_") + ".*require a gradient"):
            call(grad)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(grad.detach(), grad.detach().clone())
            with pytest.raises(NotImplementedError, match=named("update_grads_") + ".*tangent"):
                call(dual)
        assert grad.tolist() == [2.0] * 5, "the error came too late"
        with torch.no_grad():
            call(grad)
        assert grad.tolist() == [1.0] * 5


OPMS = {
    "paper": mmfuse.OPM,
    "released": partial(mmfuse.OPM.official, p_exe=1.0, starts=0, theta_gradient=False),
    "theta": partial(mmfuse.OPM.official, p_exe=1.0, starts=0),
}


@pytest.mark.parametrize("made", OPMS)
def test_opm_goes_through_a_gradient_penalty(cell: Cell, made: str) -> None:
    """The samples that OPM drops are a constant of the step, but for theta's gradient."""
    values = features(cell)
    opm = OPMS[made](stream=NoiseStream(5, cell.device), backend=cell.backend)
    opm.to(cell.device, torch.float64).q.copy_(torch.tensor([0.5, 0.4]))
    state = {name: value.clone() for name, value in opm.named_buffers()}
    labels = torch.arange(ROWS, device=cell.device) % CLASSES
    last: list[tuple[Tensor, Tensor]] = []

    def call(a: Tensor, b: Tensor) -> Tensor:
        for name, value in state.items():
            getattr(opm, name).copy_(value)
        given = {"audio": a, "visual": b}
        found = opm(given, {name: f.tanh() for name, f in given.items()}, labels)
        theta = found.drop_probability.mean() if made != "paper" else torch.zeros(())
        last[:] = [(found.keep, theta.detach())]
        return (found.features["audio"].square() * found.features["visual"].exp()).sum()

    def plain(a: Tensor, b: Tensor) -> Tensor:
        keep, theta = last[0]
        left = [
            torch.where(k[:, None], x / (1 - theta), 0) for k, x in zip(keep, (a, b), strict=True)
        ]
        rows = keep.any(0)
        return (left[0].square() * left[1].exp())[rows].sum()

    if made == "theta":
        with pytest.raises(
            RuntimeError, match=r"OPM\.official has no second .*theta_gradient=False"
        ):
            penalties(call, values)
        return
    found = penalties(call, values)
    assert not bool(last[0][0].all())
    close(found, penalties(plain, values))


@ON_THE_CPU
def test_compiled_code_has_the_first_derivative_and_refuses_the_second(cell: Cell) -> None:
    values = features(cell)

    def nce(a: Tensor, b: Tensor) -> Tensor:
        return ops.info_nce(a, b, 0.5, backend=cell.backend)

    compiled = torch.compile(nce, fullgraph=True, backend="aot_eager")
    leaves = [v.clone().requires_grad_() for v in values]
    expected = torch.autograd.grad(nce(*leaves), leaves)
    close(torch.autograd.grad(compiled(*leaves), leaves), expected)
    with pytest.raises(RuntimeError, match=r"double backward|donated|second derivative"):
        penalties(compiled, values)
