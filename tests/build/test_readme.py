"""README.md as an index shows it."""

from __future__ import annotations

import re

from installs import ROOT

from build_tools.readme import converted, for_index, source_url

TEXT = """See [`ops`](#ops), [training](docs/training.md#order), [OGM](https://arxiv.org/abs/1) and
![a plot](examples/plot.png) of `a[0](b)`.

```python
x[0](y)  # [not](a/link)
```
"""


def test_without_a_host_links_are_text() -> None:
    assert converted(TEXT, "") == (
        "See `ops`, training, [OGM](https://arxiv.org/abs/1) and\n*a plot* of `a[0](b)`.\n\n"
        "```python\nx[0](y)  # [not](a/link)\n```\n"
    )


def test_with_a_host_they_lead_there() -> None:
    text = converted(TEXT, "https://host.example/mmfuse")
    assert "See `ops`, [training](https://host.example/mmfuse/blob/HEAD/docs/training.md" in text
    assert "![a plot](https://host.example/mmfuse/raw/HEAD/examples/plot.png)" in text
    assert "x[0](y)  # [not](a/link)" in text


def test_the_host_is_read_from_the_project() -> None:
    project = (
        '[project]\nSource = "no"\n[project.urls]\nPaper = "p"\nSource = "https://a.example/"\n'
    )
    assert source_url(project) == "https://a.example"
    assert source_url('[project.urls]\nPaper = "p"\n[tool.x]\nSource = "no"\n') == ""


def test_no_link_of_the_readme_leads_nowhere_on_an_index() -> None:
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\]\((?!https:)", written), "there is nothing to convert"
    assert relative(written)
    assert relative(for_index()) == []


def relative(text: str) -> list[str]:
    """Links and pictures, outside code, that lead to a file."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))
    return [target for target in targets if not target.startswith("https://")]
