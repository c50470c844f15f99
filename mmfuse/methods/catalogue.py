"""The catalogue of methods: tests, benchmarks, adapters, examples and documentation read it."""

from __future__ import annotations

from .arm import ARM
from .inforeg import InfoReg
from .mlb import MLB
from .ogm import OGM
from .opm import OPM
from .redreg import RedReg

Method = type[OGM] | type[OPM] | type[InfoReg] | type[RedReg] | type[ARM] | type[MLB]

#: Name → class; each has a `card` that says which paper it is, and where it acts.
METHODS: dict[str, Method] = {made.__name__: made for made in (OGM, OPM, InfoReg, RedReg, ARM, MLB)}
