"""Launches every kernel of a backend at least once, on inputs that are small and odd.

    python tests/kernels/every_kernel.py --device cuda --backend cuda
    python tests/kernels/every_kernel.py --each --backend cuda --backend triton
    python tests/kernels/every_kernel.py --sanitizer --output build/sanitizer

The second line compares each case with the reference on the CPU, in a process of its own, see
case_processes.py; the third runs them under the four tools of NVIDIA's compute-sanitizer, see
sanitizer.py. Sizes go just beyond a chunk, a block or a warp, and never end with one; 47 is one
less than a multiple of every vector's width, and shows a loop that goes one too far. Tensors start
at 16-byte addresses and between them; dtypes are all four, and mixed. Each op's case is in its file
of tests/support/samples; test_every_kernel.py proves that nothing is left out, in the host shim of
CUDA and in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

# The checkout, whether or not mmfuse is installed, and what the tests share.
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

import case_processes
import sanitizer
from comparing import compared
from samples import CASES, Inputs

from mmfuse import _native, ops
from mmfuse.ops._registry import OPS

CONTROLS = ("memcheck", "initcheck", "alignment")


def run(
    device: str, backend: str, names: Sequence[str] = (), *, interpreted: bool | None = None
) -> dict[str, list[Tensor]]:
    """Runs the cases, or those of these names, and waits for them.

    Args:
        device: The tensors' device.
        backend: Whose kernels run.
        names: Of cases; none are all.
        interpreted: True if the inputs are those of Triton's interpreter.

    Returns:
        The tensors that each case has written.
    """
    written = {}
    with ops.use_backend(backend):
        for name in names or CASES:
            inputs = Inputs(device, backend)
            if interpreted is not None:
                inputs.interpreted = interpreted
            written[name] = [t.detach() for t in CASES[name](inputs)]
    if device == "cuda":
        torch.cuda.synchronize()
    return written


def differences(device: str, backend: str, name: str) -> list[str]:
    """Runs a case, and again with the reference on the CPU: a line for each output that differs."""
    interpreted = Inputs(device, backend).interpreted
    found = [t.cpu() for t in run(device, backend, [name])[name]]
    return compared(found, run("cpu", "reference", [name], interpreted=interpreted)[name])


def not_written(tensors: Sequence[Tensor]) -> list[int]:
    """Positions of tensors that hold a NaN, an infinity or the largest integer of their dtype.

    No case has such a result, and `poison` fills new memory with these.
    """
    found = []
    for i, tensor in enumerate(tensors):
        if tensor.is_floating_point():
            good = tensor.isfinite()
        elif tensor.dtype == torch.bool:
            # Compared as bytes: reading another bit pattern as a bool means nothing.
            good = tensor.view(torch.uint8) <= 1
        else:
            good = tensor != torch.iinfo(tensor.dtype).max
        if not good.all():
            found.append(i)
    return found


def poison(on: bool = True) -> None:
    """Fills every torch.empty from here on, also those of the C++ kernels, with NaN and the like.

    Not for initcheck, which looks for reads of memory that nobody has written.
    """
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = True


def control(tool: str, backend: str, device: str = "cuda") -> None:
    """Lets a kernel do what a tool must report, if it looks at mmfuse's kernels at all.

    For initcheck it reads memory that nobody has written; for memcheck the tensor has lost most of
    its memory, or on the CPU, where each byte counts, its last element. For alignment, on the CPU,
    the tensor starts where no float may.
    """
    grad = torch.empty(4096, device=device)
    if tool == "memcheck":
        grad.zero_()
        grad.untyped_storage().resize_(1024 if device == "cuda" else 4 * 4095)
    if tool == "alignment":
        scores = torch.frombuffer(bytearray(4 * 2 + 1), dtype=torch.float32, offset=1)
        ops.discrepancy_ratios(scores, backend=backend)
    ops.grad_stats([grad], backend=backend)
    if device == "cuda":
        torch.cuda.synchronize()


def load_shim() -> None:
    """Compiles the CUDA kernels for the CPU, where there is no GPU."""
    from cuda_on_cpu.build import build_kernels

    # It is loaded beside a real CUDA library, too, which has no kernels for tensors of the CPU.
    if OPS["grad_stats"].why_missing("cuda", "cpu") is not None:
        _native.load_library(build_kernels(), "cuda")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", action="append", default=[], choices=("cuda", "triton", "cpu"))
    parser.add_argument("--case", action="append", default=[], choices=list(CASES))
    parser.add_argument("--poison", action="store_true", help="check that all outputs are written")
    parser.add_argument("--compare", action="store_true", help="with the reference, on the CPU")
    parser.add_argument("--control", choices=CONTROLS, help="provoke an error")
    several = parser.add_argument_group("several processes")
    several.add_argument("--each", action="store_true", help="compare each case in its own")
    several.add_argument("--sanitizer", action="store_true", help="run under compute-sanitizer")
    several.add_argument("--again", type=Path, metavar="FILE", help="what failed.json names")
    several.add_argument("--workers", type=int, default=case_processes.default_workers())
    several.add_argument("--seconds", type=float, default=3600.0, help="for all together")
    several.add_argument("--limit", type=float, default=600.0, help="seconds for each")
    several.add_argument("--output", type=Path, default=Path("build/kernels"), help="for the logs")
    options = parser.parse_args(arguments)
    options.backend = options.backend or ["cuda"]
    if len(options.backend) > 1 and not options.each:
        parser.error("several backends go with --each only")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = parse(arguments)
    limits = {
        "workers": options.workers,
        "seconds": options.seconds,
        "limit_s": options.limit,
        "again": options.again,
    }
    cases, backend = options.case or list(CASES), options.backend[0]
    if options.sanitizer:
        return sanitizer.main(options.output, backend, cases, **limits)
    if options.each:
        device, backends = options.device, options.backend
        return case_processes.main(device, backends, cases, options.output, **limits)
    if options.device == "cpu" and backend == "cuda":
        load_shim()
    if options.control:
        control(options.control, backend, options.device)
        return 0
    if options.poison:
        poison()
    if options.compare:
        lines = [
            f"{name}: {line}"
            for name in cases
            for line in differences(options.device, backend, name)
        ]
        print("\n".join(lines) or f"every_kernel: {', '.join(cases)}: as the reference")
        return 1 if lines else 0
    start = time.perf_counter()
    written = run(options.device, backend, cases)
    seconds = time.perf_counter() - start
    bad = {name: found for name, tensors in written.items() if (found := not_written(tensors))}
    for name, found in bad.items():
        print(f"{name}: outputs {found} are not finite, or were not written")
    tensors = sum(map(len, written.values()))
    print(f"every_kernel: {len(written)} ops, {tensors} tensors, {seconds:.1f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
