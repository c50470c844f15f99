"""The catalogue of methods: tests, benchmarks, adapters, examples and documentation read it.

`mmfuse` exports all that this module does.
"""

from __future__ import annotations

from typing import Any

from .agm import AGM, AGMResult
from .arl import ARL, ARLResult
from .arm import ARM, ARMResult
from .cggm import CGGM, CGGMResult
from .inforeg import InfoReg, InfoRegResult
from .learningrates import LearningRates, LearningRatesResult
from .lfm import LFM, LFMResult
from .mcr import MCR, MCRResult
from .mla import MLA, MLAFusion, MLAResult
from .mlb import MLB, MLBResult
from .mmpareto import MMPareto, MMParetoResult
from .modalitydropout import ModalityDropout, ModalityDropoutResult
from .noiseonly import NoiseOnly
from .ogm import OGM, OGMResult, ogm_coefficients
from .opm import OPM, OPMResult, drop_probabilities
from .pmr import PMR, PMRResult
from .redreg import RedReg, RedRegResult
from .relearning import ReLearning, ReLearningResult

#: Name → class, in the order of README's table; each has a `card` that says which paper it is, and
#: where it acts.
METHODS: dict[str, type[Any]] = {
    made.__name__: made
    for made in (
        OGM,
        OPM,
        InfoReg,
        RedReg,
        ARM,
        MLB,
        MMPareto,
        CGGM,
        AGM,
        ARL,
        LFM,
        MCR,
        PMR,
        MLA,
        ReLearning,
        LearningRates,
        ModalityDropout,
        NoiseOnly,
    )
}

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
    "OGMResult",
    "OPMResult",
    "PMRResult",
    "ReLearning",
    "ReLearningResult",
    "RedReg",
    "RedRegResult",
    "drop_probabilities",
    "ogm_coefficients",
]
