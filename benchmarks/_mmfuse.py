"""Providers of mmfuse: the public calls, with all their checks, for a named backend.

One function per case, named like the case.
"""

from __future__ import annotations

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
    EPOCHS,
    LAMBDA,
    Q_BASE,
    SEED,
    SIGMA,
    DropInputs,
    FeatureInputs,
    GradientInputs,
    LogitsInputs,
    MapInputs,
    PairInputs,
    ScoresInputs,
    TrainingInputs,
    ViewInputs,
)
from torch import Tensor
from torch.nn import functional as F

import mmfuse
from mmfuse import ops
from mmfuse.methods._arm_information import normalised_information


def modality_scores(i: LogitsInputs, backend: str) -> Tensor:
    return ops.modality_scores(i.logits, i.labels, backend=backend).prob


def decision(i: LogitsInputs, backend: str) -> tuple[Tensor, Tensor]:
    scores = ops.modality_scores(i.logits, i.labels, backend=backend)
    found = ops.modulation_factors(scores.prob, ALPHA, "cvpr", backend=backend)
    return found.coefficients, found.ratios


def discrepancy_ratios(i: ScoresInputs, backend: str) -> Tensor:
    return ops.discrepancy_ratios(i.scores, backend=backend)


def grad_stats(i: GradientInputs, backend: str) -> Tensor:
    return ops.grad_stats(i.grads, backend=backend).std


def grad_stats_anchors(i: GradientInputs, backend: str) -> tuple[Tensor, Tensor]:
    stats = ops.grad_stats(i.grads, i.params, i.anchors, backend=backend)
    return stats.dot, stats.sq_norm


def update_scale(i: GradientInputs, backend: str) -> None:
    ops.update_grads_(i.grads, i.scale, backend=backend)


def update_noise(i: GradientInputs, backend: str) -> None:
    ops.update_grads_(i.grads, i.scale, noise_std=i.noise_std, stream=i.stream, backend=backend)


def update_pull(i: GradientInputs, backend: str) -> None:
    ops.update_grads_(
        i.grads, i.ones, params=i.params, anchors=i.anchors, pull=i.pull, backend=backend
    )


def update_all(i: GradientInputs, backend: str) -> None:
    ops.update_grads_(
        i.grads,
        i.scale,
        params=i.params,
        anchors=i.anchors,
        pull=i.pull,
        noise_std=i.noise_std,
        stream=i.stream,
        backend=backend,
    )


def ogm_ge(i: GradientInputs, backend: str) -> None:
    std = ops.grad_stats(i.grads, backend=backend).std + 1e-8
    ops.update_grads_(i.grads, i.scale, noise_std=std, stream=i.stream, backend=backend)


def inforeg(i: GradientInputs, backend: str) -> Tensor:
    squares = torch.empty(len(i.grads), dtype=torch.float64, device=i.device)
    ops.update_grads_(
        i.grads,
        i.ones,
        params=i.params,
        anchors=i.anchors,
        pull=i.pull,
        sq_norm=squares,
        backend=backend,
    )
    return squares


def redreg(i: GradientInputs, backend: str) -> None:
    stats = ops.grad_stats(i.grads, i.params, i.anchors, backend=backend)
    scale = 1 - i.beta * stats.dot / (stats.sq_norm + 1e-12)
    ops.update_grads_(
        i.grads,
        scale,
        params=i.params,
        anchors=i.anchors,
        pull=i.beta.expand_as(scale),
        backend=backend,
    )


def scale_grad(i: FeatureInputs, backend: str) -> Tensor:
    out = ops.scale_grad(i.feature, i.coefficient, backend=backend)
    return torch.autograd.grad(out, i.feature, i.grad_output)[0]


def _step(i: GradientInputs, backend: str, *, noise: bool) -> None:
    method = i.cached(
        ("OGM", backend, noise),
        lambda: mmfuse.OGM(
            dict(zip("av", i.encoder_params, strict=True)),
            alpha=ALPHA,
            noise=noise,
            formula="cvpr",
            stream=i.stream,
            backend=backend,
        ),
    )
    method.step(dict(zip("av", i.head.logits, strict=True)), i.head.labels)


def ogm_step(i: GradientInputs, backend: str) -> None:
    _step(i, backend, noise=False)


def ogm_ge_step(i: GradientInputs, backend: str) -> None:
    _step(i, backend, noise=True)


def paired_cosine(i: PairInputs, backend: str) -> Tensor:
    return ops.paired_cosine(*i.features, backend=backend)


def paired_cosine_grad(i: PairInputs, backend: str) -> tuple[Tensor, ...]:
    return torch.autograd.grad(paired_cosine(i, backend), i.features)


def gate(i: PairInputs, backend: str) -> Tensor:
    return ops.co_information_gate(i.features, i.threshold, backend=backend)


