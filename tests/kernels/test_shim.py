"""The shim itself: warp operations, barriers, atomics, orders, permissions, and its errors."""

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu import build
from cuda_on_cpu.build import HERE, build_self_check
from cuda_on_cpu.launches import SOURCES, Shim, declared

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run() -> Run:
    library = ctypes.CDLL(str(build_self_check()))

    def call(name: str, out: np.ndarray | None = None) -> str:
        function = getattr(library, f"run_{name}")
        function.restype = ctypes.c_char_p
        args = [] if out is None else [out.ctypes.data_as(ctypes.c_void_p)]
        return function(*args).decode()

    return call


@pytest.fixture(scope="module")
def loaded() -> Shim:
    return Shim(build_self_check(), (HERE / "self_check.cu",))


@pytest.fixture(params=["forward", "reverse", "random"])
def shim(request: pytest.FixtureRequest, loaded: Shim) -> Iterator[Shim]:
    """The self-check in every order."""
    loaded.set_order(request.param)
    yield loaded
    loaded.set_order("forward")
    loaded.poison_shared(False)


@pytest.mark.usefixtures("shim")
def test_shuffle_exchanges_values_within_each_warp(run: Run) -> None:
    out = np.zeros(128, np.int32)
    assert run("reverse_warps", out) == "no error"
    np.testing.assert_array_equal(out, np.arange(128).reshape(4, 32)[:, ::-1].ravel())


@pytest.mark.usefixtures("shim")
def test_shuffle_of_eight_byte_values(run: Run) -> None:
    out = np.zeros(32)
    assert run("broadcast", out) == "no error"
    np.testing.assert_array_equal(out, 3.5)


@pytest.mark.usefixtures("shim")
def test_ballot(run: Run) -> None:
    out = np.zeros(32, np.uint32)
    assert run("ballot", out) == "no error"
    np.testing.assert_array_equal(out, sum(1 << lane for lane in range(0, 32, 3)))


@pytest.mark.usefixtures("shim")
def test_barrier_separates_writes_from_reads(run: Run) -> None:
    out = np.zeros(3 * 256, np.int32)
    assert run("rotate_block", out) == "no error"
    np.testing.assert_array_equal(out, np.tile((np.arange(256) + 100) % 256 + 4, 3))


@pytest.mark.usefixtures("shim")
def test_every_thread_runs_once(run: Run) -> None:
    count = np.zeros(1, np.int32)
    assert run("count", count) == "no error"
    assert count[0] == 5 * 96
    out = np.zeros(2 * 3 * 4 * 4 * 2 * 3, np.int32)
    assert run("positions", out) == "no error"
    np.testing.assert_array_equal(out, 1)


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("skipped_barrier", "others skipped"),
        ("skipped_shuffle", "others skipped"),
        ("wrong_mask", "other lanes than the warp has"),
    ],
)
def test_divergence_is_reported_and_the_next_launch_works(
    run: Run, kernel: str, message: str
) -> None:
    assert message in run(kernel)
    count = np.zeros(1, np.int32)
    assert run("count", count) == "no error"
    assert count[0] == 5 * 96


def test_other_orders_find_a_missing_barrier(run: Run, loaded: Shim) -> None:
    found = {}
    loaded.poison_shared(True)
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        out = np.full(64, -2, np.int32)
        loaded.set_order(order, seed)
        assert run("unordered", out) == "no error"
        found[order, seed] = out
    loaded.set_order("forward")
    loaded.poison_shared(False)
    right = np.arange(64) - 1
    np.testing.assert_array_equal(found["forward", 0], right)
    for key in list(found)[1:]:
        assert not np.array_equal(found[key], right), key


