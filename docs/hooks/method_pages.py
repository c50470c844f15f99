"""The parts of a method's page that its card, its docstring and the measurements already know.

A page in `docs/methods/` is written by hand but for two places: `<!-- facts -->` becomes the card,
`<!-- reference -->` the picture of its coefficients, its arguments, state, cost and `official()`.
In the training guide `<!-- adam -->` becomes the methods by what Adam makes of them, and in the
page that compares them `<!-- tuned -->` the ranges of their tuning.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from torch import nn

import mmfuse

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from demonstrations.search import LR, SPACES, EachView

log = logging.getLogger("mkdocs.hooks.method_pages")

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "images" / "coefficients"
_RESULTS = re.compile(r"<!-- table training: (\S+) -->")
_CAPTION = (
    "*Handwritten digits in two views, the first seed, by epoch. Left: the mean probability of the "
    "true class from each view alone, on validation data; right: the method's coefficients. "
    "`python examples/every_method.py` draws it.*"
)
#: Bytes of an element in float32.
_BYTES = 4
#: By what an adaptive optimizer makes of a method: the same for one, for several, and why.
ADAM = {
    "update": (
        'give it `apply_to="update"`',
        'Give these `apply_to="update"`',
        "they multiply whole gradients by a factor, or add noise to them.",
    ),
    "lost": (
        "Adam divides its factor out",
        "Adam divides the factors of these out",
        "they act at features or logits on the way back, and have no `apply_to`. Use SGD, or "
        "another method.",
    ),
    "kept": (
        "nothing to do",
        "Nothing to do with these",
        "they change a gradient's direction, the features, the loss or the parameters, which Adam "
        "does not divide out.",
    ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every method of the catalogue has a page, and every page is of a method."""
    pages = {Path(f.src_uri).stem for f in files.documentation_pages() if "methods/" in f.src_uri}
    expected = {name.lower() for name in mmfuse.METHODS} | {"index"}
    if pages != expected:
        log.warning("docs/methods: these are not both pages and methods: %s", pages ^ expected)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fills in the marked places."""
    uri = page.file.src_uri
    if uri == "methods/index.md":
        return _filled(markdown, "methods", _table(), uri)
    for page_, what, text in (("training.md", "adam", _adam), ("which_method.md", "tuned", _tuned)):
        if uri == page_:
            return _filled(markdown, what, text(), uri)
    names = {name.lower(): name for name in mmfuse.METHODS}
    name = names.get(Path(uri).stem) if uri.startswith("methods/") else None
    if name is None:
        return markdown
    markdown = _filled(markdown, "facts", facts(name), uri)
    return _filled(markdown, "reference", reference(name), uri)


def _filled(markdown: str, what: str, text: str, uri: str) -> str:
    marker = f"<!-- {what} -->"
    if markdown.count(marker) != 1:
        log.warning("%s: %s must be there once", uri, marker)
    return markdown.replace(marker, text)


def _table() -> str:
    lines = ["| method | paper | acts on | by default | `official()` |", "|---|---|---|---|---|"]
    for name, made in mmfuse.METHODS.items():
        card = made.card
        proofs = dict.fromkeys(_proof(source.golden) for source in card.official)
        lines.append(
            f"| [{name}]({name.lower()}.md) | {card.paper} | {card.acts} | {_proof(card.golden)} "
            f"| {' and '.join(proofs) or 'a control'} |"
        )
    return "\n".join(lines)


def _proof(golden: bool) -> str:
    return "golden numbers" if golden else "formulas"


def with_adam(name: str) -> str:
    """The key in `ADAM` of a method."""
    method = made(name)
    if isinstance(method, mmfuse.GradientMethod):
        return "update" if method.rule.need.scales else "kept"
    return "lost" if method.card.scales_back else "kept"


def _adam() -> str:
    lines = []
    for key, (_, begin, why) in ADAM.items():
        names = [n for n in mmfuse.METHODS if with_adam(n) == key]
        links = ", ".join(f"[{name}](methods/{name.lower()}.md)" for name in names)
        lines.append(f"- **{begin}:** {links}; {why}")
    return "\n".join(lines)


def tuned(name: str) -> str:
    """The ranges from which the comparison has drawn a method's hyper-parameters."""
    return "; ".join(_range(key, values) for key, values in SPACES.get(name, {}).items())


def _range(name: str, values: Any) -> str:
    each, of = (" of each modality", values.of) if isinstance(values, EachView) else ("", values)
    log_scale = ", log scale" if of.log else ""
    return f"`{name}`{each} {of.low:g} to {of.high:g}{log_scale}"


def _tuned() -> str:
    rows = [f"| all | {_range('lr', LR)} (SGD) |"]
    rows += [
        f"| [{name}](methods/{name.lower()}.md) | {tuned(name) or 'nothing else'} |"
        for name in mmfuse.METHODS
    ]
    return "\n".join(["| method | drawn from |", "|---|---|", *rows])


def facts(name: str) -> str:
    """The card as a table."""
    card = mmfuse.METHODS[name].card
    needs = ", ".join(f"`{need}`" for need in ("labels", *card.needs))
    rows = {
        "Paper": card.paper,
        "Acts on": card.acts,
        "Needs in a step": needs,
        "Losses": "the joint one and each modality's own"
        if card.own_losses or "unimodal_losses" in card.needs
        else "the joint one",
        "Three and more modalities": "give `num_modalities=`, 2 by default"
        if "num_modalities" in signature(mmfuse.METHODS[name]).parameters
        else "give as many encoders",
        "Under Adam": f"{ADAM[with_adam(name)][0]}; see [Adam](../training.md#adam)",
        "Tune": f"the learning rate; {tuned(name) or 'nothing else was tuned here'}; see "
        "[Tuning](../which_method.md#tuning)",
        "By default": card.fidelity,
    }
    for source in card.official:
        release = f'release="{source.release}"' if source.release else ""
        rows[f"`official({release})`"] = f"{source.code}: {source.fidelity}"
    (first, paper), *rest = rows.items()
    lines = [f"| {first} | {paper} |", "|---|---|", *(f"| {key} | {text} |" for key, text in rest)]
    return "\n".join(lines)


