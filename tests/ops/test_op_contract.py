"""PyTorch's demands on a custom op: opcheck, fakes, fullgraph compile, and the grid itself."""

from __future__ import annotations

import pytest
import samples
import tolerances
import torch
from cells import Cell
from comparing import compared, copied, outcome
from torch import Tensor

import mmfuse
from mmfuse import NoiseStream, ops
from mmfuse.ops._registry import OPS


@pytest.mark.slow_except_on("cpu")
@pytest.mark.parametrize("op", sorted(OPS))
def test_opcheck(cell: Cell, op: str) -> None:
    overload = OPS[op].overloads[cell.backend]
    for arguments in samples.arguments(cell.device)[op]:
        torch.library.opcheck(overload, arguments)


@pytest.mark.parametrize("op", sorted(samples.undefined("cpu")))
def test_opcheck_where_the_result_is_nan(cell: Cell, op: str) -> None:
    """The comparison with AOTDispatcher would take NaN and NaN for different."""
    overload = OPS[op].overloads[cell.backend]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for arguments in samples.undefined(cell.device)[op]:
        torch.library.opcheck(overload, arguments, test_utils=utilities)


@pytest.mark.parametrize("op", sorted(OPS))
@torch.no_grad()
def test_parity(cell: Cell, op: str) -> None:
    """The results, and what is written in place, are the reference's on the CPU."""
    call, reference = (OPS[op].overloads[backend] for backend in (cell.backend, "reference"))
    undefined = samples.undefined(cell.device).get(op, [])
    for arguments in [*samples.arguments(cell.device)[op], *undefined]:
        found = [x.cpu() for x in outcome(call, copied(arguments))]
        assert compared(found, outcome(reference, copied(arguments, "cpu"))) == []
        if op in samples.BOUNDS:
            exact = outcome(reference, copied(arguments, "cpu", wide=True))
            bounds = samples.BOUNDS[op](copied(arguments, "cpu"), exact)
            # The results left over are the arguments, which such an op does not write to.
            for result, expected, bound in zip(found, exact, bounds, strict=False):
                tolerances.assert_within(result, expected, bound)


def test_every_op_has_samples() -> None:
    """They are in a file of its name, with a case; its operators are the ones returned there."""
    assert set(samples.MODULES) == {op.module for op in OPS.values()}
    for name, module in samples.MODULES.items():
        operators = {op.name for op in OPS.values() if op.module == name}
        assert set(module.arguments("cpu")) == operators, name
        assert callable(module.small("cpu")), name
        assert set(getattr(module, "undefined", lambda _: ())("cpu")) <= operators, name
        assert set(getattr(module, "bounds", {})) <= operators, name


