"""The catalogue of methods: tests, benchmarks, adapters, examples and documentation read it."""

from __future__ import annotations

from .agm import AGM
from .arl import ARL
from .arm import ARM
from .cggm import CGGM
from .inforeg import InfoReg
from .learningrates import LearningRates
from .lfm import LFM
from .mcr import MCR
from .mla import MLA
from .mlb import MLB
from .mmpareto import MMPareto
from .modalitydropout import ModalityDropout
from .noiseonly import NoiseOnly
from .ogm import OGM
from .opm import OPM
from .pmr import PMR
from .redreg import RedReg
from .relearning import ReLearning

_Gradient = OGM | InfoReg | RedReg | MLB | MMPareto | CGGM | NoiseOnly | LearningRates
_Forward = OPM | ARM | AGM | ARL | LFM | MCR | PMR | ModalityDropout
_Other = MLA | ReLearning
_ALL: tuple[type[_Gradient | _Forward | _Other], ...] = (
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

#: Name → class; each has a `card` that says which paper it is, and where it acts.
METHODS: dict[str, type[_Gradient | _Forward | _Other]] = {made.__name__: made for made in _ALL}
