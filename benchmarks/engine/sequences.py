"""Finds `released/`, the authors' sequences, which lies beside this folder and is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

# At the end, so that an installed mmfuse stays the one that is measured.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import released
from released import (
    agm,
    arl,
    arm,
    cggm,
    inforeg,
    lfm,
    mcr,
    mla,
    mlb,
    mmpareto,
    ogm,
    opm,
    pmr,
    redreg,
    relearning,
)

__all__ = [
    "agm",
    "arl",
    "arm",
    "cggm",
    "inforeg",
    "lfm",
    "mcr",
    "mla",
    "mlb",
    "mmpareto",
    "ogm",
    "opm",
    "pmr",
    "redreg",
    "relearning",
    "released",
]
