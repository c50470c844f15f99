"""A report's numbers in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ._intervals import Estimate

if TYPE_CHECKING:
    from .summary import ImbalanceReport


def shown(estimate: Estimate | None, percent: bool = False) -> str:
    """'0.968 (0.959–0.976)'; a dash where there is no number."""
    if estimate is None or math.isnan(estimate.value):
        return "—"
    value, low, high = (
        None if v is None else _digits(v, percent)
        for v in (estimate.value, estimate.low, estimate.high)
    )
    unit = "\N{NO-BREAK SPACE}%" if percent else ""
    if low is None or high is None:
        return f"{value}{unit}"
    return f"{value}{unit} ({low}–{high})"


def _digits(value: float, percent: bool) -> str:
    text = (
        f"{100 * value:.0f}" if percent else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
    )
    return text.replace("-", "−")


def together(parts: Iterable[str]) -> str:
    """'a, b and c'."""
    *some, last = parts
    return f"{', '.join(some)} and {last}" if some else last


def findings(report: ImbalanceReport) -> list[str]:
    """Sentences, the most important first."""
    found = [
        f"With all modalities the model's {report.metric} is {shown(report.joint)}; with all of "
        f"them masked it is {shown(report.nothing)}.",
        *_probes(report),
        _leaning(report),
        *_gains(report),
        *_trained_alone(report),
    ]
    if all(p.ratio is None or math.isnan(p.ratio.value) for p in report.probes.values()):
        found.append(
            "Masking alone cannot tell an encoder that joint training has left behind from a "
            "modality that says little: encoders= and unimodal_encoders= compare them."
        )
    return found


def headline(report: ImbalanceReport) -> str:
    """The two most important findings in one line."""
    parts = [f"The model leans most on {report.leans_on}." if report.leans_on else ""]
    behind = _behind(report)
    if behind:
        encoders = "encoder has" if len(behind) == 1 else "encoders have"
        parts.append(
            f"The {together(behind)} {encoders} learnt less than trained alone (linear probes)."
        )
    return " ".join(part for part in parts if part)


def _by_cost(report: ImbalanceReport) -> list[tuple[str, Estimate]]:
    """Modalities and the metric without them, the dearest first."""
    sign = 1 if report.higher_is_better else -1

    def place(item: tuple[str, Estimate]) -> tuple[bool, float]:
        value = item[1].value
        return math.isnan(value), sign * value

    return sorted(report.removed.items(), key=place)


def _behind(report: ImbalanceReport) -> list[str]:
    """Encoders whose interval lies below 1, the furthest first."""
    ratios = {name: p.ratio for name, p in report.probes.items() if p.ratio is not None}
    found = {n: r.value for n, r in ratios.items() if r.high is not None and r.high < 1}
    return sorted(found, key=found.__getitem__)


def _leaning(report: ImbalanceReport) -> str:
    each = together(f"{shown(value)} without {name}" for name, value in _by_cost(report))
    start = f"By masking, the {report.metric} is {each}"
    if report.leans_on is not None:
        return f"{start}: the model leans most on {report.leans_on}."
    if any(value.low is None for value in report.removed.values()):
        return f"{start}."
    return f"{start}: these samples do not say which one the model leans on most."


def _gains(report: ImbalanceReport) -> list[str]:
    if not report.shapley:
        return []
    if any(math.isnan(phi.value) for phi in report.shapley.values()):
        return [
            f"With some inputs masked the {report.metric} is not defined, and so are no Shapley "
            "values."
        ]
    if any(math.isnan(share.value) for share in report.shapley_share.values()):
        return ["With its inputs the model is no better than without: Shapley shares mean nothing."]
    ordered = sorted(report.shapley_share.items(), key=lambda item: -item[1].value)
    parts = together(f"{name} brings {shown(share, percent=True)}" for name, share in ordered)
    return [f"Of the gain over no input at all, {parts} (Shapley shares)."]


def _trained_alone(report: ImbalanceReport) -> list[str]:
    found = []
    for name, own in report.trained_alone.items():
        found.append(
            f"A model trained on {name} alone has {shown(own)}; the joint model makes "
            f"{shown(report.alone[name])} of {name} when all else is masked."
        )
    return found


def _probes(report: ImbalanceReport) -> list[str]:
    found = []
    behind = _behind(report)
    for name, probes in report.probes.items():
        ratio = probes.ratio
        if ratio is None or math.isnan(ratio.value):
            continue
        worth = f"{shown(ratio)} times as good as those of an encoder trained alone"
        text = f"By linear probes the features of the {name} encoder are {worth}"
        if ratio.low is None or ratio.high is None:
            found.append(f"{text}.")
        elif ratio.high < 1:
            found.append(f"{text}: it is behind.")
        elif ratio.low > 1:
            found.append(f"{text}: it is ahead.")
        else:
            found.append(f"{text}: no difference can be seen.")
    ratios = [probes.ratio.value for n in behind if (probes := report.probes[n]).ratio]
    if len(behind) > 1 and ratios[0] < ratios[1]:
        found.append(f"Furthest behind is {behind[0]}.")
    return found
