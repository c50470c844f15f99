"""make races names its requirements, and finds every place where a kernel orders its memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import race_cases
from race_cases import (
    KINDS,
    REPORTED,
    Place,
    Result,
    kernel_places,
    places_of,
    sample_of,
    verdict_of,
)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "races.py"


def test_without_the_sanitizer_there_is_one_sentence() -> None:
    environment = {**os.environ, "CXX": "true"}
    command = [sys.executable, str(SCRIPT), "--all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "make races needs git, and GCC with libtsan\n"


def test_every_ordering_of_the_kernels_has_a_place() -> None:
    places = kernel_places()
    texts = {path: path.read_text() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    code = {path: re.sub(r"//.*", "", text) for path, text in texts.items()}
    words = r"__sync\w+|\batomic[A-Z]\w*|\b(?:store_relaxed|add_in_order)\b|__threadfence\w*"
    words += "|__nanosleep"
    found = {str(path.relative_to(ROOT)): re.findall(words, text) for path, text in code.items()}
    assert sum(map(len, found.values())) == len(places) > 30
    assert {place.function for place in places} == set(KINDS)
    assert len({place.name for place in places}) == len(places)
    for place in places:
        name, _, line = place.name.partition(":")
        assert place.function in (ROOT / name).read_text().splitlines()[int(line) - 1]


def test_comments_are_no_orderings_and_excuses_belong_to_one(tmp_path: Path) -> None:
    source = tmp_path / "one.cu"
    source.write_text(
        "  __syncthreads();  // race-mutants: nobody writes here\n"
        "  // __syncthreads() would be wrong\n"
        "\n"
        "  // race-mutants: one thread alone\n"
        "  atomicAdd(out, 1);\n"
        "  store_relaxed(flag, true);\n"
    )
    assert places_of([source], tmp_path) == [
        Place("one.cu:1", "__syncthreads", "nobody writes here"),
        Place("one.cu:5", "atomicAdd", "one thread alone"),
        Place("one.cu:6", "store_relaxed", ""),
    ]


@pytest.mark.parametrize(
    "line",
    ["__syncthreads(); __syncthreads();", "atomicMax(out, 1);", "__syncwarp();"],
)
def test_what_cannot_be_left_out_is_an_error(tmp_path: Path, line: str) -> None:
    source = tmp_path / "one.cu"
    source.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"one\.cu:2: cannot leave out (__sync|atomicMax)"):
        places_of([source], tmp_path)


def test_the_sample_has_each_kind_of_each_file() -> None:
    names = [("a.cu", "__syncthreads"), ("a.cu", "__syncthreads"), ("b.h", "__syncthreads")]
    names += [("a.cu", "atomicAdd"), ("b.h", "__syncthreads")]
    places = [Place(f"{name}:{i}", function) for i, (name, function) in enumerate(names)]
    assert sample_of(places) == [places[0], places[2], places[3]]


def result(code: int) -> Result:
    return Result("grad_stats", code, 1.5, [], "", [])


def test_verdicts() -> None:
    plain = Place("one.cu:1", "__syncthreads")
    excused = Place("one.cu:1", "__syncthreads", "nobody writes here")
    clean, reported, crashed = result(0), result(REPORTED), result(-11)
    assert verdict_of(plain, [clean, reported]) == (True, "reported in grad_stats, 3.0 s")
    assert verdict_of(plain, [clean]) == (False, "NOT REPORTED in grad_stats, 1.5 s")
    assert verdict_of(plain, []) == (False, "NOT REPORTED in any case, 0.0 s")
    well, said = verdict_of(plain, [crashed, clean])
    assert not well and said == "NOT REPORTED: grad_stats ended with code -11"
    assert verdict_of(excused, [clean]) == (True, "excused: nobody writes here")
    assert not verdict_of(excused, [crashed])[0]
    well, said = verdict_of(excused, [reported])
    assert not well and said.startswith("REPORTED in grad_stats, but excused")


def test_reports_are_told_apart() -> None:
    one = "WARNING: ThreadSanitizer: data race (pid=1)\n  Write of size 4\n"
    text = f"\n==================\n{one}==================\nrest\n==================\n{one}====\n"
    reports = race_cases.REPORT.findall(text)
    assert len(reports) == 2 and all("Write of size 4" in report for report in reports)
    assert "rest" not in reports[0]
