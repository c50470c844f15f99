"""scale_grad: identity forward, modulated backward."""

from __future__ import annotations

from typing import Any

import pytest
import tolerances
import torch
from cells import Cell
from inputs import DTYPES
from samples import BOUNDS
from torch import Tensor, nn

import mmfuse
from mmfuse import NoiseStream, ops


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noisy"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (64, 512), (3, 7, 11)], ids=str)
def test_backward_parity(cell: Cell, dtype: torch.dtype, noisy: bool, shape: tuple) -> None:
    x = torch.randn(shape, device=cell.device).to(dtype).requires_grad_()
    incoming = torch.randn(shape).to(dtype).to(cell.device)
    coefficient = torch.rand((), device=cell.device)
    stream = NoiseStream(11, cell.device).place([3], [2]) if noisy else None
    std = torch.rand((), device=cell.device) if noisy else None
    z = torch.zeros(shape, dtype=torch.float64)
    if noisy:
        z = stream.normal(x.numel(), 3, 2, dtype=torch.float64).cpu().view(shape)
    y = ops.scale_grad(x, coefficient, noise_std=std, stream=stream, backend=cell.backend)
    assert torch.equal(y, x)
    if stream is not None:
        stream.advance()  # the backward pass still uses the step at which scale_grad was called
    y.backward(incoming)
    sigma = std.cpu().double() if noisy else torch.zeros(())
    scaled = coefficient.cpu().double() * incoming.cpu().double()
    expected = scaled + sigma * z
    (bound,) = BOUNDS["scale_grad_backward"]((incoming, coefficient, std), [expected])
    assert x.grad.dtype == dtype
    tolerances.assert_within(x.grad, expected, bound)


def test_strided_incoming_gradient(cell: Cell) -> None:
    x = torch.randn(6, 8, device=cell.device, requires_grad=True)
    y = ops.scale_grad(x, torch.tensor(0.5, device=cell.device), backend=cell.backend)
    incoming = torch.randn(8, 6, device=cell.device).t()
    y.backward(incoming)
    assert torch.equal(x.grad, 0.5 * incoming)


def test_gradcheck_and_gradgradcheck(cell: Cell) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, device=cell.device, requires_grad=True)
    one = torch.tensor(1.0, dtype=torch.float64, device=cell.device)

    def op(value: Tensor) -> Tensor:
        return ops.scale_grad(value, one, backend=cell.backend).square()

    # With coefficient 1 the modulated gradient is the true one, which gradcheck can see.
    assert torch.autograd.gradcheck(op, x)
    assert torch.autograd.gradgradcheck(op, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_pass_over_the_parameters(cell: Cell, dtype: torch.dtype) -> None:
    """OGM at the feature is OGM over the encoder, because back-propagation is linear."""
    names = ("audio", "visual", "text")
    labels = torch.randint(0, 4, (16,), device=cell.device)
    inputs = {
        n: torch.randn(16, 6 + m, dtype=dtype, device=cell.device) for m, n in enumerate(names)
    }

    def network() -> tuple[nn.ModuleDict, nn.Linear]:
        torch.manual_seed(3)
        encoders = nn.ModuleDict(
            {
                n: nn.Sequential(nn.Linear(6 + m, 9), nn.ReLU(), nn.Linear(9, 5))
                for m, n in enumerate(names)
            }
        )
        return encoders.to(cell.device, dtype), nn.Linear(15, 4).to(cell.device, dtype)

    encoders, head = network()
    features = {n: encoders[n](inputs[n]) for n in names}
    logits = mmfuse.unimodal_logits(head, features)
    loss = nn.functional.cross_entropy(head(torch.cat(list(features.values()), 1)), labels)
    out = mmfuse.ogm_backward(
        loss, dict(encoders), logits, labels, noise=False, backend=cell.backend
    )
    over_parameters = [p.grad for p in encoders.parameters()]

    encoders, head = network()
    features = {
        n: ops.scale_grad(encoders[n](inputs[n]), out.coefficients[m], backend=cell.backend)
        for m, n in enumerate(names)
    }
    nn.functional.cross_entropy(head(torch.cat(list(features.values()), 1)), labels).backward()
    assert bool((out.coefficients < 1).any())
    for actual, expected in zip(
        (p.grad for p in encoders.parameters()), over_parameters, strict=True
    ):
        # Scaling before or after three matrix products of inner size at most 16: each reorders
        # roundings of at most 16 terms, so 3·16 units of rounding of the largest term.
        unit = tolerances.UNIT_ROUNDOFF[dtype]
        torch.testing.assert_close(
            actual, expected, rtol=48 * unit, atol=48 * unit * float(expected.abs().max())
        )


def test_bad_input() -> None:
    x, k = torch.ones(3, requires_grad=True), torch.tensor(0.5)
    for arguments, keywords, error, match in [
        ((x.detach().long(), k), {}, TypeError, "x has dtype torch.int64"),
        ((x, 0.5), {}, TypeError, "coefficient must be a 0-d floating-point tensor"),
        ((x, torch.ones(3)), {}, ValueError, r"coefficient must be 0-d, got shape \[3\]"),
        ((x, k), {"noise_std": k}, ValueError, "noise_std needs a stream"),
        ((x, k), {"stream": NoiseStream(0)}, ValueError, "noise_std needs a stream"),
        ((x, k), {"noise_std": k, "stream": NoiseStream(0).place([0, 1])}, ValueError, "2 tensors"),
    ]:
        with pytest.raises(error, match=match):
            ops.scale_grad(*arguments, **keywords)


def relu(y: Tensor) -> Tensor:
    return y.relu_()


def add(y: Tensor) -> Tensor:
    y += 2.0
    return y


def assign(y: Tensor) -> Tensor:
    y[1:] = 3.0
    return y


@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noisy"])
@pytest.mark.parametrize("change", [relu, add, assign])
def test_the_result_may_be_changed_in_place(cell: Cell, change: Any, noisy: bool) -> None:
    """`register_hook` allows it too; x itself stays as it is, for code that looks at it later."""
    leaf = torch.randn(4, 6, device=cell.device, requires_grad=True)
    half = torch.tensor(0.5, device=cell.device)
    stream = NoiseStream(3, cell.device)
    options = {"noise_std": half, "stream": stream} if noisy else {}
    incoming = torch.randn(4, 6, device=cell.device)
    grads = []
    for in_place in (True, False):
        x = leaf * 3.0
        y = ops.scale_grad(x, half, backend=cell.backend, **options)
        out = change(y if in_place else y.clone())
        assert torch.equal(x, leaf * 3.0)
        (out * incoming).sum().backward()
        grads.append(leaf.grad)
        leaf.grad = None
    assert torch.equal(*grads)
    assert bool(grads[0].any())


def test_it_may_be_changed_in_place_when_compiled() -> None:
    def loss(x: Tensor) -> Tensor:
        return relu(ops.scale_grad(x * 2.0, torch.tensor(0.5))).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
        function(x).backward()
        grads.append(x.grad.tolist())
    assert grads == [[1.0, 0.0, 1.0]] * 2
