"""Takes the mask of each load and store of the Triton kernels away, one at a time: who notices?

    python tests/kernels/triton_mutants.py                    of all; some ten minutes
    python tests/kernels/triton_mutants.py --case soft_histogram --module soft_histogram

Each case of every_kernel.py runs first as it is, in the interpreter, under the checker of
tests/support/triton_bounds.py and with new memory poisoned: that tells in which case which mask
keeps lanes out, and must find nothing. Then each access loses its mask, and these cases run again,
the short ones first, until one fails. "bounds" is what the checker has found; "results" are others
than those of the reference. Harmful ones that no case has noticed are listed once more at the end;
exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

import every_kernel
from comparing import compared
from samples import CASES
from torch import Tensor
from triton_bounds import BoundsError, Checked, Site, checked_bounds
from triton_source import Access, accesses, dropped_mask

import mmfuse.triton

_OWNER = "a lane of a tensor is at its owner's place, and writes there what the owner's lane does"
# The reason why nobody could notice, by the source of the access.
HARMLESS = {
    "tl.store(later_ptr + place, gain, mask=is_modality)": _OWNER,
    "tl.store(later_ptr + newest, gain, mask=is_modality)": _OWNER,
}


class Case(NamedTuple):
    """A case as it runs without a mutant.

    Attributes:
        checked: The accesses that it made.
        expected: The reference's results.
        seconds: How long it took.
    """

    checked: Checked
    expected: list[Tensor]
    seconds: float


def kernels_accesses() -> Iterator[Access]:
    """The accesses of all modules of mmfuse.triton."""
    for info in pkgutil.iter_modules(mmfuse.triton.__path__, "mmfuse.triton."):
        yield from accesses(importlib.import_module(info.name))


def run_case(name: str) -> tuple[Checked, list[Tensor]]:
    """A case under the checker, with new memory poisoned.

    Raises:
        BoundsError: an access missed its tensor.
    """
    every_kernel.poison()
    try:
        with checked_bounds() as checked:
            written = every_kernel.run("cpu", "triton", [name])[name]
    finally:
        every_kernel.poison(False)
    return checked, written


def reference(name: str) -> list[Tensor]:
    """The right results of the case."""
    return every_kernel.run("cpu", "reference", [name], interpreted=True)[name]


def baseline(name: str) -> Case:
    """A case without a mutant.

    Raises:
        RuntimeError: its results are not the reference's.
    """
    start = time.perf_counter()
    checked, written = run_case(name)
    seconds = time.perf_counter() - start
    expected = reference(name)
    different = compared(written, expected)
    if different:
        raise RuntimeError(f"{name}: {'; '.join(different)}")
    return Case(checked, expected, seconds)


def _sites(checked: Checked, access: Access) -> list[Site]:
    file = str(importlib.import_module(access.module).__file__)
    lines = [(file, line) for line in access.lines]
    return [checked.sites[line] for line in lines if line in checked.sites]


def comes_to(checked: Checked, access: Access) -> bool:
    """True if the kernels that were looked at have been at this access."""
    return bool(_sites(checked, access))


def needs_mask(checked: Checked, access: Access) -> bool:
    """True if its mask has kept a lane out; without one, nobody could notice that it is gone."""
    return any(site.kept_out for site in _sites(checked, access))


def noticed(name: str, expected: Sequence[Tensor]) -> str | None:
    """How a case fails, or None."""
    try:
        _, written = run_case(name)
    except BoundsError:
        return "bounds"
    except Exception as error:  # what a kernel does without its mask may be anything
        return type(error).__name__
    return "results" if compared(written, expected) else None


def verdict(access: Access, cases: dict[str, Case]) -> str | None:
    """The case that notices that this mask is gone, and how; None if no case does."""
    mine = [name for name, case in cases.items() if needs_mask(case.checked, access)]
    with dropped_mask(access.module, access.function, access.index):
        for name in sorted(mine, key=lambda name: cases[name].seconds):
            how = noticed(name, cases[name].expected)
            if how is not None:
                return f"{how} ({name})"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each mutant, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", default=[], choices=list(CASES))
    parser.add_argument("--module", action="append", default=[], help="of mmfuse.triton")
    options = parser.parse_args(arguments)
    cases = {name: baseline(name) for name in options.case or CASES}
    found: Counter[str] = Counter()
    missed = []
    for access in kernels_accesses():
        module = access.module.rpartition(".")[2]
        if not access.masked or (options.module and module not in options.module):
            continue
        how = verdict(access, cases)
        if how is None and access.text in HARMLESS:
            how = f"harmless ({HARMLESS[access.text]})"
        found["nobody" if how is None else how.split()[0]] += 1
        if how is None:
            missed.append(access)
        print(f"{how or 'NOBODY'}: {access}", flush=True)
    print(f"triton_mutants: {found.total()}, {dict(found)}")
    for access in missed:
        print(f"not noticed: {access}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
