"""The ops' samples launch what .ci/compile_triton.py compiles, and they leave no kernel out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton")


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program with Triton's compiler, which the tests have replaced by its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / ".ci")
    command = [sys.executable, "-c", f"import compile_triton as c\n{program}", *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_it_compiles_for_each_gpu() -> None:
    done = run("exit(c.main())", "_discrepancy_ratios_kernel")
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "6 passed, 0 failed"
    for dtype in ("fp32", "fp64"):
        for target in ("sm_80", "sm_90", "sm_100"):
            title = f"_discrepancy_ratios_kernel [*{dtype} *{dtype} i32 BLOCK_SIZE=64] {target}: "
            assert any(line.startswith(title) for line in lines)


@pytest.mark.slow
def test_a_kernel_that_no_samples_launch_is_named() -> None:
    program = "import samples; del samples.MODULES['discrepancy_ratios']; exit(c.main())"
    done = run(program, "no kernel of this name")
    assert done.returncode == 1
    missing = "FAILED _discrepancy_ratios_kernel: no op's samples launch it"
    assert done.stdout.splitlines() == [missing, "0 passed, 1 failed"]


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_named() -> None:
    program = """
import samples
from mmfuse.triton import discrepancy_ratios as module
samples.MODULES = {"discrepancy_ratios": samples.MODULES["discrepancy_ratios"]}
module.BLOCK_SIZE = 63  # tl.arange takes powers of two only
exit(c.main())
"""
    done = run(program, "BLOCK_SIZE=63")
    assert done.returncode == 1
    assert "FAILED _discrepancy_ratios_kernel [*fp32 *fp32 i32 BLOCK_SIZE=63] sm_80" in done.stdout


@pytest.mark.slow
def test_alignment_is_told_as_it_is() -> None:
    program = """
for v in c.variants():
    if "z1_ptr" in v.signature and "16" in v.signature["z1_ptr"]:
        print(v.signature["z1_ptr"], [place for place, known in v.attributes.items() if known])
"""
    assert run(program).stdout.splitlines() == ["*bf16 [(0,), (1,)]", "*fp16 []"]


@pytest.mark.slow
def test_new_sizes_are_not_compiled_anew() -> None:
    """The batches are those of an epoch, whose last is smaller, of one kind of network."""
    program = """
import torch
from mmfuse import NoiseStream, ops
from triton_variants import noted
found = {}
with noted("drop_modalities", found):
    for step, rows in enumerate((64, 16, 1, 7, 2048, 33)):
        stream = NoiseStream(3).place([step, 1], [16 * step, 2**40 * step])
        x = [torch.randn(rows, width).requires_grad_() for width in (512, 309)]
        dropped = ops.drop_modalities(x, torch.full((2,), 0.4), stream).features
        torch.autograd.grad(dropped, x, [torch.ones_like(t) for t in x])
print([v.signature["units"] for v in found.values()])
"""
    done = run(program)
    # Forward and backward pass; an offset of more than 32 bits is of another type.
    assert done.stdout.splitlines() == [str([("i32", "i32")] * 3)], done.stderr


@pytest.mark.slow
def test_kernels_that_compare_fuse_no_product() -> None:
    """Nobody is ahead of an equal by the bits that rounding took from one of two products."""
    program = """
import re, samples, triton
names = "information_pull", "redundancy_pull"
samples.MODULES = {name: samples.MODULES[name] for name in names}
found = set()
for v in c.variants():
    target = c.GPUTarget("cuda", 90, 32)
    ptx = triton.compile(v.source(), target=target, options=dict(v.options)).asm["ptx"]
    # The assembler may fuse an instruction that is not said to be rounded.
    found.add((v.op, len(re.findall("(?:add|mul|sub)[.]f", ptx)), ptx.count("fma.rn.f64")))
print(sorted(found))
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    # The exponentials' own, with counts and multipliers as without them.
    assert done.stdout.splitlines() == ["[('information_pull', 0, 28), ('redundancy_pull', 0, 28)]"]


@pytest.mark.slow
def test_quotients_that_methods_compare_with_1_are_the_nearest() -> None:
    program = """
import samples, triton
samples.MODULES = {"discrepancy_ratios": samples.MODULES["discrepancy_ratios"]}
for v in c.variants():
    target = c.GPUTarget("cuda", 90, 32)
    ptx = triton.compile(v.source(), target=target, options=dict(v.options)).asm["ptx"]
    print(v.signature["scores_ptr"], "div.rn.f" in ptx, "div.full" in ptx)
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["*fp32 True False", "*fp64 True False"]


@pytest.mark.slow
def test_a_size_or_a_stride_of_1_is_compiled_too() -> None:
    """Triton makes it a constant of a kernel of its own, unless it is told not to."""
    program = """
never = {}
for v in c.variants():
    for place, argument in enumerate(v.kernel.params):
        kinds = v.signature[argument.name]
        told = argument.do_not_specialize and not isinstance(kinds, tuple)
        if argument.is_constexpr or argument.annotation_type or told:
            continue
        places = [(place,)]
        if isinstance(kinds, tuple):
            places = [(place, k) for k in range(len(kinds))]
        values = [v.constants.get(p) for p in places]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not {"i32", "i64"}.isdisjoint(kinds) or int in map(type, values):
            key = v.kernel.__name__, argument.name
            never[key] = never.get(key, True) and 1 not in values
print(*sorted(".".join(key) for key, is_so in never.items() if is_so), sep="\\n")
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    of_scores = ("modality_accuracies", "modality_scores", "modality_scores_backward")
    of_scores += ("sample_scores", "sample_statistics")
    two_classes = ("logit_divergence", "logit_divergence_backward", of_scores[0], of_scores[4])
    expected = [
        # Odd numbers above 1 stand for them.
        *(f"_drop_modalities_kernel.{name}" for name in ("offsets", "stream_ids", "units")),
        # At least 2, but with labels that are each a yes or a no.
        *(f"_{name}_kernel.class_counts" for name in two_classes),
        # Without a further dimension 0, else a whole sample's.
        *(f"_{name}_kernel.outer_strides" for name in of_scores),
        "_modality_scores_backward_kernel.grad_outer_strides",
    ]
    assert done.stdout.split() == sorted(expected)
