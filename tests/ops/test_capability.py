"""The compute capability of a GPU decides whether the CUDA kernels run on it."""

from __future__ import annotations

import warnings

import pytest
import torch

from mmfuse import _native, ops
from mmfuse.__main__ import report
from mmfuse.ops import _registry
from mmfuse.ops._registry import OPS

REASON = (
    "the cuda backend was built for 8.0;9.0;10.0+PTX, which does not include this GPU's compute "
    "capability 7.0 (set TORCH_CUDA_ARCH_LIST and build again)"
)


@pytest.mark.parametrize(
    ("built", "runs", "does_not_run"),
    [
        # A binary runs on the same major version from its minor version on, PTX from there on.
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("8.0+PTX", [(8, 0), (8, 6), (9, 0), (12, 1)], [(7, 5)]),
        ("8.6;10.0+PTX", [(8, 6), (10, 0), (10, 3), (12, 0)], [(8, 0), (9, 0)]),
        ("9.0a", [(9, 0)], [(9, 1), (10, 0), (8, 0)]),
        ("9.0a+PTX", [(9, 0)], [(9, 1), (10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_what_runs_where(
    built: str,
    runs: list[tuple[int, int]],
    does_not_run: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(_native._loaded, "cuda", {"cuda_architectures": built})
    assert {c: _native.why_not_on(c) for c in runs} == dict.fromkeys(runs)
    for capability in does_not_run:
        number = f"{capability[0]}.{capability[1]}"
        assert f"built for {built}, which" in str(_native.why_not_on(capability))
        assert f"compute capability {number} (set" in str(_native.why_not_on(capability))


def test_a_library_that_says_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host shim says nothing, nor does a library that was built by hand."""
    monkeypatch.setitem(_native._loaded, "cuda", {})
    assert _native.why_not_on((3, 5)) is None


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """An old GPU and a new one, as far as the choice of a backend looks; the old one is current."""
    capability = {0: (7, 0), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capability))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU number {i}")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setitem(_native._loaded, "cuda", {"cuda_architectures": "8.0;9.0;10.0+PTX"})
    monkeypatch.setattr(_registry, "_warned", set())
    for op in OPS.values():
        monkeypatch.setattr(op, "_chosen", {})
    return capability


def test_the_default_is_triton_where_the_kernels_do_not_run(two_gpus: dict) -> None:
    op = OPS["grad_stats"]
    with pytest.warns(RuntimeWarning, match=r"'triton' backend because 'cuda' is not .* 7\.0") as w:
        assert op.resolve(None, torch.device("cuda:0")) == "triton"
    assert len(w) == 1
    assert REASON in str(w[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Each GPU has a choice of its own, whichever was asked about first.
        assert op.resolve(None, torch.device("cuda:1")) == "cuda"
        assert op.resolve(None, torch.device("cuda:0")) == "triton"
        assert OPS["update_grads_"].resolve(None, torch.device("cuda:0")) == "triton"


def test_naming_cuda_says_why_it_does_not_run(two_gpus: dict) -> None:
    for device in ("cuda:0", "cuda"):
        with pytest.raises(RuntimeError) as raised:
            ops.active_backend("grad_stats", device, "cuda")
        assert str(raised.value) == f"backend 'cuda' is not available for grad_stats: {REASON}"
    assert ops.active_backend("grad_stats", "cuda:1", "cuda") == "cuda"
    assert ops.active_backend("grad_stats", "cuda:1") == "cuda"


def test_cuda_without_a_number_is_the_current_gpu(
    two_gpus: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = OPS["grad_stats"]
    assert op.why_missing("cuda", "cuda") == REASON
    with pytest.warns(RuntimeWarning, match="'cuda' is not available"):
        assert ops.active_backend("grad_stats", "cuda") == "triton"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert op.why_missing("cuda", "cuda") is None
    assert ops.active_backend("grad_stats", "cuda") == "cuda"


def test_the_report_names_the_gpu(two_gpus: dict) -> None:
    lines = report().splitlines()
    first = lines.index("cuda:0   GPU number 0 (sm_70)")
    assert lines[first + 1].strip() == REASON
    assert lines[first + 2] == "cuda:1   GPU number 1 (sm_90)"
    assert lines[first + 3] == ""
    # One of them runs the kernels, so the column is on; with no such GPU it is off.
    assert f"  cuda: {REASON}" not in lines
    two_gpus[1] = (7, 0)
    assert f"  cuda: {REASON}" in report().splitlines()
