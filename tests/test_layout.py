"""The floor plan: where things are, what may import what, and how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import mmfuse

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmfuse"
TESTS = ROOT / "tests"
RELEASED = ROOT / "released"

# From the top down: nobody imports from a folder before its own.
ORDER = ("adapters", "report", "methods", "loop", "ops", "triton", "reference")
# Users import these, and the package starts with them. Nothing else lies beside the folders.
IN_THE_ROOT = {
    "_check",
    "_devices",
    "_numbers",
    "__init__",
    "__main__",
    "_native",
    "_version",
    "amp",
    "noise",
    "scores",
}
# Folders of op × backend: their tests are those of the ops.
GRID = ("ops", "reference", "triton")
# Files with sentences in them.
PROSE = {".py", ".h", ".cpp", ".cu", ".md", ".toml"}
MOST_LINES = 400
MOST_LINES_OF_A_METHOD = 300
MOST_LINES_OF_A_BENCHMARK = 300


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository; those that were removed but not yet committed are left out."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    else:  # an unpacked source distribution, which says what it has
        names = (ROOT / "mmfuse.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
        wanted = {pattern if "*" in pattern else f"{pattern}/*" for pattern in patterns or "*"}
        listed = [name for name in names if any(fnmatch(name, pattern) for pattern in wanted)]
    found = [ROOT / name for name in listed]
    return [path for path in found if path.is_file()]


def imported(path: Path) -> Iterator[str]:
    """Names of the modules of mmfuse that a file imports, without "mmfuse."."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        names = [f"{module}.{alias.name}" for alias in node.names]
        yield from (n.removeprefix("mmfuse.") for n in names if n.startswith("mmfuse."))


def test_nothing_imports_from_above() -> None:
    seen = set()
    for place, folder in enumerate(ORDER):
        for path in sorted((PACKAGE / folder).glob("*.py")):
            for name in imported(path):
                target = name.split(".")[0]
                seen.add((folder, target))
                assert target not in ORDER[:place], f"{path.relative_to(ROOT)} imports {name}"
    # Each folder is used by one above it, so that the walk has seen real imports.
    assert {("adapters", "loop"), ("methods", "loop"), ("methods", "ops"), ("loop", "ops")} <= seen
    assert {("adapters", "methods"), ("report", "loop")} <= seen


def test_nobody_imports_an_adapter() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "adapters":
            names = [name for name in imported(path) if name.split(".")[0] == "adapters"]
            assert names == [], path


def test_what_lies_in_the_root() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == IN_THE_ROOT


def modules() -> list[Path]:
    """Public modules, but the folders' own files."""
    found = [path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("_")]
    return sorted(path.relative_to(PACKAGE) for path in found)


@pytest.mark.parametrize("module", modules(), ids=str)
def test_every_module_has_a_test_file_of_its_name(module: Path) -> None:
    folder = module.parent.name
    if folder in GRID[1:]:
        # The noise is the package's own module, of which these are the halves.
        of_op = TESTS / "ops" / f"test_{module.stem}.py"
        assert of_op.is_file() or module.stem == "noise"
    else:
        assert (TESTS / folder / f"test_{module.stem}.py").is_file()


