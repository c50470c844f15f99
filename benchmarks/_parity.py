"""The gate: every provider's result against the reference in float64, before it is timed.

Whole tensors where that is cheap. The reference's noise costs a microsecond an element, so updates
are compared on windows of every tensor: the counter-based stream gives the noise of any window. On
a GPU what counts is the launches, so all windows' noise and all comparisons are formed at once.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import torch
from _inputs import (
    ALPHA,
    SEED,
    SIGMA,
    DropInputs,
    FeatureInputs,
    GradientInputs,
    LogitsInputs,
    MapInputs,
    PairInputs,
    ScoresInputs,
    ViewInputs,
)
from torch import Tensor

from mmfuse import ogm_coefficients
from mmfuse.reference import discrepancy_ratios as reference_ratios
from mmfuse.reference import modality_scores as reference_scores
from mmfuse.reference import noise as reference_noise
from mmfuse.reference import paired_cosine as reference_cosine
from mmfuse.reference import redundancy_ratio as reference_redundancy
from mmfuse.reference import update_grads as reference_update

#: A training step without its method.
PLAIN = "plain"
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
# Tensor, start, end.
Window = tuple[int, int, int]


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
    close("scores", scores, exact, tolerance)


def check_decision(provider: str, inputs: LogitsInputs, result: object) -> None:
    """Compares coefficients and ratios."""
    coefficients, rho = result
    tolerance = 1e-4
    if provider == "official":
        # Its Python sum over the batch rounds to the dtype of the logits at every step.
        tolerance += len(inputs.labels) * torch.finfo(inputs.dtype).eps / 8
    want_coefficients, want_rho = exact_decision(inputs.logits, inputs.labels)
    close("ratios", as_vector(rho, inputs.device), want_rho, tolerance)
    close(
        "coefficients",
        as_vector(coefficients, inputs.device),
        want_coefficients,
        0.0,
        tolerance,
    )


def check_ratios(provider: str, inputs: ScoresInputs, result: object) -> None:
    """Compares discrepancy ratios."""
    want = reference_ratios.discrepancy_ratios(inputs.scores.double())
    close("ratios", as_vector(result, inputs.device), want, 1e-5)


def check_feature_grad(provider: str, inputs: FeatureInputs, result: Tensor) -> None:
    """Compares the gradient below a scaled feature."""
    want = inputs.coefficient.double() * inputs.grad_output.double()
    close("gradient", result, want, 2 * torch.finfo(inputs.dtype).eps)


def check_drop(provider: str, inputs: DropInputs, result: Sequence[Tensor]) -> None:
    """Compares which samples lost a modality, what is left, and the gradients if there are any."""
    count = len(inputs.features)
    out, grads = result[:count], result[count:]
    keep = kept_samples(provider, out, inputs.q, inputs.stream.state)
    # The released code divides by what modalities of one width keep on average.
    scale = 1 / (1 - float(inputs.q.mean())) if provider == "official" else 1.0
    pairs = [("feature", out, inputs.features)]
    if grads:
        pairs.append(("gradient", grads, inputs.grad_outputs))
    for what, got, before in pairs:
        for m in range(count):
            want = scale * keep[m].unsqueeze(1) * before[m].detach().double()
            close(f"{what} {m}", got[m], want, 2 * torch.finfo(inputs.dtype).eps)


def kept_samples(provider: str, out: Sequence[Tensor], q: Tensor, state: Tensor) -> Tensor:
    """[M, B], whether a sample has kept a modality: by the stream, or a share 1 − q of them."""
    batch = len(out[0])
    if provider not in OWN_NOISE:
        draws = [reference_noise.standard_uniform(state, batch, m) for m in range(len(out))]
        return torch.stack(draws) > q.unsqueeze(1)
    keep = torch.stack([(o.detach() != 0).any(dim=1) for o in out])
    for m, (kept, rate) in enumerate(zip(keep, q.tolist(), strict=True)):
        error = 6 * (rate * (1 - rate) / batch) ** 0.5
        what = f"share of samples without modality {m}"
        close(what, 1 - kept.double().mean(), q[m].double(), 0.0, error)
    return keep


def check_std(provider: str, inputs: GradientInputs, result: object) -> None:
    """Compares standard deviations."""
    want = inputs.exact_stats.std
    tolerance = _STATS_TOLERANCE + torch.finfo(inputs.dtype).eps
    close("standard deviations", as_vector(result, inputs.device), want, tolerance)


def check_sums(provider: str, inputs: GradientInputs, result: object) -> None:
    """Compares ⟨w − w₀, g⟩ and ‖g‖²; the former to the size of its terms, which may cancel."""
    want = inputs.exact_stats
    dots, squares = (as_vector(values, inputs.device) for values in result)
    tolerance = _STATS_TOLERANCE + 2 * torch.finfo(inputs.dtype).eps
    close("‖g‖²", squares, want.sq_norm, tolerance)
    size = (want.disp_sq * want.sq_norm).sqrt()
    close("⟨w − w₀, g⟩", dots / size, want.dot / size, 0.0, tolerance)


def check_traces(
    inputs: GradientInputs, result: Tensor | Sequence[Tensor | None], pull: float
) -> None:
    """Compares ‖g + pull (w − w₀)‖², or sums of the squares where elements are kept."""
    stats = inputs.exact_stats
    want = stats.sq_norm + 2 * pull * stats.dot + pull**2 * stats.disp_sq
    if isinstance(result, Tensor):
        kept = range(len(want))
        got = result.double()
    else:
        kept = [t for t, squares in enumerate(result) if squares is not None]
        got = torch.stack([result[t].double().sum() for t in kept]) if kept else want[:0]
    tolerance = _STATS_TOLERANCE + 2 * torch.finfo(inputs.dtype).eps
    close("Fisher traces", got, want[list(kept)], tolerance)


def check_cosine(provider: str, inputs: PairInputs, result: Tensor) -> None:
    """Compares the mean cosine; the error of each row's is at most some roundings of one."""
    want = reference_cosine.paired_cosine(*(f.detach().double() for f in inputs.features))
    close("cosine", result, want, 0.0, 1e-4 + 2 * torch.finfo(inputs.dtype).eps)


