"""The page: complete in itself, the same numbers, nothing that a name could inject."""

from __future__ import annotations

import base64
import functools
import json
import re
from html.parser import HTMLParser

import torch
from reported import Added, batched, samples
from torch import nn

import mmfuse
from mmfuse.report._findings import shown
from mmfuse.report.page import READINGS, page
from mmfuse.report.summary import ImbalanceReport


def reported() -> ImbalanceReport:
    names = ("audio", "visual")
    inputs, labels = samples(names, rows=60)
    data = batched(inputs, labels)
    nets = {n: nn.Identity() for n in names}
    return mmfuse.imbalance_report(
        Added(audio=1.0, visual=0.3),
        data,
        encoders=nets,
        unimodal_encoders=nets,
        unimodal_models=nets,
        train_loader=data,
        history=[{f"coefficients/{n}": torch.tensor(0.5) for n in names}] * 4,
        resamples=20,
    )


class Read(HTMLParser):
    """Tags and their attributes, texts, and what is left open."""

    VOID = ("meta", "img", "source", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@functools.cache
def full() -> tuple[ImbalanceReport, str]:
    """A report with everything, and its page."""
    torch.manual_seed(0)
    report = reported()
    return report, page(report)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = full()[1]
    found = Read(text)
    assert found.open == []
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "link", "iframe", "object"}
    assert {"title", "h1", "table", "figure", "picture", "details"} <= tags
    named = [a[key] for _, a in found.tags for key in ("src", "srcset", "href") if key in a]
    assert len(named) == 2 * 5, "each panel for light and for dark readers"
    for value in named:
        assert value is not None and value.startswith("data:image/png;base64,")
        assert base64.b64decode(value.partition(",")[2]).startswith(b"\x89PNG")
    assert not re.search(r"https?://|url\(|@import", re.sub(r"base64,[\w+/=]+", "", text))
    assert all(a.get("alt") for tag, a in found.tags if tag == "img")
    viewports = [a["content"] for tag, a in found.tags if a.get("name") == "viewport"]
    assert viewports == ["width=device-width, initial-scale=1"]
    assert "prefers-color-scheme: dark" in text


def test_the_page_has_every_number_and_sentence() -> None:
    report, text = full()
    texts = Read(text).texts
    for sentence in report.findings:
        assert sentence in texts
    for title, row in report.rows():
        at = texts.index(title)
        cells = [text for text in texts[at + 1 :] if text][: len(report.modalities)]
        assert cells == [shown(row.get(name)) for name in report.modalities]
        assert any(title.startswith(begins) for begins in READINGS), f"{title} says how to read it"
    for begins, reading in READINGS.items():
        assert reading in texts and begins in texts
    data = next(text for text in texts if text.startswith("{"))
    assert json.loads(data) == report.as_dict()


def test_what_is_not_there_is_left_out() -> None:
    inputs, labels = samples(("audio", "visual"), rows=30)
    report = mmfuse.imbalance_report(
        Added(audio=1.0, visual=0.2), [(inputs, labels)], severities=(), shapley=False, resamples=0
    )
    text = page(report)
    assert READINGS["alone"] in text and READINGS["ratio"] not in text
    assert READINGS["noise"] not in text
    assert report.notes and report.notes[0] in Read(text).texts
    assert report.notes[0] not in full()[1]


def test_a_name_is_text() -> None:
    names = ("<img src=x onerror=alert(1)>", "a & b")
    inputs, labels = samples(names, rows=30)
    text = page(
        mmfuse.imbalance_report(
            lambda x: x["a & b"],
            [(inputs, labels)],
            forward=lambda x: x["a & b"],
            severities=(),
            resamples=0,
        )
    )
    assert not any("onerror" in attributes for _, attributes in Read(text).tags)
    assert "&lt;img src=x onerror=alert(1)&gt;" in text and "a &amp; b" in text
