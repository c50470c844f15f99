"""Plots that explain themselves: words, whiskers, labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from engine.rows import Row

plot = pytest.importorskip("engine.plot")


def row(case: str, workload: str, provider: str = "cpu", ratio: float | None = 8.0) -> Row:
    labels = {"case": case, "title": f"the {case}", "workload": workload, "dtype": "float32"}
    times = {"median_ms": 10.0, "p20_ms": 8.0, "p80_ms": 20.0}
    rest = dict.fromkeys(Row.__dataclass_fields__)
    return Row(**{**rest, **labels, **times, "provider": provider, "vs_official": ratio})


MANY = [row(case, "large", who) for case in "abc" for who in ("foreach", "cpu")]
FEW = [row(case, workload) for case, workload in (("a", "small"), ("d", "small"), ("a", "tiny"))]


def texts(figure: Any) -> str:
    found = [figure._suptitle.get_text(), figure._supxlabel.get_text()]
    found += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return "\n".join(found)


def test_no_two_bars_of_a_provider_are_under_one_label() -> None:
    made = plot.panels([*MANY, *FEW])
    assert list(made) == ["large", plot.OTHERS]
    assert list(made[plot.OTHERS]) == ["the a\nsmall", "the d\nsmall", "the a\ntiny"]
    for groups in made.values():
        for rows in groups.values():
            providers = [r.provider for r in rows]
            assert len(set(providers)) == len(providers)
            assert len({(r.case, r.workload) for r in rows}) == 1


def test_no_panel_is_mostly_empty() -> None:
    figure = plot.draw([*MANY, *FEW], "title")
    assert len(figure.axes) == len(plot.panels([*MANY, *FEW]))
    figure.draw_without_rendering()
    heights = [ax.get_position().height for ax in figure.axes]
    bars = [sum(patch.get_width() != 0 for patch in ax.patches) for ax in figure.axes]
    # Figures are as high as their contents, but for the gaps between groups.
    assert heights[0] / heights[1] == pytest.approx(bars[0] / bars[1], rel=0.35)
    for ax in figure.axes:
        low, high = ax.get_xlim()
        # The longest whisker ends at 10 of these.
        assert 0.5 < low < 1 < 10 < high < 16


def test_the_legend_is_in_words_and_the_ratio_is_defined() -> None:
    text = texts(plot.draw(MANY, "title"))
    assert "best eager PyTorch" in text and "mmfuse C++" in text
    assert "its time over this one's" in text and "p20 and p80" in text
    assert not {"foreach", "cpu"} & set(text.split())


def test_whiskers_are_p20_and_p80() -> None:
    # At p80 a call takes twice its median, at p20 four fifths.
    assert plot.whiskers(row("a", "w")) == pytest.approx((4.0, 2.0))
    figure = plot.draw([row("a", "w")], "title")
    (bars,) = [c for c in figure.axes[0].containers if type(c).__name__ == "BarContainer"]
    (segment,) = bars.errorbar.lines[2][0].get_segments()
    assert [x for x, _ in segment] == pytest.approx([4.0, 10.0])


def test_what_has_no_ratio_is_not_drawn(tmp_path: Path) -> None:
    alone = [row("a", "w", ratio=None), row("a", "w", "official", 1.0)]
    assert plot.write_plots(alone, tmp_path, "") == []
    half = dataclasses.replace(row("a", "w"), dtype="bfloat16")
    names = plot.write_plots([*alone, half], tmp_path, "")
    assert names == ["speedup_bfloat16.png"]
    assert (tmp_path / names[0]).read_bytes().startswith(b"\x89PNG")