def check_cosine_grads(provider: str, inputs: PairInputs, result: Sequence[Tensor]) -> None:
    """Compares both gradients of the mean cosine."""
    one = torch.ones((), dtype=torch.float64, device=inputs.device)
    features = [f.detach().double() for f in inputs.features]
    want = reference_cosine.paired_cosine_backward(one, *features)
    # Eager half-precision code rounds a dozen times on the way, twice as often as in an update.
    tolerance = 2 * _UPDATE_TOLERANCE[inputs.dtype]
    for name, got, w in zip("ab", result, want, strict=True):
        close(f"gradient of {name}", got, w, tolerance, tolerance * float(w.square().mean().sqrt()))


def check_gate(provider: str, inputs: PairInputs, result: Tensor | float) -> None:
    """Compares the decision, which is far from its threshold."""
    want = reference_cosine.paired_cosine(*(f.detach().double() for f in inputs.features))
    opens = (want > inputs.threshold).double()
    close("gate", torch.as_tensor(result, device=inputs.device), opens, 0.0)


def check_views(provider: str, inputs: ViewInputs, result: Sequence[Tensor]) -> None:
    """Compares windows of both views with the stream's noise, and their distance with itself."""
    *views, input_sq = result
    wide = [view.double() for view in views]
    distance = (wide[0] - wide[1]).square().mean()
    tolerance = _STATS_TOLERANCE + 2 * torch.finfo(inputs.dtype).eps
    close("distance of the views", input_sq, distance, tolerance)
    x = inputs.x.double().flatten()
    wide = [view.flatten() for view in wide]
    if provider in OWN_NOISE:
        sigma = torch.full((2,), SIGMA, dtype=torch.float64, device=inputs.device)
        _check_noise(inputs, [x, x], wide, [x, x], sigma)
        z1, z2 = ((view - x) / SIGMA for view in wide)
        error = 6 / len(x) ** 0.5 + torch.finfo(inputs.dtype).eps
        close("noise of one view times the other's", (z1 * z2).mean(), 0 * distance, 0.0, error)
        return
    tolerance = _UPDATE_TOLERANCE[inputs.dtype]
    for index, view in enumerate(wide):
        for _, start, end in _windows([len(x)]):
            z = reference_noise.standard_normal(inputs.stream.state, end - start, index, start)
            want = x[start:end] + SIGMA * z
            what = f"view {index}, elements {start} to {end}"
            close(what, view[start:end], want, tolerance, tolerance)


