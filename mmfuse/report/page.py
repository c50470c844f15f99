"""The page of a report: one HTML file with everything in it."""

from __future__ import annotations

import base64
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ._findings import shown, together
from ._packages import package
from .picture import DARK, LIGHT, caption, panel_png, panels

if TYPE_CHECKING:
    from .summary import ImbalanceReport

#: The lines of the table, as they begin → how to read them.
READINGS = {
    "alone": "The model with this modality only: all others are masked.",
    "removed": "The model without this modality. The further from all modalities, the more it "
    "leans on it.",
    "noise": "The model with noise on this modality only. Unless you chose another kind with "
    "corrupt=, it is Gaussian, and severity 1 is as large as the input itself varies.",
    "another model": "A model that was trained on this modality and nothing else: how much there "
    "is to be had from it.",
    "Shapley value": "By how much this modality improves the metric, on average over all orders "
    "in which the modalities can be added.",
    "Shapley share": "The same as a share of the gain over no input. Below 0 it does harm.",
    "probe of its encoder": "A linear classifier (or regression) on the frozen features of this "
    "model's encoder.",
    "probe of one trained alone": "The same on an encoder that was trained on this modality alone.",
    "ratio": "How much of the second probe the first one reaches. Below 1, joint training has left "
    "the encoder behind: this is the evidence of imbalance.",
}


def page(report: ImbalanceReport) -> str:
    """The page, which needs no network and follows the reader's light or dark setting.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    jinja2: Any = package("jinja2")
    source = resources.files(__package__ or "").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    rows = report.rows()
    titles = [title for title, _ in rows]
    found: str = environment.from_string(source).render(
        report=report,
        names=together(report.modalities),
        caption=caption(report),
        panels=[
            {
                "title": panel.title,
                "reading": panel.reading,
                "light": _embedded(panel_png(panel, LIGHT)),
                "dark": _embedded(panel_png(panel, DARK)),
            }
            for panel in panels(report)
        ],
        rows=[(title, [shown(row.get(name)) for name in report.modalities]) for title, row in rows],
        joint=shown(report.joint),
        nothing=shown(report.nothing),
        readings=[
            (begins, text)
            for begins, text in READINGS.items()
            if any(title.startswith(begins) for title in titles)
        ],
        data=json.dumps(report.as_dict(), indent=1),
        version=__version__,
    )
    return found


def _embedded(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")
