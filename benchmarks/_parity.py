"""The gate: every provider's result against the reference in float64, before it is timed.

Whole tensors where that is cheap. The reference's noise costs a microsecond an element, so updates
are compared on windows of every tensor: the counter-based stream gives the noise of any window.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from _inputs import ALPHA, SEED, FeatureInputs, GradientInputs, LogitsInputs, ScoresInputs
from torch import Tensor

from mmfuse import ogm_coefficients
from mmfuse.reference import discrepancy_ratios as reference_ratios
from mmfuse.reference import modality_scores as reference_scores
from mmfuse.reference import update_grads as reference_update

#: Providers that draw their noise from PyTorch's generator.
OWN_NOISE = ("official", "foreach")

# Eager float32 sums over 2^28 elements round as much as the first; a dtype adds its own rounding.
_STATS_TOLERANCE = 1e-3
# Noise may differ by 1e-5 (1 + |z|); eager half-precision code rounds after each of its steps.
_UPDATE_TOLERANCE = {
    torch.float64: 5e-5,
    torch.float32: 5e-5,
    torch.float16: 2.0**-8,
    torch.bfloat16: 2.0**-5,
}
_WINDOWS = 2**17


class ParityError(AssertionError):
    """A provider's result is not the reference's."""


def _close(what: str, got: Tensor, want: Tensor, rtol: float, atol: float = 0.0) -> None:
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


def exact_decision(logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and ratios in float64."""
    prob, _ = reference_scores.modality_scores([z.double() for z in logits], labels)
    rho = reference_ratios.discrepancy_ratios(prob)
    return ogm_coefficients(rho, ALPHA, "cvpr"), rho


def check_scores(provider: str, inputs: LogitsInputs, result: object) -> None:
    """Compares each modality's score, whether it is the batch's sum or its mean."""
    scores = as_vector(result, inputs.device)
    if provider == "official":
        scores = scores / len(inputs.labels)
    exact, _ = reference_scores.modality_scores([z.double() for z in inputs.logits], inputs.labels)
    tolerance = 1e-4
    if provider == "official":
        # Its Python sum over the batch rounds to the dtype of the logits at every step.
        tolerance += len(inputs.labels) * torch.finfo(inputs.dtype).eps / 8
    _close("scores", scores, exact, tolerance)


def check_decision(provider: str, inputs: LogitsInputs, result: object) -> None:
    """Compares coefficients and ratios."""
    coefficients, rho = result
    tolerance = 1e-4
    if provider == "official":
        # Its Python sum over the batch rounds to the dtype of the logits at every step.
        tolerance += len(inputs.labels) * torch.finfo(inputs.dtype).eps / 8
    want_coefficients, want_rho = exact_decision(inputs.logits, inputs.labels)
    _close("ratios", as_vector(rho, inputs.device), want_rho, tolerance)
    _close(
        "coefficients",
        as_vector(coefficients, inputs.device),
        want_coefficients,
        0.0,
        tolerance,
    )


def check_ratios(provider: str, inputs: ScoresInputs, result: object) -> None:
    """Compares discrepancy ratios."""
    want = reference_ratios.discrepancy_ratios(inputs.scores.double())
    _close("ratios", as_vector(result, inputs.device), want, 1e-5)


def check_feature_grad(provider: str, inputs: FeatureInputs, result: Tensor) -> None:
    """Compares the gradient below a scaled feature."""
    want = inputs.coefficient.double() * inputs.grad_output.double()
    _close("gradient", result, want, 2 * torch.finfo(inputs.dtype).eps)


def check_std(provider: str, inputs: GradientInputs, result: object) -> None:
    """Compares standard deviations."""
    want = inputs.exact_stats.std
    tolerance = _STATS_TOLERANCE + torch.finfo(inputs.dtype).eps
    _close("standard deviations", as_vector(result, inputs.device), want, tolerance)


def check_sums(provider: str, inputs: GradientInputs, result: object) -> None:
    """Compares ⟨w − w₀, g⟩ and ‖g‖²; the former to the size of its terms, which may cancel."""
    want = inputs.exact_stats
    dots, squares = (as_vector(values, inputs.device) for values in result)
    tolerance = _STATS_TOLERANCE + 2 * torch.finfo(inputs.dtype).eps
    _close("‖g‖²", squares, want.sq_norm, tolerance)
    size = (want.disp_sq * want.sq_norm).sqrt()
    _close("⟨w − w₀, g⟩", dots / size, want.dot / size, 0.0, tolerance)


def check_update(
    provider: str,
    inputs: GradientInputs,
    *,
    scale: Tensor,
    pull: Tensor | None = None,
    noise_std: Tensor | None = None,
) -> None:
    """Compares updated gradients with g ← scale g + pull (w − w₀) + noise_std N(0, 1)."""
    places = _windows([g.numel() for g in inputs.pristine])
    rows = torch.tensor([t for t, _, _ in places], device=inputs.device)

    def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
        flat = [t.detach().view(-1) for t in tensors]
        return [flat[t][start:end].double() for t, start, end in places]

    want = [w.clone() for w in cut(inputs.pristine)]
    drawn = noise_std is not None and provider not in OWN_NOISE
    reference_update.update_grads_(
        want,
        scale[rows].double(),
        cut(inputs.params) if pull is not None else (),
        cut(inputs.anchors) if pull is not None else (),
        pull[rows].double() if pull is not None else None,
        noise_std[rows].double() if drawn else None,
        inputs.state if drawn else None,
        [t for t, _, _ in places],
        [start for _, start, _ in places],
        None,
    )
    got = cut(inputs.results())
    if noise_std is not None and not drawn:
        _check_noise(inputs, cut(inputs.pristine), got, want, noise_std[rows].double())
        return
    tolerance = _UPDATE_TOLERANCE[inputs.dtype]
    for (t, start, end), g, w in zip(places, got, want, strict=True):
        atol = tolerance * float(w.square().mean().sqrt())
        _close(f"gradient {t}, elements {start} to {end}", g, w, tolerance, atol)


def _windows(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(tensor, start, end): both ends of every tensor and a place between, chosen at random."""
    pick = random.Random(SEED)
    length = max(256, _WINDOWS // (3 * len(sizes)))
    places = []
    for t, size in enumerate(sizes):
        if size <= 3 * length:
            places.append((t, 0, size))
            continue
        middle = pick.randrange(length, size - 2 * length)
        places += [(t, s, s + length) for s in (0, middle, size - length)]
    return places


def _check_noise(
    inputs: GradientInputs,
    before: Sequence[Tensor],
    got: Sequence[Tensor],
    noiseless: Sequence[Tensor],
    noise_std: Tensor,
) -> None:
    """Whether what was added is standard normal noise, unrelated to the gradient."""
    sigmas = noise_std.unbind()
    z = torch.cat([(g - w) / s for g, w, s in zip(got, noiseless, sigmas, strict=True)])
    g = torch.cat([b / s for b, s in zip(before, sigmas, strict=True)])
    # Six standard errors of each moment, and the rounding of the spread and of the result.
    error = 6 / len(z) ** 0.5
    rounding = torch.finfo(inputs.dtype).eps
    one = torch.ones((), dtype=z.dtype, device=z.device)
    _close("mean of the noise", z.mean(), 0 * one, 0.0, error)
    _close("variance of the noise", z.square().mean(), one, 0.0, 1.5 * error + 2 * rounding)
    _close("fourth moment of the noise", z.pow(4).mean(), 3 * one, 0.0, 10 * error + 8 * rounding)
    relation = (z * g).mean() / g.square().mean().sqrt()
    _close("noise times gradient", relation, 0 * one, 0.0, error + rounding)
