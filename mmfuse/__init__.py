"""mmfuse: fused kernels for balanced multimodal training."""

from . import ops
from ._version import __version__
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
    "drop_probabilities",
    "ogm_backward",
    "ogm_coefficients",
    "ops",
    "sample_contributions",
    "unimodal_logits",
    "use_backend",
]
