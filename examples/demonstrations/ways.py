"""Every way to train: the baselines, and all methods of the catalogue, some in several forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import mmfuse

from .baselines import Build, Joint, OwnHeads, Separate, UnimodalLosses
from .methods import Dropped, OnGradients, build, has_own_losses
from .settings import Drawn

# The methods that are trained in several forms.
_ogm_ge = partial(OnGradients, name="OGM", noise=True)
_FORMS: dict[str, dict[str, Build]] = {
    "OGM": {"OGM": partial(OnGradients, name="OGM", noise=False), "OGM-GE": _ogm_ge},
    "OPM": {"OPM": build("OPM"), "OPM + OGM-GE": partial(Dropped, name="OPM", then=_ogm_ge)},
}
JOINT, OWN_LOSSES, ENSEMBLE, ONLY = "joint", "unimodal losses", "ensemble", "only "
RATE = ", learning rate "


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


def at_rate(way: str, tuned: Mapping[str, Drawn]) -> str | None:
    """The way's baseline at the way's own learning rate, so that this is not what differs.

    It is a way to train like others, which `at_rates` builds; or the baseline itself, if both have
    the same rate; or None for a way without a joint model, or one whose settings are not there.
    """
    baseline = baseline_of(way)
    if baseline is None or way == ENSEMBLE or way.startswith(ONLY):
        return None
    if way not in tuned or baseline not in tuned:
        return None
    rate = tuned[way]["lr"]
    return baseline if rate == tuned[baseline]["lr"] else f"{baseline}{RATE}{rate:.4g}"


def at_rates(names: Sequence[str], tuned: Mapping[str, Drawn]) -> dict[str, Drawn]:
    """The baselines that these ways need beside the tuned ones → their settings."""
    out: dict[str, Drawn] = {}
    for way in names:
        name = at_rate(way, tuned)
        if name is not None and RATE in name:
            out[name] = {"lr": tuned[way]["lr"]}
    return out


def build_of(name: str, views: Sequence[str]) -> Build:
    """How to train with it, also at another way's learning rate."""
    return ways(views)[name.partition(RATE)[0]]


def needed(names: Sequence[str], views: Sequence[str]) -> list[str]:
    """The ways to train, and those without which they could not be compared, in the usual order.

    These are their baselines, the ensemble's members, and the modalities alone, which tell which
    modality is weak.
    """
    wanted = {*names, JOINT, *(f"{ONLY}{view}" for view in views)}
    wanted |= {baseline for way in names if (baseline := baseline_of(way)) is not None}
    return [way for way in ways(views) if way in wanted]
