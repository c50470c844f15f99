"""ImbalanceReport: the numbers of a report, as a dict, a table, a picture and a page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ._findings import findings, shown
from ._history import History
from ._intervals import Estimate
from ._packages import package

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Estimate", "History", "ImbalanceReport", "Probes"]


_WIDTH = 100


class Probes(NamedTuple):
    """Linear probes of one modality's frozen encoders.

    Attributes:
        joint: The metric of a probe on the encoder of the model.
        alone: The same of an encoder that was trained on this modality alone, if there is one.
        ratio: How much of the latter the former reaches, joint / alone (of errors, alone / joint):
            below 1 the encoder is behind.
    """

    joint: Estimate
    alone: Estimate | None = None
    ratio: Estimate | None = None


@dataclass(frozen=True, repr=False)
class ImbalanceReport:
    """How much a model owes to each modality; made by `mmfuse.imbalance_report`.

    Every number is an `Estimate`: its value and the ends of its interval.

    Attributes:
        metric: Its name.
        higher_is_better: False for errors.
        samples: How many the numbers are of.
        modalities: Names.
        confidence: Of the intervals; None if there are none.
        joint: The metric with all modalities.
        nothing: With all of them masked.
        alone: Name → with all others masked.
        removed: Name → with this one masked.
        noisy: Name → severity → with noise on this one.
        trained_alone: Name → of a model that was trained on this one alone.
        leans_on: The modality whose removal costs more than nothing and more than that of each
            other one: the intervals of these differences, from the same resamples, lie above 0.
            None if the samples do not say, or without intervals.
        shapley: Name → Shapley value of the metric; of errors, by how much it lowers them.
        shapley_share: Name → its share of the gain over no modality; they add up to 1.
        probes: Name → linear probes of its encoders.
        history: Scores, coefficients and the like over training.
        notes: The parts that were left out, and why.
    """

    metric: str
    higher_is_better: bool
    samples: int
    modalities: tuple[str, ...]
    confidence: float | None
    joint: Estimate
    nothing: Estimate
    alone: dict[str, Estimate]
    removed: dict[str, Estimate]
    noisy: dict[str, dict[float, Estimate]] = field(default_factory=dict)
    trained_alone: dict[str, Estimate] = field(default_factory=dict)
    leans_on: str | None = None
    shapley: dict[str, Estimate] = field(default_factory=dict)
    shapley_share: dict[str, Estimate] = field(default_factory=dict)
    probes: dict[str, Probes] = field(default_factory=dict)
    history: History | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it in dicts, lists, texts and numbers, as JSON has them.

        Returns:
            Name of the attribute → value; an estimate is ``{"value", "low", "high"}``, and None
            stands for what is not defined.
        """
        fields = {name: getattr(self, name) for name in type(self).__dataclass_fields__}
        return {
            **{name: _plain(value) for name, value in fields.items()},
            "findings": self.findings,
        }

    @property
    def findings(self) -> list[str]:
        """The numbers in sentences."""
        return findings(self)

    def table(self) -> Table:
        """The numbers by modality, for ``rich.print``.

        Raises:
            ImportError: rich is not installed.
        """
        rich: Any = package("rich.table")
        arrow = "higher is better" if self.higher_is_better else "lower is better"
        # A name in brackets is none of rich's styles.
        escape: Any = package("rich.markup").escape
        found: Table = rich.Table(
            title=f"{escape(self.metric)} on {self.samples:,} samples ({arrow})",
            title_style="bold",
        )
        found.add_column("")
        for name in self.modalities:
            found.add_column(escape(name), justify="right")
        for title, row in self.rows():
            found.add_row(title, *(shown(row.get(name)) for name in self.modalities))
        found.caption = f"all modalities {shown(self.joint)}; all masked {shown(self.nothing)}"
        return found

    def rows(self) -> list[tuple[str, Mapping[str, Estimate | None]]]:
        """The lines of the table: title, and name → number; empty ones are left out."""
        severities = dict.fromkeys(s for noisy in self.noisy.values() for s in noisy)
        lines: list[tuple[str, Mapping[str, Estimate | None]]] = [
            ("alone (others masked)", self.alone),
            ("removed (masked)", self.removed),
            *(
                (f"noise of severity {s:g} on it", {n: by.get(s) for n, by in self.noisy.items()})
                for s in severities
            ),
            ("another model, trained on it alone", self.trained_alone),
            ("Shapley value", self.shapley),
            ("Shapley share", self.shapley_share),
            ("probe of its encoder", {n: p.joint for n, p in self.probes.items()}),
            ("probe of one trained alone", {n: p.alone for n, p in self.probes.items()}),
            ("ratio of both probes", {n: p.ratio for n, p in self.probes.items()}),
        ]
        return [(title, row) for title, row in lines if any(row.values())]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report, as the suffix says.

        Args:
            path: Ends in .png (the picture), .html (one page with everything in it, which needs no
                network) or .json (`as_dict`). Its folder must exist.

        Returns:
            The path.

        Raises:
            ValueError: the suffix is another.
            ImportError: matplotlib or jinja2 is not installed.
        """
        target = Path(path)
        suffix = target.suffix.lower()
        if suffix == ".json":
            target.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        elif suffix == ".png":
            from .picture import png  # imports matplotlib

            target.write_bytes(png(self))
        elif suffix == ".html":
            from .page import page

            target.write_text(page(self), encoding="utf-8")
        else:
            raise ValueError(f"path must end in .png, .html or .json, got {str(target)!r}")
        return target

    def __repr__(self) -> str:
        return (
            f"ImbalanceReport({self.metric} {shown(self.joint)} on {self.samples:,} samples of "
            f"{', '.join(self.modalities)})"
        )

    def __str__(self) -> str:
        # Wide enough for the number and its interval of each modality.
        wide = max(_WIDTH, 40 + sum(3 + max(21, len(name)) for name in self.modalities))
        console: Any = package("rich.console").Console(width=wide, record=True, file=_Nowhere())
        console.print(self.table())
        for sentence in (*self.findings, *self.notes):
            console.print(f"• {sentence}", highlight=False, markup=False, width=_WIDTH)
        text: str = console.export_text()
        return text.rstrip()


class _Nowhere:
    """A file that forgets."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """There is nothing."""


def _plain(value: Any) -> Any:
    """The value as JSON has it; NaN and infinity are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {_key(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return value


def _key(key: Any) -> str:
    return f"{key:g}" if isinstance(key, float) else str(key)