def test_poison_finds_shared_memory_that_was_not_written(run: Run, loaded: Shim) -> None:
    out = np.zeros(3, np.int32)
    assert loaded.poison_shared(True) == 6
    assert run("unwritten", out) == "no error"
    np.testing.assert_array_equal(out, [7, -1, -1])
    assert loaded.poison_shared(False) == 6
    assert run("unwritten", out) == "no error"
    np.testing.assert_array_equal(out, 7)


@pytest.mark.skipif(
    "-fsanitize" in os.environ.get("MMFUSE_SHIM_FLAGS", ""),
    reason="the sanitizer keeps variables elsewhere",
)
def test_poison_finds_a_variable_that_was_not_written(run: Run, loaded: Shim) -> None:
    """Its number differs between two runs, which is how test_every_kernel.py finds it."""
    for byte in (0xFF, 0x5A):
        out = np.zeros(32, np.int32)
        loaded.poison_shared(True, byte)
        assert run("unwritten_local", out) == "no error"
        np.testing.assert_array_equal(out.view(np.uint8), byte)
    loaded.poison_shared(False)


def test_dynamic_shared_memory_takes_a_permission(run: Run, loaded: Shim) -> None:
    free, most = (48 - 2) * 1024, (99 - 2) * 1024

    def launch(size: int, asked: int = 0) -> str:
        return run("permitted", np.array([size, asked], np.int32))

    assert launch(free) == "no error"
    assert launch(free + 1) == "more dynamic shared memory than was asked for"
    assert launch(free, most + 1) == "more shared memory than a block may have"
    assert launch(free) == "no error"
    assert launch(free + 2, free + 2) == launch(free + 2) == "no error"
    assert launch(free + 3) == "more dynamic shared memory than was asked for"
    assert launch(most, most) == "no error"
    assert launch(free, most - 1) == "a permission that another thread may need is taken back"
    assert launch(most) == "no error"
    loaded.forget_permissions()
    assert launch(free + 1) == "more dynamic shared memory than was asked for"


def test_launches_are_counted_by_kernel(run: Run, loaded: Shim) -> None:
    before = loaded.launches()
    for _ in range(3):
        run("count", np.zeros(1, np.int32))
    run("skipped_barrier")
    assert loaded.launches() - before == {"count_kernel": 3, "skipped_barrier_kernel": 1}


def test_every_kernel_of_the_source_is_in_the_library(loaded: Shim) -> None:
    names = declared((HERE / "self_check.cu",), "__global__")
    assert Counter(loaded.kernels().values()) == names
    assert len(names) == 21


def test_a_kernel_without_a_name_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "odd.cu"
    source.write_text("template <typename T>\n__global__ void good_kernel(T* x) {}\n")
    assert declared((source,), "__global__") == {"good_kernel": 1}
    source.write_text("__global__ void good_kernel(int*) {}\nODD(__global__, bad_kernel)\n")
    with pytest.raises(ValueError, match=r"odd\.cu: 2 __global__"):
        declared((source,), "__global__")


def test_the_qualifiers_of_csrc_are_understood() -> None:
    assert declared(SOURCES, "__global__")["partial_sums_kernel"] == 1
    assert declared(SOURCES, "__shared__")["broken"] == 1


def test_a_source_that_is_removed_is_linked_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "OUTPUT", tmp_path / "out")
    sources = []
    for name in ("kept", "gone_for_good"):
        sources.append(tmp_path / f"{name}.cpp")
        sources[-1].write_text(f'extern "C" int {name}() {{ return 1; }}\n')
    both = build._build("lib.so", sources)
    made = both.stat().st_mtime_ns
    assert ctypes.CDLL(str(both)).gone_for_good() == 1
    assert build._build("lib.so", sources).stat().st_mtime_ns == made

    sources.pop().unlink()
    after = build._build("lib.so", sources)
    # Read as a file: the loader would give the library of before again.
    assert b"kept" in after.read_bytes() and b"gone_for_good" not in after.read_bytes()
    assert build._build("lib.so", sources).stat().st_mtime_ns == after.stat().st_mtime_ns