def test_fullgraph_compile(cell: Cell) -> None:
    stream = NoiseStream(4, cell.device)
    labels = torch.tensor([0, 1, 2, 1], device=cell.device)

    q = torch.tensor([0.3, 0.6], device=cell.device)

    def step(logits: list[Tensor], grads: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        scores = ops.modality_scores(logits, labels, backend=cell.backend)
        ratios = ops.discrepancy_ratios(scores.prob, backend=cell.backend)
        k = mmfuse.ogm_coefficients(ratios, 0.8)
        std = ops.grad_stats(grads, backend=cell.backend).std
        ops.update_grads_(grads, k, noise_std=std, stream=stream, backend=cell.backend)
        stats = ops.grad_stats(grads, backend=cell.backend)
        factors = ops.modulation_factors(
            scores.prob, 0.8, owner=[1, 0], stats=stats, eps=1e-8, backend=cell.backend
        )
        views = ops.noisy_views(x, 0.5, stream, backend=cell.backend)
        encoded = [view.tanh() for view in views[:2]]
        ratio = ops.redundancy_ratio(*encoded, views.input_sq, backend=cell.backend)
        gate = ops.co_information_gate([x, *encoded], k[0] - 2, backend=cell.backend)
        left = ops.drop_modalities(encoded, q, stream, scale=k[0], backend=cell.backend)
        found = ops.mutual_information(*logits, 3, backend=cell.backend)
        given = ops.conditional_mutual_information(*encoded, x, 3, backend=cell.backend)
        shared = ops.co_information(*encoded, x, 3, backend=cell.backend)
        nce = ops.info_nce(*encoded, 0.5, backend=cell.backend)
        information = (*factors, *found, *given, shared, nce)
        return scores.log_prob, k, *views, ratio, gate, *left.features, left.keep, *information

    logits = [torch.randn(4, 3, device=cell.device) for _ in range(2)]
    grads = [torch.randn(20, device=cell.device), torch.randn(3, 3, device=cell.device)]
    eager_grads = [g.clone() for g in grads]
    x = torch.randn(4, 5, device=cell.device)
    eager = step(logits, eager_grads, x)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(logits, grads, x)
    for a, b in zip([*compiled, *grads], [*eager, *eager_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the tiny ops may be fused


def test_fullgraph_compile_through_autograd(cell: Cell) -> None:
    labels = torch.tensor([0, 1, 2, 1], device=cell.device)
    k = torch.tensor(0.25, device=cell.device)
    stream = NoiseStream(4, cell.device)
    q = torch.tensor([0.3, 0.6], device=cell.device)

    def loss(x: Tensor) -> Tensor:
        y = ops.scale_grad(x * 2.0, k, backend=cell.backend)
        performance = ops.modality_scores([y, x], labels, backend=cell.backend).log_prob.sum()
        first, second, input_sq = ops.noisy_views(x, 0.5, stream, backend=cell.backend)
        encoded = first.tanh(), second.tanh()
        alike = ops.paired_cosine(*encoded, backend=cell.backend)
        left = ops.drop_modalities(encoded, q, stream, scale=k, backend=cell.backend).features
        alike = alike + ops.info_nce(*left, k + 1, backend=cell.backend)
        soft = ops.mutual_information(*encoded, 3, "soft", backend=cell.backend)
        alike = alike + soft.mi.sum() + soft.nmi.sum()
        return performance + alike + ops.redundancy_ratio(*encoded, input_sq, backend=cell.backend)

    x = torch.randn(4, 3, device=cell.device)
    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


def test_default_backend_is_the_compiled_one_on_the_cpu() -> None:
    device = torch.device("cpu")
    for op in OPS.values():
        if op.why_missing("cpu", "cpu") is None:
            assert op.resolve(None, device) == "cpu"


def test_active_backend() -> None:
    assert ops.active_backend("grad_stats", "cpu", "reference") == "reference"
    with mmfuse.use_backend("reference"):
        assert ops.active_backend("grad_stats") == "reference"
    with pytest.raises(ValueError, match=r"op must be one of .* got 'grad_stat'"):
        ops.active_backend("grad_stat")
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.active_backend("grad_stats", backend="gpu")


def test_use_backend_as_setting_and_as_block() -> None:
    op, device = OPS["grad_stats"], torch.device("cpu")
    default = op.resolve(None, device)
    with mmfuse.use_backend("reference"):
        assert op.resolve(None, device) == "reference"
        with mmfuse.use_backend(None):
            assert op.resolve(None, device) == default
        assert op.resolve(None, device) == "reference"
    assert op.resolve(None, device) == default
    mmfuse.use_backend("reference")
    assert op.resolve(None, device) == "reference"
    with pytest.raises(ValueError, match="backend must be one of"):
        mmfuse.use_backend("fast")


def test_a_missing_backend_raises_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["grad_stats"]
    monkeypatch.setitem(op._reasons, "triton", "no module named triton, for this test")
    monkeypatch.setattr(op, "_chosen", {})
    with pytest.raises(RuntimeError, match=r"'triton' is not available .* for this test"):
        ops.grad_stats([torch.ones(2)], backend="triton")


def test_the_slow_default_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfuse.ops import _registry

    op = OPS["grad_stats"]
    monkeypatch.setitem(op._reasons, "cpu", "not built, for this test")
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "_tables", {})
    monkeypatch.setattr(_registry, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"'reference' .* 'cpu' is not available .*for this"):
        ops.grad_stats([torch.ones(2)])
    ops.grad_stats([torch.ones(2)])  # warnings are errors here: a second one would fail