def reference(name: str) -> str:
    """Pictures, arguments, state and cost."""
    stem = name.lower()
    pictures = [p for p in PICTURES.glob("*.svg") if re.match(rf"{stem}\b|{stem}_", p.name)]
    pictures.sort(key=lambda path: len(path.name))
    if not pictures:
        log.warning("%s: no picture in %s", name, PICTURES)
    titled = len(pictures) > 1
    parts = ["## A run", *(_picture(name, path, titled) for path in pictures), _CAPTION]
    parts += ["## State", _state(name), "## Cost", _cost(name), "## Reference"]
    parts += [f"::: mmfuse.{public}" for public in exported(name)]
    return "\n\n".join(parts)


def exported(name: str) -> list[str]:
    """The public names that a method's files define, the class first."""
    found = [name]
    for public in dir(mmfuse):
        module = getattr(getattr(mmfuse, public), "__module__", "") or ""
        stem = module.removeprefix("mmfuse.methods.").lstrip("_")
        own = stem == name.lower() or stem.startswith(f"{name.lower()}_")
        if module.startswith("mmfuse.methods.") and own and public != name:
            found.append(public)
    return found


def _picture(name: str, path: Path, titled: bool) -> str:
    title = name if path.stem == name.lower() else path.stem.replace("_", " ").upper()
    image = f"![{title}: scores and coefficients over a run](../images/coefficients/{path.name})"
    return f"**{title}**\n\n{image}" if titled else image


def made(name: str) -> Any:
    """The method with its defaults, on two small encoders where it takes any."""
    cls = mmfuse.METHODS[name]
    given: dict[str, Any] = {}
    for key, parameter in signature(cls).parameters.items():
        if parameter.default is Parameter.empty and parameter.kind is not Parameter.VAR_KEYWORD:
            encoders = {m: nn.Linear(2, 2) for m in ("audio", "visual")}
            given[key] = {"encoders": encoders, "head": nn.Linear(2, 2), "epochs": 100}[key]
    return cls(**given)


def _state(name: str) -> str:
    method = made(name)
    saved = method.state_dict()
    entries = saved["state"] if isinstance(method, mmfuse.GradientMethod) else saved
    tensors = {k: v for k, v in entries.items() if isinstance(v, torch.Tensor)}
    lines = [f"| `{k}` | {list(v.shape)} | {v.dtype} |" for k, v in tensors.items()]
    text = (
        "\n".join(["| tensor | shape for two modalities | dtype |", "|---|---|---|", *lines])
        if lines
        else "The epoch and the number of steps, and no tensor."
    )
    if not isinstance(method, mmfuse.GradientMethod):
        return text
    if method.rule.need.second == "anchor":
        text += "\n\nAlso one copy of the encoders' parameters from the epoch's start."
    if method.rule.need.stream:
        text += "\n\nAlso the noise stream: seed and step, two integers on the device."
    return text


def bytes_per_element(need: Any) -> int:
    """The least that a step reads and writes of each encoder parameter's data, in float32."""
    second = {None: 0, "anchor": 2, "unimodal": 1}[need.second]
    sensed = (1 + second) if need.stats else 0
    return _BYTES * (sensed + 2 + second)


def _cost(name: str) -> str:
    method, lines = made(name), []
    if isinstance(method, mmfuse.GradientMethod):
        least = bytes_per_element(method.rule.need)
        text = f"- Memory traffic in a step: at least {least} bytes for each encoder parameter"
        # A control without its noise would do nothing.
        if method.card.official and method.rule.need.noise is not None:
            quiet = type(method)({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}, noise=False)
            text += f" ({bytes_per_element(quiet.rule.need)} with `noise=False`)"
        lines.append(f"{text} (float32).")
    counted = json.loads((ROOT / ".ci" / "instructions.json").read_text())["calls"]
    for key in (k for k in counted if k == name or k.startswith(f"{name}-")):
        n = counted[key]
        lines.append(
            f"- A small step of {key} on the CPU, counted: {n['operators']} operators, "
            f"{n['launches']} kernel launches."
        )
    lines += _measured(name)
    return "\n".join(lines)


def _measured(name: str) -> list[str]:
    found = _RESULTS.search((ROOT / "docs" / "speed.md").read_text())
    if found is None:
        log.warning("docs/speed.md: no table of training steps")
        return []
    with (ROOT / found[1] / "results.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["case"].endswith("_training")]
    shown = []
    for row in rows:
        title = row["title"].split(":")[0]
        if row["provider"] != "cpu" or not (title == name or title.startswith(f"{name}-")):
            continue
        text = f"- A whole training step with {title} takes {float(row['of_plain']):.2f} times"
        text += " as long as the same forward passes and losses alone (two ResNet-18 on a CPU"
        if row["vs_official"]:
            text += f"; the released sequence takes {float(row['vs_official']):.2f} times as long"
            text += " as this one"
        shown.append(f"{text}). See [Speed](../speed.md).")
    return shown
