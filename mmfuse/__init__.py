"""mmfuse: fused kernels for balanced multimodal training."""

from . import amp, ops, scores
from ._version import __version__
from .loop.gradients import GradientMethod
from .loop.heads import unimodal_logits
from .loop.losses import unimodal_losses
from .loop.masking import unimodal_outputs
from .loop.matching import match_parameters
from .loop.resampling import ContributionSampler
from .loop.scalars import ScalarLog, scalars_of
from .loop.shapley import shapley_responses
from .methods import catalogue
from .methods._arm_samples import sample_contributions
from .methods._ogm_backward import ogm_backward
from .methods.catalogue import *  # noqa: F403
from .noise import NoiseStream
from .ops import use_backend

__all__ = [
    "ContributionSampler",
    "GradientMethod",
    "NoiseStream",
    "ScalarLog",
    "__version__",
    "amp",
    "match_parameters",
    "ogm_backward",
    "ops",
    "sample_contributions",
    "scalars_of",
    "scores",
    "shapley_responses",
    "unimodal_logits",
    "unimodal_losses",
    "unimodal_outputs",
    "use_backend",
]

# The methods, their results and their functions.
__all__ += catalogue.__all__
