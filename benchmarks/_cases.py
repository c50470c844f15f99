"""The registry: what is measured, on which data, against which result.

To add a case: a `Case` here, and a function of its name in each provider's module that can do it.
"""

from __future__ import annotations

from functools import partial

import _parity
import _parity_information
import _parity_training
from _case import Case
from _information_inputs import ContrastInputs, FusionInputs, ValueInputs
from _inputs import (
    BETA,
    PULL,
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
from _networks import AudioVisual, SharedHead, ThreeHeads


def _scaled(provider: str, i: GradientInputs, result: object) -> None:
    _parity.check_update(provider, i, scale=i.scale)


def _noised(provider: str, i: GradientInputs, result: object) -> None:
    _parity.check_update(provider, i, scale=i.scale, noise_std=i.noise_std)


def _pulled(provider: str, i: GradientInputs, result: object) -> None:
    _parity.check_update(provider, i, scale=i.ones, pull=i.pull)


def _all_three(provider: str, i: GradientInputs, result: object) -> None:
    _parity.check_update(provider, i, scale=i.scale, pull=i.pull, noise_std=i.noise_std)


def _ogm_ge(provider: str, i: GradientInputs, result: object) -> None:
    _parity.check_update(provider, i, scale=i.scale, noise_std=i.exact_stats.std + 1e-8)


def _redreg(provider: str, i: GradientInputs, result: object) -> None:
    stats = i.exact_stats
    scale = 1 - BETA * stats.dot / (stats.sq_norm + 1e-12)
    _parity.check_update(provider, i, scale=scale, pull=BETA * i.ones)


def _inforeg(provider: str, i: GradientInputs, result: object) -> None:
    _pulled(provider, i, result)
    # The released code takes the trace of what the pull has left.
    _parity.check_traces(i, result, PULL if provider == "official" else 0.0)


def _step(provider: str, i: GradientInputs, result: object, *, noise: bool) -> None:
    coefficients, _ = _parity.exact_decision(i.head.logits, i.head.labels)
    std = i.exact_stats.std + 1e-8 if noise else None
    _parity.check_update(provider, i, scale=coefficients[i.modality_index], noise_std=std)


_anchored = partial(GradientInputs, anchored=True)
_DECISION = ("modality_scores", "modulation_factors")
_REGULATION = ("modality_scores", "grad_stats", "update_grads_")
_DROP = ("drop_modalities", "drop_modalities_backward")
_MONITOR = ("noisy_views", "redundancy_ratio", "co_information_gate")

_ALL = (
    Case(
        "modality_scores",
        "modality_scores",
        "logits",
        ("modality_scores",),
        LogitsInputs,
        _parity.check_scores,
        passes=1,
    ),
    Case(
        "decision",
        "decision: scores, ratios, coefficients",
        "logits",
        _DECISION,
        LogitsInputs,
        _parity.check_decision,
        passes=1,
    ),
    Case(
        "discrepancy_ratios",
        "discrepancy_ratios",
        "scores",
        ("discrepancy_ratios",),
        ScoresInputs,
        _parity.check_ratios,
        passes=2,
    ),
    Case(
        "scale_grad",
        "scale_grad: forward and backward",
        "features",
        ("scale_grad_backward",),
        FeatureInputs,
        _parity.check_feature_grad,
        passes=2,
        autograd=True,
    ),
    Case(
        "grad_stats",
        "grad_stats: standard deviations",
        "gradients",
        ("grad_stats",),
        GradientInputs,
        _parity.check_std,
        passes=1,
    ),
    Case(
        "grad_stats_anchors",
        "grad_stats with anchors",
        "gradients",
        ("grad_stats",),
        _anchored,
        _parity.check_sums,
        passes=3,
    ),
    Case(
        "update_scale",
        "OGM: update_grads_(scale)",
        "gradients",
        ("update_grads_",),
        GradientInputs,
        _scaled,
        passes=2,
    ),
    Case(
        "update_noise",
        "update_grads_(scale, noise)",
        "gradients",
        ("update_grads_",),
        GradientInputs,
        _noised,
        passes=2,
        noisy=True,
    ),
    Case(
        "update_pull",
        "InfoReg: update_grads_(pull)",
        "gradients",
        ("update_grads_",),
        _anchored,
        _pulled,
        passes=4,
    ),
    Case(
        "update_all",
        "update_grads_(scale, pull, noise)",
        "gradients",
        ("update_grads_",),
        _anchored,
        _all_three,
        passes=4,
        noisy=True,
    ),
    Case(
        "ogm_ge",
        "OGM-GE: grad_stats, update_grads_",
        "gradients",
        ("grad_stats", "update_grads_"),
        GradientInputs,
        _ogm_ge,
        passes=3,
        noisy=True,
    ),
    Case(
        "inforeg",
        "InfoReg: Fisher trace, update_grads_",
        "gradients",
        ("update_grads_",),
        _anchored,
        _inforeg,
        passes=4,
    ),
    Case(
        "redreg",
        "RedReg: grad_stats, update_grads_",
        "gradients",
        ("grad_stats", "update_grads_"),
        _anchored,
        _redreg,
        passes=7,
    ),
    Case(
        "ogm_step",
        "OGM.step, noise=False",
        "gradients",
        (*_DECISION, "update_grads_"),
        GradientInputs,
        partial(_step, noise=False),
        passes=2,
        # The coefficient of the modality that is behind is one, which leaves nothing to move.
        operand="ahead_nbytes",
        encoders=2,
    ),
    Case(
        "ogm_ge_step",
        "OGM.step, noise=True",
        "gradients",
        (*_DECISION, "grad_stats", "update_grads_"),
        GradientInputs,
        partial(_step, noise=True),
        passes=3,
        encoders=2,
        noisy=True,
    ),
    Case(
        "paired_cosine",
        "paired_cosine",
        "features",
        ("paired_cosine",),
        PairInputs,
        _parity.check_cosine,
        passes=1,
    ),
    Case(
        "paired_cosine_grad",
        "paired_cosine: forward and backward",
        "features",
        ("paired_cosine", "paired_cosine_backward"),
        PairInputs,
        _parity.check_cosine_grads,
        passes=3,
        autograd=True,
    ),
    Case(
        "gate",
        "RedReg: co_information_gate",
        "features",
        ("co_information_gate",),
        PairInputs,
        _parity.check_gate,
        passes=1,
    ),
    Case(
        "noisy_views",
        "RedReg: noisy_views",
        "inputs",
        ("noisy_views",),
        ViewInputs,
        _parity.check_views,
        passes=3,
        noisy=True,
    ),
    Case(
        "redundancy_ratio",
        "RedReg: redundancy_ratio",
        "representations",
        ("redundancy_ratio",),
        MapInputs,
        _parity.check_redundancy,
        passes=1,
    ),
    Case(
        "drop_modalities",
        "OPM: drop_modalities",
        "features",
        ("drop_modalities",),
        DropInputs,
        _parity.check_drop,
        passes=2,
        noisy=True,
    ),
    Case(
        "drop_modalities_grad",
        "drop_modalities: forward and backward",
        "features",
        ("drop_modalities", "drop_modalities_backward"),
        DropInputs,
        _parity.check_drop,
        passes=4,
        noisy=True,
        autograd=True,
    ),
    Case(
        "mutual_information",
        "mutual_information",
        "pairs",
        ("joint_entropies",),
        ValueInputs,
        _parity_information.check_information,
        # The range has to be known before the first value is counted; fewer values stay in a cache.
        passes=2,
    ),
    Case(
        "soft_information",
        "mutual_information, soft: forward and backward",
        "few_pairs",
        ("soft_histogram", "soft_histogram_backward"),
        ValueInputs,
        _parity_information.check_soft,
        passes=3,
        autograd=True,
    ),
    Case(
        "sample_information",
        "mutual_information of each sample",
        "samples",
        ("joint_entropies",),
        ValueInputs,
        _parity_information.check_information,
        passes=1,
    ),
    Case(
        "arm_information",
        "ARM: nmi and ncmi",
        "fusion",
        ("joint_entropies",),
        FusionInputs,
        _parity_information.check_arm,
        passes=1,
    ),
    Case(
        "info_nce",
        "info_nce: forward and backward",
        "contrast",
        ("info_nce", "info_nce_backward"),
        ContrastInputs,
        _parity_information.check_contrast,
        # The products take the time, not the bytes.
        passes=0,
        autograd=True,
    ),
    Case(
        "ogm_training",
        "OGM: a whole training step",
        "training",
        (*_DECISION, "update_grads_"),
        partial(TrainingInputs, network=AudioVisual),
        partial(_parity_training.check_ogm, noise=False),
        passes=0,
        autograd=True,
        half=False,
    ),
    Case(
        "ogm_ge_training",
        "OGM-GE: a whole training step",
        "training",
        (*_DECISION, "grad_stats", "update_grads_"),
        partial(TrainingInputs, network=AudioVisual),
        partial(_parity_training.check_ogm, noise=True),
        passes=0,
        noisy=True,
        autograd=True,
        half=False,
    ),
    Case(
        "opm_training",
        "OPM: a whole training step",
        "training",
        (*_DECISION, *_DROP),
        partial(TrainingInputs, network=AudioVisual),
        _parity_training.check_opm,
        passes=0,
        noisy=True,
        autograd=True,
        half=False,
    ),
    Case(
        "arm_training",
        "ARM: a whole training step",
        "training",
        ("modality_scores", "joint_entropies"),
        partial(TrainingInputs, network=SharedHead),
        _parity_training.check_arm,
        passes=0,
        autograd=True,
        half=False,
    ),
    Case(
        "inforeg_training",
        "InfoReg: a whole training step",
        "training",
        _REGULATION,
        partial(TrainingInputs, network=AudioVisual),
        _parity_training.check_inforeg,
        passes=0,
        autograd=True,
        half=False,
    ),
    Case(
        "redreg_training",
        "RedReg: a whole training step",
        "training",
        (*_REGULATION, *_MONITOR),
        partial(TrainingInputs, network=ThreeHeads),
        _parity_training.check_redreg,
        passes=0,
        autograd=True,
        half=False,
    ),
)

CASES: dict[str, Case] = {case.name: case for case in _ALL}
