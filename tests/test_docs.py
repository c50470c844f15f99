"""The documentation's code runs, and its claims about names are true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mmfuse
from mmfuse.ops._registry import BACKENDS, OPS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MOST_LINES_OF_README = 150
#: Folders of the package whose docstrings have training loops.
FOLDERS = ("methods", "adapters", "loop")
#: A method on features that is made, and what it becomes part of.
MADE = re.compile(r"\b(\w+)(?:\.\w+)? = mmfuse\.(?:OPM|ARM|ModalityDropout)\(")
#: A sum of the modalities' logits, which of a head that is not affine is not the head's output.
ADDED_UP = re.compile(
    r"logits\[[^]]*\] *\+ *\w|\+ *(?:self\.)?logits\["
    r"|sum\((?:list\()?(?:z for z in )?logits\.values\(\)"
    r"|(?:stack|cat)\([^\n]*logits\.values\(\)[^\n]*\.sum\("
)
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *PAGES)
#: A tutorial shows parts of a script, which its own test runs.
SNIPPET = re.compile(r'^--8<-- "([\w/.]+):(\w+)"$', re.MULTILINE)


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


WITH_CODE = [name for name in DOCUMENTS if python_blocks((ROOT / name).read_text())]


@pytest.mark.parametrize("document", WITH_CODE)
def test_code_runs_from_top_to_bottom(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where files are written
    namespace: dict = {"__name__": "document"}
    for block in python_blocks((ROOT / document).read_text()):
        exec(compile(block, document, "exec"), namespace)
    assert "mmfuse" in namespace


def test_every_page_that_should_have_code_has_some() -> None:
    of_methods = {f"docs/methods/{name.lower()}.md" for name in mmfuse.METHODS}
    guides = {f"docs/{name}.md" for name in ("training", "other_tasks", "any_fusion", "start")}
    pages = {"README.md", "docs/other_methods.md", *guides}
    assert of_methods | pages <= set(WITH_CODE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_blocks_name_their_language(document: str) -> None:
    """One without would be skipped in silence by the test above."""
    fences = re.findall(r"^ *```(.*)$", (ROOT / document).read_text(), flags=re.MULTILINE)
    languages = set(fences[::2])
    assert languages <= {"python", "py", "bash", "diff", "text", " {.python}"}, document
    snippets = SNIPPET.findall((ROOT / document).read_text())
    assert fences.count(" {.python}") == len(snippets), "Ruff would format them, and break them"
    fragments = ("docs/several_processes.md", "docs/adapters.md")  # of loops that a framework owns
    assert "py" not in languages or document in fragments


def _is_run(path: str) -> bool:
    """True if a test has the name of this example, or of one that imports it."""
    module = ".".join(Path(path).with_suffix("").parts[1:])
    users = [
        p for p in (ROOT / "examples").glob("*.py") if f"from {module} import" in p.read_text()
    ]
    names = {Path(path).stem, *(p.stem for p in users)}
    return any((ROOT / "tests" / "examples" / f"test_{name}.py").is_file() for name in names)


def test_snippets_are_parts_of_examples_that_are_tested() -> None:
    found = [pair for page in PAGES for pair in SNIPPET.findall((ROOT / page).read_text())]
    assert len(found) >= 5
    for path, part in found:
        text = (ROOT / path).read_text()
        assert text.count(f"--8<-- [start:{part}]") == text.count(f"--8<-- [end:{part}]") == 1
        assert _is_run(path), f"no test runs {path}, which a page shows"


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES_OF_README


def shown() -> dict[str, str]:
    """Documents, examples and docstrings that show users how to train."""
    named = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    package = [p for d in FOLDERS for p in (ROOT / "mmfuse" / d).glob("*.py")]
    return {str(path.relative_to(ROOT)): path.read_text() for path in [*named, *package]}


def test_methods_on_features_are_parts_of_the_model() -> None:
    """One that is not goes on dropping in an evaluation."""
    texts = {path: text for path, text in shown().items() if MADE.search(text)}
    assert len(texts) >= 4
    for path, text in texts.items():
        assert set(MADE.findall(text)) <= {"self", "model", "opm"}, path
        assert "eval()" in text or path.startswith("mmfuse/adapters"), path


@pytest.mark.parametrize(
    "line",
    [
        'F.cross_entropy(logits["audio"] + logits["visual"], labels)',
        "F.cross_entropy(sum(logits.values()), labels)",
        "F.cross_entropy(sum(z for z in logits.values()), labels)",
        "loss = F.cross_entropy(bias + logits[name], labels)",
        "F.cross_entropy(torch.stack(list(logits.values())).sum(0), labels)",
    ],
)
def test_no_example_adds_up_the_logits_of_modalities(line: str) -> None:
    """The loss is that of the head's own output; the sum is another if the head is not affine."""
    assert ADDED_UP.search(line)
    assert {path for path, text in shown().items() if ADDED_UP.search(text)} == set()


TASKS = (
    "Soft labels",
    "Several labels",
    "A single logit",
    "Segmentation",
    "Tokens",
    "Regression",
    "Several tasks",
    "Shared fusion",
    "Formulas of other frameworks",
)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_few_lines_that_run(task: str) -> None:
    text = (ROOT / "docs/other_tasks.md").read_text()
    after = text[text.index(f"\n**{task}") :]
    block = python_blocks(after)[0]
    assert after.index("```python") < 500, "the code comes next"
    # Blank lines are those of the formatter.
    lines = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 25
    assert ".step(" in block


def test_installing_and_the_two_commands_come_first() -> None:
    first = README[README.index("```") :].split("```")[1]
    lines = [line.split("#")[0].strip() for line in first.splitlines()[1:]]
    assert lines[0].startswith("pip install")
    assert lines[1:3] == ["make demo", "make test"]


@pytest.mark.parametrize(
    "name", [n for n in mmfuse.ops.__all__ if n.islower() and not n.endswith("_backend")]
)
def test_every_op_is_in_the_table(name: str) -> None:
    page = (ROOT / "docs" / "ops.md").read_text()
    assert re.search(rf"^\| `{name}", page, flags=re.MULTILINE), name


def test_no_op_is_undocumented() -> None:
    assert {op.public for op in OPS.values()} <= set(mmfuse.ops.__all__)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_the_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:mmfuse|csrc|tests|benchmarks|examples)/[\w./]+)`", text)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    linked = re.findall(r"\]\(((?!http)[\w./]+)(?:#[\w.-]+)?\)", prose)
    beside = (ROOT / document).parent
    for path in [*(ROOT / p for p in named), *(beside / p for p in linked)]:
        # The site makes two pages from documents of the root; examples write into their output.
        made = (ROOT / f"{path.stem.upper()}.md").exists() or "output" in path.parts
        assert path.exists() or made, f"{document} names {path}"


def test_scripts_name_pages_that_exist() -> None:
    for path in [*(ROOT / "mmfuse").rglob("*.py"), *(ROOT / "examples").glob("*.py")]:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        for page in re.findall(r"`(docs/[\w/.]+)`", text):
            assert (ROOT / page).exists(), f"{path} names {page}"


def test_grid_by_file_name() -> None:
    """The same file name in every backend's folder: `ls` shows the grid."""
    for op in {op.module for op in OPS.values()}:
        for path in (
            f"mmfuse/ops/{op}.py",
            f"mmfuse/reference/{op}.py",
            f"mmfuse/triton/{op}.py",
            f"csrc/cpu/{op}.cpp",
            f"csrc/cuda/{op}.cpp",
            f"csrc/cuda/{op}_kernel.cu",
        ):
            assert (ROOT / path).exists(), path
    assert len(BACKENDS) == 4
