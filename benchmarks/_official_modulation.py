"""Provider `official`: whole training steps of OGM, OGM-GE, OPM and ARM, as `_official`.

Running losses and what is only logged are left out.
"""

from __future__ import annotations

import torch
from _information_inputs import CONDITIONAL_BINS
from _inputs import ALPHA, LAMBDA, Q_BASE, TrainingInputs
from _official import batch_scores, decide, drop, scale, scale_with_noise, two_ratios
from _official_information import ncmi, nmi
from torch import Tensor
from torch.nn import functional as F


def own_logits(i: TrainingInputs, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Each modality's logits, from its half of the joint head."""
    weight, bias = i.model.fc.weight, i.model.fc.bias
    half = weight.size(1) // 2
    out_v = torch.mm(v, torch.transpose(weight[:, half:], 0, 1)) + bias / 2
    out_a = torch.mm(a, torch.transpose(weight[:, :half], 0, 1)) + bias / 2
    return out_a, out_v


def _ogm(i: TrainingInputs, *, noise: bool) -> None:
    i.optimizer.zero_grad()
    a, v, out = i.model(i.audio, i.visual)
    out_a, out_v = own_logits(i, a, v)
    F.cross_entropy(out, i.labels).backward()
    coefficients, _ = decide(out_a, out_v, i.labels, ALPHA)
    modulate = scale_with_noise if noise else scale
    # The parameters are found by their names, in every step.
    for name, p in i.model.named_parameters():
        layer = name.split(".")[0]
        for modality, k in zip(("audio", "visual"), coefficients, strict=True):
            if modality in layer and len(p.grad.size()) == 4:
                modulate([p], k)
    i.optimizer.step()


def ogm_training(i: TrainingInputs) -> None:
    """With autograd on, and scores that are not detached, as released."""
    _ogm(i, noise=False)


def ogm_ge_training(i: TrainingInputs) -> None:
    """As `ogm_training`."""
    _ogm(i, noise=True)


def drop_rates(score_a: Tensor, score_v: Tensor) -> Tensor:
    """OPM's probabilities [2], of the modality that is ahead and of the other, which keeps all."""
    q = torch.zeros(2, dtype=score_a.dtype, device=score_a.device)
    for m, ratio in enumerate(two_ratios(score_a, score_v)):
        excess = torch.tanh(torch.relu(ratio - 1))
        q[m] = Q_BASE * (1 + LAMBDA * excess) if excess > 0 else 0
    return torch.clip(q, 0, 1)


def opm_training(i: TrainingInputs) -> tuple[Tensor, ...]:
    """A step that drops, which the released script does in a share of the steps; what is left."""
    i.optimizer.zero_grad()
    a, v = i.model.features(i.audio, i.visual)
    with torch.no_grad():
        out_a, out_v = own_logits(i, a, v)
        score_v, score_a = batch_scores([out_v, out_a], i.labels)
        q = drop_rates(score_a, score_v)
    kept, left = drop([a, v], q)
    out = i.model.fc(torch.cat(kept, dim=1))
    F.cross_entropy(out, i.labels[left.squeeze(1)]).backward()
    i.optimizer.step()
    return tuple(feature.detach() for feature in kept)


def arm_training(i: TrainingInputs) -> None:
    """The information is counted on the host; the weights are numbers there."""
    model = i.model
    i.optimizer.zero_grad()
    a, v = model.features(i.audio, i.visual)
    c = model.neck(torch.cat([v, a], dim=1))
    logits = [model.fc(feature) for feature in (c, v, a)]
    p_c, p_v, p_a = (s.item() / len(i.labels) for s in batch_scores(logits, i.labels))
    nmi_a, nmi_v = nmi(a, c, i.workload.bins), nmi(v, c, i.workload.bins)
    alone_a = nmi_a - ncmi(a, c, v, CONDITIONAL_BINS)
    alone_v = nmi_v - ncmi(v, c, a, CONDITIONAL_BINS)
    gain_a = p_c * nmi_a + p_v * alone_a
    gain_v = p_c * nmi_v + p_a * alone_v
    weighted = torch.cat([gain_a / gain_v * v, gain_v / gain_a * a], dim=1)
    F.cross_entropy(model.fc(model.fc_out(weighted)), i.labels).backward()
    i.optimizer.step()
