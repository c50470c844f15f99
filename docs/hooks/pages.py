"""Pages that lie outside of `docs/`, and what the site demands of README.md."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import mmfuse

log = logging.getLogger("mkdocs.hooks.pages")

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES_OF_README = 150
#: Documents of the root that are pages of the site as well.
FROM_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
#: Figures and tables of the comparisons, and their folder in the site.
RESULTS, IN_SITE = "examples/results", "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents of the root, with links as they are in `docs/`, and the results."""
    for name, page in FROM_ROOT.items():
        text = (ROOT / name).read_text()
        text = re.sub(r"\]\(docs/", "](", text)
        for other, its in FROM_ROOT.items():
            text = text.replace(f"]({other}", f"]({its}")
        files.append(File.generated(config, page, content=text))
    for kind in ("png", "csv", "json"):
        for path in sorted((ROOT / RESULTS).glob(f"*/*.{kind}")):
            uri = f"{IN_SITE}/{path.parent.name}/{path.name}"
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Points links at the results as the site has them, and fills the page of the operators.

    That page gets an entry for every public name of `mmfuse.ops`.
    """
    markdown = markdown.replace(f"](../{RESULTS}/", f"]({IN_SITE}/")
    if page.file.src_uri != "ops.md":
        return markdown
    found = []
    for name in sorted(set(mmfuse.ops.__all__) - {"BACKENDS"}, key=str.lower):
        # The module that defines it counts: `mmfuse.ops.grad_stats` is the name of a module, too.
        found.append(f"::: {getattr(mmfuse.ops, name).__module__}.{name}")
    return markdown.replace("<!-- operators -->", "\n\n".join(found))


def on_pre_build(**_: Any) -> None:
    """A README that is too long is a warning, and so an error of the build."""
    lines = len((ROOT / "README.md").read_text().splitlines())
    if lines > MOST_LINES_OF_README:
        log.warning("README.md has %d lines, of at most %d", lines, MOST_LINES_OF_README)
