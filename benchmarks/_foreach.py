"""Provider `foreach`: the best eager PyTorch we can write, without a host sync.

NumPy's bins are found by their edges; only `bincount` waits, on a GPU, to see its largest value.
A factor that a whole encoder shares is a 0-d tensor, for which the `_foreach_` ops have their
fused path on the GPU; only sums, which have no `_foreach_` op, are taken tensor by tensor. Below
the helpers there is one function per case, named like the case.
"""

from __future__ import annotations

import math

import torch
from _information_inputs import (
    CONDITIONAL_BINS,
    TEMPERATURE,
    ContrastInputs,
    FusionInputs,
    ValueInputs,
)
from _inputs import (
    ALPHA,
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
from torch.nn import functional as F


def _ratios(scores: Tensor) -> Tensor:
    return ((scores.unsqueeze(1) / scores).sum(dim=1) - 1) / (len(scores) - 1)


def _squares(i: GradientInputs) -> Tensor:
    """‖g‖², [T]; of pieces: PyTorch's norm of 2^28 float32 on one CPU thread is 4 % too small."""
    squares = torch.stack(torch._foreach_norm(i.pieces, 2, dtype=i.wide)).square_()
    return torch.zeros_like(i.numel).index_add_(0, i.piece_owner, squares)


def _std(i: GradientInputs) -> Tensor:
    """[T] from ‖g‖ and Σg, which is good enough for gradients: their mean is near zero."""
    squares = _squares(i)
    sums = torch.stack([g.sum(dtype=i.wide) for g in i.grads])
    return ((squares - sums.square() / i.numel) / (i.numel - 1)).clamp_(min=0).sqrt_()


def _scale(i: GradientInputs, factors: Tensor) -> None:
    """Multiplies the gradients of encoder m by factors[m]."""
    for grads, factor in zip(i.encoder_grads, factors.unbind(), strict=True):
        torch._foreach_mul_(grads, factor)


def _add_noise(i: GradientInputs, noise_std: Tensor) -> None:
    """Adds noise_std[t] · N(0, 1); all the noise comes from one call of the generator."""
    sizes = [g.numel() for g in i.grads]
    flat = torch.randn(sum(sizes), dtype=i.dtype, device=i.device)
    # In the gradient's own format, without which `_foreach_` ops take tensor by tensor.
    noise = [
        z.view_as(g) if g.is_contiguous() else z.as_strided(g.shape, g.stride(), z.storage_offset())
        for z, g in zip(flat.split(sizes), i.grads, strict=True)
    ]
    torch._foreach_addcmul_(i.grads, noise, list(noise_std.to(i.dtype).unbind()))


def modality_scores(i: LogitsInputs) -> Tensor:
    stacked = torch.stack(i.logits)
    wide = torch.float64 if i.dtype == torch.float64 else torch.float32
    index = i.labels.view(1, -1, 1).expand(len(stacked), -1, 1)
    return stacked.softmax(dim=2, dtype=wide).gather(2, index).mean(dim=(1, 2))


def decision(i: LogitsInputs) -> tuple[Tensor, Tensor]:
    rho = _ratios(modality_scores(i))
    return torch.where(rho > 1, 1 - torch.tanh(ALPHA * rho), 1.0), rho


def discrepancy_ratios(i: ScoresInputs) -> Tensor:
    return _ratios(i.scores)


def grad_stats(i: GradientInputs) -> Tensor:
    return _std(i)


def grad_stats_anchors(i: GradientInputs) -> tuple[Tensor, Tensor]:
    products = torch._foreach_sub(i.params, i.anchors)
    torch._foreach_mul_(products, i.grads)
    dots = torch.stack([p.sum(dtype=i.wide) for p in products])
    return dots, _squares(i)


def update_scale(i: GradientInputs) -> None:
    _scale(i, i.coefficients)


def update_noise(i: GradientInputs) -> None:
    _scale(i, i.coefficients)
    _add_noise(i, i.noise_std)


def update_pull(i: GradientInputs) -> None:
    displacement = torch._foreach_sub(i.params, i.anchors)
    for part, factor in zip(i.by_encoder(displacement), i.pull_by_encoder.unbind(), strict=True):
        torch._foreach_mul_(part, factor)
    torch._foreach_add_(i.grads, displacement)


def update_all(i: GradientInputs) -> None:
    _scale(i, i.coefficients)
    update_pull(i)
    _add_noise(i, i.noise_std)


def ogm_ge(i: GradientInputs) -> None:
    std = _std(i) + 1e-8
    _scale(i, i.coefficients)
    _add_noise(i, std)


def inforeg(i: GradientInputs) -> Tensor:
    squares = _squares(i)
    update_pull(i)
    return squares


def redreg(i: GradientInputs) -> None:
    displacement = torch._foreach_sub(i.params, i.anchors)
    products = torch._foreach_mul(displacement, i.grads)
    dots = torch.stack([p.sum(dtype=i.wide) for p in products])
    scale = 1 - i.beta * dots / (_squares(i) + 1e-12)
    torch._foreach_mul_(i.grads, list(scale.to(i.dtype).unbind()))
    torch._foreach_mul_(displacement, i.beta)
    torch._foreach_add_(i.grads, displacement)


def scale_grad(i: FeatureInputs) -> Tensor:
    out = i.feature.view_as(i.feature)
    out.register_hook(lambda grad: i.coefficient * grad)
    return torch.autograd.grad(out, i.feature, i.grad_output)[0]


def ogm_step(i: GradientInputs) -> None:
    _scale(i, decision(i.head)[0])


def ogm_ge_step(i: GradientInputs) -> None:
    coefficients, _ = decision(i.head)
    std = _std(i) + 1e-8
    _scale(i, coefficients)
    _add_noise(i, std)


def paired_cosine(i: PairInputs) -> Tensor:
    # F.cosine_similarity takes twice as long: it normalises both before it multiplies.
    a, b = i.features
    norms = [torch.linalg.vector_norm(feature, dim=1) for feature in (a, b)]
    return ((a * b).sum(dim=1) / (norms[0] * norms[1])).mean()


def paired_cosine_grad(i: PairInputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(paired_cosine(i), i.features)


def gate(i: PairInputs) -> Tensor:
    return (paired_cosine(i) > i.threshold).to(i.threshold)


def noisy_views(i: ViewInputs) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.randn((2, *i.x.shape), dtype=i.dtype, device=i.device)
    first, second = torch.add(i.x, noise, alpha=SIGMA, out=noise).unbind()
    return first, second, F.mse_loss(first, second)


def redundancy_ratio(i: MapInputs) -> Tensor:
    return F.mse_loss(i.z1, i.z2) / (i.input_sq + 1e-12)


def drop_modalities(i: DropInputs) -> list[Tensor]:
    shape = (len(i.features), i.workload.batch, 1)
    keep = torch.rand(shape, device=i.device) > i.q.view(-1, 1, 1)
    return [feature * kept for feature, kept in zip(i.features, keep, strict=True)]


def drop_modalities_grad(i: DropInputs) -> tuple[Tensor, ...]:
    out = drop_modalities(i)
    return *out, *torch.autograd.grad(out, i.features, i.grad_outputs)


def _bins_of(x: Tensor, bins: int) -> Tensor:
    """[P, N] int32 indices of NumPy's bins over each row's range."""
    x = x if x.dtype == torch.float64 else x.float()
    low, high = x.aminmax(dim=1, keepdim=True)
    inner = torch.arange(1, bins, dtype=x.dtype, device=x.device) * ((high - low) / bins) + low
    return torch.searchsorted(inner, x, right=True, out_int32=True)


def _counts(*indices: Tensor, bins: int) -> Tensor:
    """[P, bins, …, bins] float64 counts of rows of paired indices."""
    problems = len(indices[0])
    cells = torch.arange(problems, dtype=torch.int32, device=indices[0].device).unsqueeze(1)
    for index in indices:
        cells = cells * bins + index
    shape = (problems, *[bins] * len(indices))
    return torch.bincount(cells.flatten(), minlength=math.prod(shape)).view(shape).double()


def _entropy(p: Tensor, *others: int) -> Tensor:
    """[P] entropy of p [P, bins, …], summed over the other variables."""
    margin = p.sum(others) if others else p
    return torch.special.entr(margin).flatten(1).sum(1)


def mutual_information(i: ValueInputs) -> tuple[Tensor, ...]:
    p = _counts(_bins_of(i.x, i.bins), _bins_of(i.y, i.bins), bins=i.bins) / i.x.shape[1]
    h_x, h_y = _entropy(p, 2), _entropy(p, 1)
    mi = h_x + h_y - _entropy(p)
    return mi, h_x, h_y, 2 * mi / (h_x + h_y)


def sample_information(i: ValueInputs) -> tuple[Tensor, ...]:
    return mutual_information(i)


def arm_information(i: FusionInputs) -> Tensor:
    rows = torch.stack([feature.flatten() for feature in i.features])
    indices = _bins_of(rows, i.bins)
    p = _counts(indices[:2], indices[2].expand(2, -1), bins=i.bins) / rows.shape[1]
    h_m, h_c = _entropy(p, 2), _entropy(p, 1)
    nmi = 2 - 2 * _entropy(p) / (h_m + h_c)
    a, v, c = _bins_of(rows, CONDITIONAL_BINS).unsqueeze(1)
    p = _counts(a, v, c, bins=CONDITIONAL_BINS) / rows.shape[1]
    h_avc, h_av = _entropy(p), _entropy(p, 3)
    given = torch.cat([_entropy(p, 1, 3), _entropy(p, 2, 3)])  # v, a
    with_c = torch.cat([_entropy(p, 1), _entropy(p, 2)])
    ncmi = 2 - 2 * (h_avc - given) / (h_av + with_c - 2 * given)
    return torch.cat([nmi, ncmi])


def _shares(x: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The lower of both bins of each value of the row, and what each of both bins gets."""
    low, high = x.amin(), x.amax()
    t = (x - low) * ((bins - 1) / (high - low))
    lower = t.detach().long().clamp_(max=bins - 2)
    return lower, torch.stack([lower + 1 - t, t - lower])


def soft_information(i: ValueInputs) -> tuple[Tensor, ...]:
    # As a product of two [N, bins] matrices it took longer, on the CPU.
    x, y = (v[0] if v.dtype == torch.float64 else v[0].float() for v in (i.x, i.y))
    (first, x_shares), (second, y_shares) = _shares(x, i.bins), _shares(y, i.bins)
    cell = first * i.bins + second
    cells = torch.stack([cell, cell + 1, cell + i.bins, cell + i.bins + 1])
    weights = (x_shares.unsqueeze(1) * y_shares).flatten()
    p = weights.new_zeros(i.bins**2).scatter_add(0, cells.flatten(), weights) / len(x)
    # The slope of −p log p is infinite at 0.
    p = p.clamp(min=torch.finfo(p.dtype).tiny).view(1, i.bins, i.bins)
    mi = _entropy(p, 2) + _entropy(p, 1) - _entropy(p)
    return mi, *torch.autograd.grad(mi, (i.x, i.y))


def info_nce(i: ContrastInputs) -> tuple[Tensor, ...]:
    # Two cross entropies, of S and of its transpose, took a tenth longer on the CPU.
    a, b = i.features
    a, b = (a, b) if a.dtype == torch.float64 else (a.float(), b.float())
    similarity = a @ (b / TEMPERATURE).T
    sums = (similarity.logsumexp(1) + similarity.logsumexp(0)) / 2
    bound = (similarity.diagonal() - sums).mean() + math.log(len(a))
    return bound, *torch.autograd.grad(bound, i.features)
