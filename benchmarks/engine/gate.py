"""The gate: every provider's result against the reference in float64, before it is timed.

Whole tensors where that is cheap. The reference's noise costs a microsecond an element, so updates
are compared on windows of every tensor: the counter-based stream gives the noise of any window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfuse.reference import update_grads as reference_update

from .gradients import GradientInputs
from .windows import Window, standard_normals, windows

#: A training step without its method.
PLAIN = "plain"
#: Providers that draw their noise from PyTorch's generator.
OWN_NOISE = ("official", "foreach")

#: Eager float32 sums over 2^28 elements round as much; a dtype adds its own rounding.
STATS_TOLERANCE = 1e-3
#: Noise may differ by 1e-5 (1 + |z|); eager half-precision code rounds after each of its steps.
UPDATE_TOLERANCE = {
    torch.float64: 5e-5,
    torch.float32: 5e-5,
    torch.float16: 2.0**-8,
    torch.bfloat16: 2.0**-5,
}


class ParityError(AssertionError):
    """A provider's result is not the reference's."""


def close(what: str, got: Tensor, want: Tensor, rtol: float, atol: float = 0.0) -> None:
    """Raises a ParityError that names `what`, unless the tensors are as near as that."""
    got = got.detach().to(want)
    try:
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    except AssertionError as error:
        summary = " ".join(str(error).split())
        raise ParityError(f"{what}: {summary}") from None


def as_vector(values: Tensor | Sequence[Tensor | float], device: torch.device) -> Tensor:
    """[N] float64 of a tensor, or of a list of numbers and 0-d tensors."""
    if isinstance(values, Tensor):
        return values.double()
    return torch.stack([torch.as_tensor(v, device=device).double() for v in values])


def check_update(
    provider: str,
    inputs: GradientInputs,
    *,
    scale: Tensor,
    pull: Tensor | None = None,
    noise_std: Tensor | None = None,
    rounding: float = 0.0,
) -> None:
    """Compares updated gradients with g ← scale g + pull (w − w₀) + noise_std N(0, 1).

    `rounding` is how far off the gradients themselves may be, in units of their size.
    """
    places = windows([g.numel() for g in inputs.pristine])
    rows = torch.tensor([t for t, _, _ in places], device=inputs.device)

    def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
        flat = [t.detach().flatten() for t in tensors]
        return [flat[t][start:end].double() for t, start, end in places]

    want = [w.clone() for w in cut(inputs.pristine)]
    reference_update.update_grads_(
        want,
        scale[rows].double(),
        cut(inputs.params) if pull is not None else (),
        cut(inputs.anchors) if pull is not None else (),
        pull[rows].double() if pull is not None else None,
        None,
        None,
        (),
        (),
        None,
        None,
    )
    got = cut(inputs.results())
    if noise_std is not None:
        spreads = noise_std[rows].double()
        if provider in OWN_NOISE:
            check_noise(inputs, cut(inputs.pristine), got, want, spreads)
            return
        noise = standard_normals(inputs.state, places)
        torch._foreach_add_(want, torch._foreach_mul(noise, list(spreads.unbind())))
    check_windows(places, got, want, UPDATE_TOLERANCE[inputs.dtype] + rounding)


def check_windows(
    places: Sequence[Window], got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float
) -> None:
    """Compares all windows, each to the size of its own numbers, and names the first wrong one."""
    lengths = [end - start for _, start, end in places]
    sizes = torch.stack([w.square().mean() for w in want]).sqrt()
    flat, exact = torch.cat(list(got)), torch.cat(list(want))
    each = sizes.repeat_interleave(torch.tensor(lengths, device=exact.device))
    limit = tolerance * (exact.abs() + each)
    # So that a NaN is wrong as well.
    wrong = ~((flat - exact).abs() <= limit)
    if not wrong.any():
        return
    first = next(n for n, part in enumerate(wrong.split(lengths)) if part.any())
    t, start, end = places[first]
    what = f"gradient {t}, elements {start} to {end}"
    close(what, got[first], want[first], tolerance, tolerance * float(sizes[first]))


def check_noise(
    inputs: GradientInputs,
    before: Sequence[Tensor],
    got: Sequence[Tensor],
    noiseless: Sequence[Tensor],
    noise_std: Tensor,
) -> None:
    """Compares what was added with standard normal noise that is unrelated to the gradient."""
    sigmas = noise_std.unbind()
    z = torch.cat([(g - w) / s for g, w, s in zip(got, noiseless, sigmas, strict=True)])
    g = torch.cat([b / s for b, s in zip(before, sigmas, strict=True)])
    # Six standard errors of each moment, and the rounding of the spread and of the result.
    error = 6 / len(z) ** 0.5
    rounding = torch.finfo(inputs.dtype).eps
    one = torch.ones((), dtype=z.dtype, device=z.device)
    close("mean of the noise", z.mean(), 0 * one, 0.0, error)
    close("variance of the noise", z.square().mean(), one, 0.0, 1.5 * error + 2 * rounding)
    close("fourth moment of the noise", z.pow(4).mean(), 3 * one, 0.0, 10 * error + 8 * rounding)
    relation = (z * g).mean() / g.square().mean().sqrt()
    close("noise times gradient", relation, 0 * one, 0.0, error + rounding)