def noisy_views(i: ViewInputs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return ops.noisy_views(i.x, SIGMA, i.stream, backend=backend)


def redundancy_ratio(i: MapInputs, backend: str) -> Tensor:
    return ops.redundancy_ratio(i.z1, i.z2, i.input_sq, backend=backend)


def drop_modalities(i: DropInputs, backend: str) -> list[Tensor]:
    return ops.drop_modalities(i.features, i.q, i.stream, backend=backend).features


def drop_modalities_grad(i: DropInputs, backend: str) -> tuple[Tensor, ...]:
    out = drop_modalities(i, backend)
    return *out, *torch.autograd.grad(out, i.features, i.grad_outputs)


def mutual_information(i: ValueInputs, backend: str) -> tuple[Tensor, ...]:
    return ops.mutual_information(i.x, i.y, i.bins, backend=backend)


def sample_information(i: ValueInputs, backend: str) -> tuple[Tensor, ...]:
    return mutual_information(i, backend)


def soft_information(i: ValueInputs, backend: str) -> tuple[Tensor, ...]:
    mi = ops.mutual_information(i.x, i.y, i.bins, "soft", backend=backend).mi
    return mi, *torch.autograd.grad(mi, (i.x, i.y))


def arm_information(i: FusionInputs, backend: str) -> Tensor:
    rows = [feature.view(1, -1) for feature in i.features]
    found = normalised_information(rows, i.bins, CONDITIONAL_BINS, backend=backend)
    return torch.cat(found).squeeze(1)


def info_nce(i: ContrastInputs, backend: str) -> tuple[Tensor, ...]:
    bound = ops.info_nce(*i.features, TEMPERATURE, backend=backend)
    return bound, *torch.autograd.grad(bound, i.features)


def _ogm_training(i: TrainingInputs, backend: str, *, noise: bool) -> None:
    # As `OGM.official` sets it, which takes neither a stream nor a backend.
    method = i.cached(
        ("OGM", backend, noise),
        lambda: mmfuse.OGM(
            i.model.encoders,
            alpha=ALPHA,
            noise=noise,
            formula="cvpr",
            select="conv",
            stream=i.stream,
            backend=backend,
        ),
    )
    i.optimizer.zero_grad()
    a, v, out = i.model(i.audio, i.visual)
    logits = mmfuse.unimodal_logits(i.model.fc, {"audio": a, "visual": v})
    method.backward(F.cross_entropy(out, i.labels), logits, i.labels)
    i.optimizer.step()


def ogm_training(i: TrainingInputs, backend: str) -> None:
    """The released rule; the paper's, which users get by default, modulates the other tensors too.

    These are 0.1 % of the elements.
    """
    _ogm_training(i, backend, noise=False)


def ogm_ge_training(i: TrainingInputs, backend: str) -> None:
    """As `ogm_training`."""
    _ogm_training(i, backend, noise=True)


def opm_training(i: TrainingInputs, backend: str) -> tuple[Tensor, ...]:
    """The released rule in a step that drops; it selects samples, for which it waits once.

    `mmfuse.OPM()`, which users get by default, removes no sample and does not wait.
    """

    def start() -> mmfuse.OPM:
        made = mmfuse.OPM.official(
            Q_BASE,
            LAMBDA,
            p_exe=1.0,
            theta_gradient=False,  # as in `_official_training.opm_training`
            starts=0,
            stream=i.stream,
            backend=backend,
        )
        return made.to(i.device)

    method = i.cached(("OPM", backend), start)
    i.optimizer.zero_grad()
    a, v = i.model.features(i.audio, i.visual)
    features = {"audio": a, "visual": v}
    out = method(features, mmfuse.unimodal_logits(i.model.fc, features), i.labels)
    kept = tuple(out.features.values())
    F.cross_entropy(i.model.fc(torch.cat(kept, dim=1)), i.labels[out.rows]).backward()
    i.optimizer.step()
    return tuple(feature.detach() for feature in kept)


def arm_training(i: TrainingInputs, backend: str) -> None:
    """The released rule, in which nothing is clamped."""
    model = i.model
    method = i.cached(("ARM", backend), lambda: mmfuse.ARM.official(backend=backend).to(i.device))
    i.optimizer.zero_grad()
    a, v = model.features(i.audio, i.visual)
    features = {"visual": v, "audio": a}
    fused = model.neck(torch.cat([v, a], dim=1))
    logits = {name: model.fc(feature) for name, feature in features.items()}
    out = method(features, fused, logits, model.fc(fused), i.labels)
    joint = torch.cat(list(out.features.values()), dim=1)
    F.cross_entropy(model.fc(model.fc_out(joint)), i.labels).backward()
    i.optimizer.step()


def inforeg_training(i: TrainingInputs, backend: str) -> None:
    def start() -> mmfuse.InfoReg:
        method = mmfuse.InfoReg.official(i.model.encoders, backend=backend)
        with i.at_start():
            method.set_epoch(0)
        return method

    method = i.cached(("InfoReg", backend), start)
    i.optimizer.zero_grad()
    a, v, out = i.model(i.audio, i.visual)
    logits = mmfuse.unimodal_logits(i.model.fc, {"audio": a, "visual": v})
    sum(F.cross_entropy(z, i.labels) for z in (out, *logits.values())).backward()
    method.step(logits, i.labels)
    i.optimizer.step()


def redreg_training(i: TrainingInputs, backend: str) -> None:
    def start() -> mmfuse.RedReg:
        # The views' noise from the stream: what it is decides nothing here, see `_parity`.
        method = mmfuse.RedReg.official(
            i.model.encoders,
            epochs=EPOCHS,
            noise=None,
            stream=mmfuse.NoiseStream(SEED, i.device),
            backend=backend,
        )
        with i.at_start():
            method.set_epoch(0)
        return method

    method = i.cached(("RedReg", backend), start)
    i.optimizer.zero_grad()
    inputs = {"audio": i.audio, "visual": i.visual}
    seen = method.drop_inputs(inputs, i.uniform())
    a, v, out = i.model(seen["audio"], seen["visual"])
    logits = {"audio": i.model.head_audio(a), "visual": i.model.head_visual(v)}
    sum(F.cross_entropy(z, i.labels) for z in (out, *logits.values())).backward()
    method.step(logits, i.labels, {"audio": a, "visual": v}, inputs)
    i.optimizer.step()
