"""The catalogue of methods: tests, benchmarks, adapters, examples and documentation read it."""

from __future__ import annotations

from .agm import AGM
from .arl import ARL
from .arm import ARM
from .inforeg import InfoReg
from .learningrates import LearningRates
from .mlb import MLB
from .mmpareto import MMPareto
from .modalitydropout import ModalityDropout
from .noiseonly import NoiseOnly
from .ogm import OGM
from .opm import OPM
from .redreg import RedReg

_Gradient = OGM | InfoReg | RedReg | MLB | MMPareto | NoiseOnly | LearningRates
_Forward = OPM | ARM | AGM | ARL | ModalityDropout
_ALL: tuple[type[_Gradient | _Forward], ...] = (
    OGM,
    OPM,
    InfoReg,
    RedReg,
    ARM,
    MLB,
    MMPareto,
    AGM,
    ARL,
    LearningRates,
    ModalityDropout,
    NoiseOnly,
)

#: Name → class; each has a `card` that says which paper it is, and where it acts.
METHODS: dict[str, type[_Gradient | _Forward]] = {made.__name__: made for made in _ALL}
