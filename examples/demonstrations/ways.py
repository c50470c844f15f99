"""Every way to train: the baselines, and all methods of the catalogue, some in several forms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mmfuse

from .baselines import Build, Joint, OwnHeads, Separate, UnimodalLosses
from .methods import Dropped, OnGradients, build, has_own_losses

# The methods that are trained in several forms.
_ogm_ge = partial(OnGradients, name="OGM", noise=True)
_FORMS: dict[str, dict[str, Build]] = {
    "OGM": {"OGM": partial(OnGradients, name="OGM", noise=False), "OGM-GE": _ogm_ge},
    "OPM": {"OPM": build("OPM"), "OPM + OGM-GE": partial(Dropped, name="OPM", then=_ogm_ge)},
}
JOINT, OWN_LOSSES, ENSEMBLE, ONLY = "joint", "unimodal losses", "ensemble", "only "


def ways(views: Sequence[str]) -> dict[str, Build]:
    """Name → how to train with it: the baselines, and every method of the catalogue."""
    out: dict[str, Build] = {f"{ONLY}{view}": partial(Separate, only=view) for view in views}
    out |= {
        ENSEMBLE: Separate,
        JOINT: Joint,
        OWN_LOSSES: UnimodalLosses,
        f"{OWN_LOSSES}, own heads": OwnHeads,
    }
    for name in mmfuse.METHODS:
        out |= _FORMS.get(name, {name: build(name)})
    return out


def method_of(way: str) -> str | None:
    """The method of the catalogue that a way to train is a form of; None for a baseline."""
    for name in mmfuse.METHODS:
        if way in _FORMS.get(name, {name: None}):
            return name
    return None


def baseline_of(way: str) -> str | None:
    """The way it is compared with: its losses without the method; None for joint training."""
    name = method_of(way)
    if name is not None and has_own_losses(name):
        return OWN_LOSSES
    return None if way == JOINT else JOINT
