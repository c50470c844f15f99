"""Formulas become MathML when the site is built, which browsers show without any script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Converts each formula of a page; one that is no LaTeX is an error of the build."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        made = convert(html.unescape(found[3]).strip(), display=display)
        return f'<div class="formula">{made}</div>' if display == "block" else made

    return _FORMULA.sub(mathml, content)
