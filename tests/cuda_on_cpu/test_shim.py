"""The shim itself: warp operations, barriers, atomics, and what it reports as an error."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from cuda_on_cpu.build import build_self_check

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


def test_shuffle_exchanges_values_within_each_warp(run: Run) -> None:
    out = np.zeros(128, np.int32)
    assert run("reverse_warps", out) == "no error"
    np.testing.assert_array_equal(out, np.arange(128).reshape(4, 32)[:, ::-1].ravel())


def test_shuffle_of_eight_byte_values(run: Run) -> None:
    out = np.zeros(32)
    assert run("broadcast", out) == "no error"
    np.testing.assert_array_equal(out, 3.5)


def test_ballot(run: Run) -> None:
    out = np.zeros(32, np.uint32)
    assert run("ballot", out) == "no error"
    np.testing.assert_array_equal(out, sum(1 << lane for lane in range(0, 32, 3)))


def test_barrier_separates_writes_from_reads(run: Run) -> None:
    out = np.zeros(256, np.int32)
    assert run("rotate_block", out) == "no error"
    np.testing.assert_array_equal(out, (np.arange(256) + 100) % 256 + 4)


def test_every_thread_runs_once(run: Run) -> None:
    count = np.zeros(1, np.int32)
    assert run("count", count) == "no error"
    assert count[0] == 5 * 96
    out = np.zeros(2 * 3 * 4 * 4 * 2 * 3, np.int32)
    assert run("positions", out) == "no error"
    np.testing.assert_array_equal(out, 1)


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
