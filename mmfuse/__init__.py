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
from .methods._arm_samples import sample_contributions
from .methods._ogm_backward import ogm_backward
from .methods.agm import AGM, AGMResult
from .methods.arl import ARL, ARLResult
from .methods.arm import ARM, ARMResult
from .methods.catalogue import METHODS
from .methods.cggm import CGGM, CGGMResult
from .methods.inforeg import InfoReg, InfoRegResult
from .methods.learningrates import LearningRates, LearningRatesResult
from .methods.lfm import LFM, LFMResult
from .methods.mcr import MCR, MCRResult
from .methods.mla import MLA, MLAFusion, MLAResult
from .methods.mlb import MLB, MLBResult
from .methods.mmpareto import MMPareto, MMParetoResult
from .methods.modalitydropout import ModalityDropout, ModalityDropoutResult
from .methods.noiseonly import NoiseOnly
from .methods.ogm import OGM, OGMResult, ogm_coefficients
from .methods.opm import OPM, OPMResult, drop_probabilities
from .methods.pmr import PMR, PMRResult
from .methods.redreg import RedReg, RedRegResult
from .methods.relearning import ReLearning, ReLearningResult
from .noise import NoiseStream
from .ops import use_backend

__all__ = [
    "AGM",
    "ARL",
    "ARM",
    "CGGM",
    "LFM",
    "MCR",
    "METHODS",
    "MLA",
    "MLB",
    "OGM",
    "OPM",
    "PMR",
    "AGMResult",
    "ARLResult",
    "ARMResult",
    "CGGMResult",
    "ContributionSampler",
    "GradientMethod",
    "InfoReg",
    "InfoRegResult",
    "LFMResult",
    "LearningRates",
    "LearningRatesResult",
    "MCRResult",
    "MLAFusion",
    "MLAResult",
    "MLBResult",
    "MMPareto",
    "MMParetoResult",
    "ModalityDropout",
    "ModalityDropoutResult",
    "NoiseOnly",
    "NoiseStream",
    "OGMResult",
    "OPMResult",
    "PMRResult",
    "ReLearning",
    "ReLearningResult",
    "RedReg",
    "RedRegResult",
    "ScalarLog",
    "__version__",
    "amp",
    "drop_probabilities",
    "match_parameters",
    "ogm_backward",
    "ogm_coefficients",
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
