"""The catalogue of methods: tests, benchmarks, adapters, examples and documentation read it."""

from __future__ import annotations

from .arm import ARM
from .inforeg import InfoReg
from .mlb import MLB
from .mmpareto import MMPareto
from .ogm import OGM
from .opm import OPM
from .redreg import RedReg

#: Name → class; each has a `card` that says which paper it is, and where it acts.
METHODS: dict[str, type[OGM | OPM | InfoReg | RedReg | ARM | MLB | MMPareto]] = {
    made.__name__: made for made in (OGM, OPM, InfoReg, RedReg, ARM, MLB, MMPareto)
}
