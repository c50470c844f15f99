"""The documentation's code runs, and its claims about names are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mmfuse
from mmfuse.ops._registry import BACKENDS, OPS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/training.md")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", "docs/training.md"])
def test_code_runs_from_top_to_bottom(document: str) -> None:
    blocks = python_blocks((ROOT / document).read_text())
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, document, "exec"), namespace)


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