def check_redundancy(provider: str, inputs: MapInputs, result: Tensor | float) -> None:
    """Compares the ratio."""
    rows = (t.double() for t in (inputs.z1, inputs.z2, inputs.input_sq))
    want = reference_redundancy.redundancy_ratio(*rows)
    tolerance = _STATS_TOLERANCE + 2 * torch.finfo(inputs.dtype).eps
    close("redundancy", torch.as_tensor(result, device=inputs.device), want, tolerance)


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
    places = _windows([g.numel() for g in inputs.pristine])
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
            _check_noise(inputs, cut(inputs.pristine), got, want, spreads)
            return
        noise = standard_normals(inputs.state, places)
        torch._foreach_add_(want, torch._foreach_mul(noise, list(spreads.unbind())))
    _check_windows(places, got, want, _UPDATE_TOLERANCE[inputs.dtype] + rounding)


def _check_windows(
    places: Sequence[Window], got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float
) -> None:
    """Compares all windows, each to the size of its own numbers, and names the first wrong one."""
    lengths = [end - start for _, start, end in places]
    sizes = torch.stack([w.square().mean() for w in want]).sqrt()
    flat, exact = torch.cat(list(got)), torch.cat(list(want))
    limit = tolerance * (exact.abs() + sizes.repeat_interleave(_index(lengths, exact.device)))
    # So that a NaN is wrong as well.
    wrong = ~((flat - exact).abs() <= limit)
    if not wrong.any():
        return
    first = next(n for n, part in enumerate(wrong.split(lengths)) if part.any())
    t, start, end = places[first]
    what = f"gradient {t}, elements {start} to {end}"
    close(what, got[first], want[first], tolerance, tolerance * float(sizes[first]))


def standard_normals(state: Tensor, places: Sequence[Window]) -> list[Tensor]:
    """The reference's `standard_normal` of all windows, in as many launches as of one."""
    firsts = [start // 4 for _, start, _ in places]
    counts = [(end + 3) // 4 - first for (_, _, end), first in zip(places, firsts, strict=True)]
    of_window = _index(range(len(places)), state.device).repeat_interleave(
        _index(counts, state.device)
    )
    before = [0, *itertools.accumulate(counts)][:-1]
    shift = _index([f - b for f, b in zip(firsts, before, strict=True)], state.device)
    block = torch.arange(sum(counts), device=state.device) + shift[of_window]
    stream = _index([t for t, _, _ in places], state.device)[of_window]
    word = 2**32 - 1
    seed, step = state.unbind()
    counter = torch.stack([block & word, block >> 32, stream, (step & word).expand_as(block)], -1)
    bits = reference_noise.philox4x32(counter, torch.stack([seed, seed >> 32]) & word)
    u = reference_noise.uniform_from_bits(bits).double()
    radius = (-2 * u[:, 0::2].log()).sqrt()
    angle = 2 * math.pi * u[:, 1::2]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten()
    parts = z.split([4 * count for count in counts])
    return [
        part[start - 4 * first : end - 4 * first]
        for part, first, (_, start, end) in zip(parts, firsts, places, strict=True)
    ]


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _windows(sizes: Sequence[int]) -> list[Window]:
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
    close("mean of the noise", z.mean(), 0 * one, 0.0, error)
    close("variance of the noise", z.square().mean(), one, 0.0, 1.5 * error + 2 * rounding)
    close("fourth moment of the noise", z.pow(4).mean(), 3 * one, 0.0, 10 * error + 8 * rounding)
    relation = (z * g).mean() / g.square().mean().sqrt()
    close("noise times gradient", relation, 0 * one, 0.0, error + rounding)