def imported_packages(path: Path) -> set[str]:
    """The packages that a file imports from elsewhere, by the first of their names."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
    return {name.split(".")[0] for name in names}


def test_a_paper_is_a_short_file() -> None:
    lengths = {p.name: len(p.read_text().splitlines()) for p in (PACKAGE / "methods").glob("*.py")}
    assert len(lengths) > 10
    assert {name: n for name, n in lengths.items() if n > MOST_LINES_OF_A_METHOD} == {}


def test_the_benchmark_is_short_files() -> None:
    """A case is an op or a method with all its providers; the engine knows none of them."""
    files = tracked("benchmarks/*.py")
    lengths = {p.name: len(p.read_text().splitlines()) for p in files}
    long = {name: n for name, n in lengths.items() if n > MOST_LINES_OF_A_BENCHMARK}
    assert len(files) > 40 and long == {}
    ops = {path.stem for path in (PACKAGE / "ops").glob("[a-z]*.py")}
    methods = {path.stem for path in (PACKAGE / "methods").glob("[a-z]*.py")} - {"catalogue"}
    cases = {path.stem for path in (ROOT / "benchmarks" / "cases").glob("[a-z]*.py")}
    # All ways to take histograms are measured as what users call, mutual information.
    assert ops - cases == {"joint_entropies", "soft_entropies", "soft_histogram"}
    # A control has no released sequence to be measured against.
    released = {name.lower() for name, made in mmfuse.METHODS.items() if made.card.official}
    assert methods & released <= cases
    assert cases - ops - methods == {
        "soft_information",
        "conditional_information",
        "overhead",
        "adapters",
    }
    for path in (ROOT / "benchmarks" / "engine").glob("*.py"):
        assert "cases" not in imported_packages(path), path


def test_pytest_collects_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """It leaves out folders by their names, without a word."""
    left_out = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(ROOT) for path in tracked("tests/*.py")}
    assert len(folders) > 8
    for folder in folders:
        assert folder.parts[0] in pytestconfig.getini("testpaths")
        assert not any(fnmatch(part, name) for part in folder.parts for name in left_out), folder


def test_the_released_sequences_stand_alone_and_are_replayed() -> None:
    """They know nothing of mmfuse, tests or benchmarks, and mmfuse knows nothing of them."""
    methods = {path.stem for path in RELEASED.glob("*.py")} - {"__init__", "networks"}
    assert methods and methods <= {path.stem for path in (PACKAGE / "methods").glob("*.py")}
    for path in RELEASED.glob("*.py"):
        assert imported_packages(path) - sys.stdlib_module_names <= {"numpy", "torch"}, path
    for path in PACKAGE.rglob("*.py"):
        assert "released" not in imported_packages(path), path
    for name in methods:
        # Without numbers, the method's own test has it.
        files = ("golden/test_released_", "golden/test_golden_", "methods/test_")
        paths = [path for file in files if (path := TESTS / f"{file}{name}.py").is_file()]
        assert any(f"from released import {name}" in path.read_text() for path in paths), name


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports tests by it: of two, it collects one, and stops at the other."""
    names = [path.name for path in tracked("tests/*.py") if path.name.startswith("test_")]
    assert sorted(set(names)) == sorted(names)


def test_no_test_imports_a_test() -> None:
    tests = tracked("tests/*.py")
    assert len(tests) > 60
    for path in tests:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            bad = [name for name in names if re.match(r"(tests\.|test_|conftest)", name)]
            assert bad == [], path.relative_to(ROOT)


@pytest.mark.parametrize("folder", ["mmfuse", "csrc"])
def test_files_are_short_enough_to_read(folder: str) -> None:
    sources = [p for p in tracked(folder) if p.suffix in (".py", ".h", ".cpp", ".cu")]
    assert len(sources) > 40
    long = {p.name: n for p in sources if (n := len(p.read_text().splitlines())) > MOST_LINES}
    assert long == {}


def test_csrc_shows_op_by_backend() -> None:
    """A file that is no op's, nor a helper of one op, lies in a folder below."""
    ops = {path.stem for path in (PACKAGE / "reference").glob("[a-z]*.py")}
    for backend in ("cpu", "cuda"):
        for path in (ROOT / "csrc" / backend).glob("*.*"):
            assert path.stem.removesuffix("_kernel") in ops, path.name


def test_kernels_know_no_pytorch() -> None:
    """A kernel's sources include neither a header of PyTorch nor the glue."""
    kernels = [
        path
        for path in tracked("csrc")
        if path.suffix == ".cu"
        or path.parent.name in ("common", "device")
        or path.name.endswith("_kernel.h")
    ]
    assert len(kernels) > 30
    for path in kernels:
        assert not re.search(r"#include [<\"](torch|ATen|glue)/", path.read_text()), path


def test_sentences_begin_with_their_subject() -> None:
    """Comments, docstrings, documents and texts in the code; questions may ask with these words."""
    begins = re.compile(r"\bW(?:hat|hether|hoever|here)\b(?![^.?!]*\?)")
    found, seen = [], set()
    for path in tracked():
        if path.suffix not in PROSE and path.name != "Makefile":
            continue
        seen.add(path.suffix)
        text = path.read_text()
        for match in begins.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(ROOT)}:{line}: {text[match.start() :][:40]!r}")
    assert seen >= PROSE
    assert found == []
