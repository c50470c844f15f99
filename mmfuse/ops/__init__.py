"""The fused operators. Each exists in every backend; `python -m mmfuse` shows the grid."""

from ._registry import BACKENDS, active_backend, use_backend
from .co_information_gate import co_information_gate
from .discrepancy_ratios import discrepancy_ratios
from .drop_modalities import DroppedModalities, drop_modalities
from .grad_stats import GradStats, grad_stats
from .info_nce import info_nce
from .information_pull import InformationPull, information_pull
from .joint_entropies import JointEntropies, joint_entropies
from .keep_state import keep_state_
from .logit_divergence import logit_divergence
from .modality_accuracies import ModalityAccuracies, modality_accuracies
from .modality_scores import ModalityScores, modality_scores
from .modulation_factors import ModulationFactors, modulation_factors
from .mutual_information import (
    ConditionalMutualInformation,
    MutualInformation,
    co_information,
    conditional_mutual_information,
    mutual_information,
)
from .noisy_views import NoisyViews, noisy_views
from .paired_cosine import paired_cosine
from .progress_factors import ProgressFactors, progress_factors
from .redundancy_pull import (
    RedundancyPull,
    RedundancyRule,
    RedundancyState,
    redundancy_pull,
)
from .redundancy_ratio import redundancy_ratio
from .sample_scores import SampleScores, sample_scores
from .scale_grad import scale_grad
from .shared_information import SharedInformation, shared_information
from .soft_histogram import soft_histogram
from .update_grads import update_grads_

__all__ = [
    "BACKENDS",
    "ConditionalMutualInformation",
    "DroppedModalities",
    "GradStats",
    "InformationPull",
    "JointEntropies",
    "ModalityAccuracies",
    "ModalityScores",
    "ModulationFactors",
    "MutualInformation",
    "NoisyViews",
    "ProgressFactors",
    "RedundancyPull",
    "RedundancyRule",
    "RedundancyState",
    "SampleScores",
    "SharedInformation",
    "active_backend",
    "co_information",
    "co_information_gate",
    "conditional_mutual_information",
    "discrepancy_ratios",
    "drop_modalities",
    "grad_stats",
    "info_nce",
    "information_pull",
    "joint_entropies",
    "keep_state_",
    "logit_divergence",
    "modality_accuracies",
    "modality_scores",
    "modulation_factors",
    "mutual_information",
    "noisy_views",
    "paired_cosine",
    "progress_factors",
    "redundancy_pull",
    "redundancy_ratio",
    "sample_scores",
    "scale_grad",
    "shared_information",
    "soft_histogram",
    "update_grads_",
    "use_backend",
]


def __dir__() -> list[str]:
    """Public names alone: beside `update_grads_` there is a module `update_grads`."""
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__"]
