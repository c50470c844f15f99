"""The mutants are kernels without one mask; a case notices each, or the table says so."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton_mutants
from triton_bounds import Checked, Site
from triton_source import accesses

import mmfuse.triton.discrepancy_ratios as module
from mmfuse.triton import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")

ONE = ["--case", "discrepancy_ratios", "--module", "discrepancy_ratios"]
SOURCE = Path(module.__file__).read_text().splitlines()
# Of the only access with a mask.
MASKED = 1 + next(i for i, line in enumerate(SOURCE) if "mask=" in line)


def test_accesses_of_a_module() -> None:
    found = list(accesses(module))
    assert [access.text.split("(")[0] for access in found] == ["tl.load", "tl.load", "tl.store"]
    assert [access.masked for access in found] == [False, True, False]
    assert {access.function for access in found} == {"_discrepancy_ratios_kernel"}
    place = f"discrepancy_ratios.py:{MASKED} _discrepancy_ratios_kernel: tl.load(scores_ptr"
    assert place in str(found[1])


def test_who_comes_to_an_access_and_who_needs_its_mask() -> None:
    access = list(accesses(module))[1]
    place = str(module.__file__), access.lines.start
    for sites, comes, needs in (
        ({}, False, False),
        ({place: Site(8, 0)}, True, False),
        ({place: Site(8, 1)}, True, True),
        ({(place[0], place[1] - 1): Site(8, 1)}, False, False),
    ):
        checked = Checked(sites=sites)
        assert triton_mutants.comes_to(checked, access) is comes
        assert triton_mutants.needs_mask(checked, access) is needs


def test_a_mask_whose_loss_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert triton_mutants.main(ONE) == 0
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith(f"bounds (discrepancy_ratios): discrepancy_ratios.py:{MASKED} ")
    assert last == "triton_mutants: 1, {'bounds': 1}"


def test_a_mask_whose_loss_nobody_notices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_mutants, "noticed", lambda name, expected: None)
    assert triton_mutants.main(ONE) == 1
    first, last, missed = capsys.readouterr().out.splitlines()
    assert first.startswith("NOBODY: ") and last == "triton_mutants: 1, {'nobody': 1}"
    assert missed == f"not noticed: {first.removeprefix('NOBODY: ')}"


def test_results_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "discrepancy_ratios"
    expected = triton_mutants.reference(name)
    assert triton_mutants.noticed(name, expected) is None
    assert triton_mutants.noticed(name, [expected[0] + 1, *expected[1:]]) == "results"
    monkeypatch.setattr(triton_mutants, "reference", lambda name: [expected[0] + 1, *expected[1:]])
    with pytest.raises(RuntimeError, match=r"^discrepancy_ratios: output 0: "):
        triton_mutants.baseline(name)
