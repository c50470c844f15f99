"""`python -m mmfuse` and the package's face."""

from __future__ import annotations

import inspect
import subprocess
import sys

import torch

import mmfuse
from mmfuse.__main__ import report
from mmfuse.ops._registry import BACKENDS, OPS


def test_report_shows_the_whole_grid() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmfuse"], capture_output=True, text=True, check=True
    )
    text = done.stdout
    assert f"mmfuse   {mmfuse.__version__}" in text
    assert torch.__version__ in text
    for op in OPS:
        assert f"\n{op} " in text
    for backend in BACKENDS:
        assert backend in text


def test_every_missing_cell_has_a_reason() -> None:
    text = report()
    for line in text.splitlines():
        name = line.split(" ")[0]
        if name in OPS and "—" in line:
            assert "why a cell is off" in text


def test_build_info() -> None:
    info = mmfuse._native.build_info()
    if info is None:
        assert mmfuse._native.why_missing("cpu")
        return
    assert set(info) >= {
        "compiler",
        "flags",
        "cuda_version",
        "cuda_architectures",
        "simd",
        "simd_built",
        "has_cpu",
        "has_cuda",
    }
    assert info["simd"] in info["simd_built"]


def test_public_names_are_documented() -> None:
    for module in (mmfuse, mmfuse.ops):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                assert inspect.getdoc(thing), name
    for function in (
        mmfuse.ogm_backward,
        mmfuse.ops.grad_stats,
        mmfuse.ops.update_grads_,
        mmfuse.ops.modality_scores,
        mmfuse.ops.scale_grad,
    ):
        text = inspect.getdoc(function)
        for section in ("Args:", "Raises:", "Equivalent to"):
            assert section in text, (function.__name__, section)


def test_signatures_are_the_designs() -> None:
    """The binding names and defaults of design.md, and the ranks to average over."""
    assert str(inspect.signature(mmfuse.ogm_backward)).replace("'", "").split(" ->")[0] == (
        "(loss: Tensor, encoders: Mapping[str, Encoder], "
        "logits: Mapping[str, Tensor] | None = None, labels: Tensor | None = None, *, "
        "alpha: float = 0.8, noise: Noise = True, formula: Formula = tpami, "
        "select: Select = all, shared: Shared | None = None, stream: NoiseStream | None = None, "
        "retain_graph: bool = False, process_group: Group = None, criterion: Loss = None, "
        "backend: str | None = None, **more: Unpack[More])"
    )
