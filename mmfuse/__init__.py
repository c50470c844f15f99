"""mmfuse: fused kernels for balanced multimodal training."""

from . import amp, ops
from ._version import __version__
from .adapters.parameters import match_parameters
from .arm import ARM, ARMResult, sample_contributions
from .heads import unimodal_logits
from .inforeg import InfoReg, InfoRegResult
from .noise import NoiseStream
from .ogm import OGM, OGMResult, ogm_backward, ogm_coefficients
from .opm import OPM, OPMResult, drop_probabilities
from .ops import use_backend
from .redreg import RedReg, RedRegResult
from .resampling import ContributionSampler

__all__ = [
    "ARM",
    "OGM",
    "OPM",
    "ARMResult",
    "ContributionSampler",
    "InfoReg",
    "InfoRegResult",
    "NoiseStream",
    "OGMResult",
    "OPMResult",
    "RedReg",
    "RedRegResult",
    "__version__",
    "amp",
    "drop_probabilities",
    "match_parameters",
    "ogm_backward",
    "ogm_coefficients",
    "ops",
    "sample_contributions",
    "unimodal_logits",
    "use_backend",
]
