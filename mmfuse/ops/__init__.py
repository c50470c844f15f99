"""The fused operators. Each exists in every backend; `python -m mmfuse` shows the grid."""

from ._registry import BACKENDS, active_backend, use_backend
from .discrepancy_ratios import discrepancy_ratios
from .grad_stats import GradStats, grad_stats
from .modality_scores import ModalityScores, modality_scores
from .scale_grad import scale_grad
from .update_grads import update_grads_

__all__ = [
    "BACKENDS",
    "GradStats",
    "ModalityScores",
    "active_backend",
    "discrepancy_ratios",
    "grad_stats",
    "modality_scores",
    "scale_grad",
    "update_grads_",
    "use_backend",
]
