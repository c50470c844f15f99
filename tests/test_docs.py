"""The documentation's code runs, and its claims about names are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mmfuse
from mmfuse.ops._registry import BACKENDS, OPS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
#: Of the package, where docstrings have training loops.
FOLDERS = ("methods", "adapters", "loop")
#: A method on features that is made, and what it becomes part of.
MADE = re.compile(r"\b(\w+)(?:\.\w+)? = mmfuse\.(?:OPM|ARM)\(")
#: A sum of the modalities' logits, which of a head that is not affine is not the head's output.
ADDED_UP = re.compile(
    r"logits\[[^]]*\] *\+ *\w|\+ *(?:self\.)?logits\["
    r"|sum\((?:list\()?(?:z for z in )?logits\.values\(\)"
    r"|(?:stack|cat)\([^\n]*logits\.values\(\)[^\n]*\.sum\("
)
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/training.md",
    "docs/methods.md",
    "docs/demonstrations.md",
)


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", "docs/training.md", "docs/methods.md"])
def test_code_runs_from_top_to_bottom(document: str) -> None:
    blocks = python_blocks((ROOT / document).read_text())
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, document, "exec"), namespace)


def shown() -> dict[str, str]:
    """What shows users how to train: documents, examples, docstrings."""
    named = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    package = [p for d in FOLDERS for p in (ROOT / "mmfuse" / d).glob("*.py")]
    return {str(path.relative_to(ROOT)): path.read_text() for path in [*named, *package]}


def test_methods_on_features_are_parts_of_the_model() -> None:
    """One that is not goes on dropping in an evaluation."""
    texts = {path: text for path, text in shown().items() if MADE.search(text)}
    assert len(texts) >= 4
    for path, text in texts.items():
        assert set(MADE.findall(text)) <= {"self", "model"}, path
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
    """The loss is that of the head's own output: their sum is another wherever it is not affine."""
    assert ADDED_UP.search(line)
    assert {path for path, text in shown().items() if ADDED_UP.search(text)} == set()


TASKS = (
    "Several labels",
    "Segmentation",
    "Tokens",
    "Regression",
    "Several tasks",
    "Shared fusion",
    "Formulas of other frameworks",
)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_few_lines_that_run(task: str) -> None:
    text = (ROOT / "docs/training.md").read_text()
    after = text[text.index(f"\n**{task}") :]
    block = python_blocks(after)[0]
    assert after.index("```python") < 500, "the code comes next"
    # Blank lines are those of the formatter.
    lines = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 25
    assert ".step(" in block


def test_the_two_commands_come_first() -> None:
    first = README.index("```")
    assert README[first:].startswith("```bash\nmake demo")
    assert "make test" in README[first : first + 400]


@pytest.mark.parametrize(
    "name", [n for n in mmfuse.ops.__all__ if n.islower() and not n.endswith("_backend")]
)
def test_every_op_is_in_the_table(name: str) -> None:
    assert re.search(rf"^\| `{name}", README, flags=re.MULTILINE), name


def test_no_op_is_undocumented() -> None:
    assert {op.public for op in OPS.values()} <= set(mmfuse.ops.__all__)


def test_files_that_the_documents_name_exist() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        named = re.findall(r"`((?:mmfuse|csrc|tests|benchmarks|examples)/[\w./]+)`", text)
        linked = re.findall(r"\]\(((?!http)[\w./]+)\)", text)
        beside = (ROOT / document).parent
        for path in [*(ROOT / p for p in named), *(beside / p for p in linked)]:
            assert path.exists(), f"{document} names {path}"


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
