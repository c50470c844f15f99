"""Launches every kernel of a backend at least once, on inputs that are small and odd.

    python tests/kernels/every_kernel.py --device cuda --backend cuda
    python tests/kernels/every_kernel.py --each --backend cuda --backend triton
    python tests/kernels/every_kernel.py --sanitizer --output build/sanitizer

The second line compares each case with the reference on the CPU, in a process of its own, see
case_processes.py; the third runs them under the four tools of NVIDIA's compute-sanitizer, see
sanitizer.py. Sizes go just beyond a chunk, a block or a warp, and never end with one; 47 is one
less than a multiple of every vector's width, and shows a loop that goes one too far. Tensors start
at 16-byte addresses and between them; dtypes are all four, and mixed. test_every_kernel.py proves
that nothing is left out, in the host shim of CUDA and in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

# The checkout, whether or not mmfuse is installed, and what the tests share.
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

import case_processes
import sanitizer
import tolerances

from mmfuse import NoiseStream, _native, ops
from mmfuse.ops._registry import OPS

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)
SEED = 20_26
CONTROLS = ("memcheck", "initcheck", "alignment")


class Inputs:
    """Random tensors on a device; the same ones at every run.

    Args:
        device: Where they are made.
        backend: Which kernels will read them.
    """

    def __init__(self, device: str, backend: str) -> None:
        self.device = device
        self.backend = backend
        self._generator = torch.Generator().manual_seed(SEED)
        #: Triton's interpreter takes milliseconds for what is one instruction elsewhere.
        self.interpreted = backend == "triton" and device == "cpu"

    def placed(self, values: Tensor, offset: int = 0) -> Tensor:
        """The values on the device, `offset` elements behind an address that suits vectors."""
        whole = torch.empty(values.numel() + offset, dtype=values.dtype, device=self.device)
        # All of it: what lies before is read by nobody, but initcheck would see it copied.
        whole[:offset] = 0
        part = whole[offset:]
        part.copy_(values.flatten())
        return part.view(values.shape)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
        """Standard normal deviates."""
        return self.placed(torch.randn(shape, generator=self._generator).to(dtype), offset)

    def lists(
        self, sizes: Sequence[int], count: int, *dtypes: torch.dtype, offset: int = 0
    ) -> list[list[Tensor]]:
        """`count` lists of tensors of these sizes; list k has the k-th dtype."""
        return [
            [self.normal(n, dtype=dtype, offset=offset) for n in sizes]
            for _, dtype in zip(range(count), dtypes, strict=True)
        ]

    def many(self, count: int, size: int = 3) -> list[Tensor]:
        """Many tiny tensors, most of them not aligned, that share one allocation."""
        return list(self.normal(count * size).split(size))

    def sixteenths(self, *shape: int, most: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Multiples of 1/16 from 0 to `most`, both ends in each row: sums of them are exact."""
        values = torch.randint(0, 16 * most + 1, shape, generator=self._generator)
        values[..., 0], values[..., 1] = 0, 16 * most
        return self.placed((values / 16).to(dtype), offset)

    def stream(self, count: int | None = None) -> NoiseStream:
        """A stream of noise, or one whose tensors start within their Philox blocks."""
        stream = NoiseStream(SEED, self.device)
        if count is None:
            return stream
        return stream.place(list(range(7, 7 + count)), [2**32 + 3 + 5 * t for t in range(count)])

    def vector(self, *values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Coefficients."""
        return self.placed(torch.tensor(values, dtype=dtype))


# Each case returns what its ops have written.
Case = Callable[[Inputs], list[Tensor]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def _mirrors(
    inputs: Inputs, sizes: Sequence[int], offset: int
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Gradients of all dtypes with parameters and anchors: of the same dtype, then of others."""
    for shift in (0, 1):
        lists: list[list[Tensor]] = [[], [], []]
        for i, dtype in enumerate(DTYPES):
            other = DTYPES[(i + shift) % len(DTYPES)]
            found = inputs.lists(sizes, 3, dtype, other, dtype, offset=offset)
            for target, tensors in zip(lists, found, strict=True):
                target.extend(tensors)
        yield lists[0], lists[1], lists[2]


@case
def update_grads(inputs: Inputs) -> list[Tensor]:
    """A chunk has 8,192 elements."""
    written = []
    sizes = (37,) if inputs.interpreted else (1, 37, 47, 1027, 0, 2 * 8192 + 37)
    for offset in (0, 1):
        for grads, params, anchors in _mirrors(inputs, sizes, offset):
            count = len(grads)
            # A scale below 1, so that no float16 overflows in the course of the updates.
            factors = [inputs.normal(count).tanh(), inputs.normal(count), inputs.normal(count)]
            for beside in ((), (params,), (params, anchors)):
                for with_noise in (False, True):
                    flag = torch.ones((), dtype=torch.bool, device=inputs.device)
                    ops.update_grads_(
                        grads,
                        factors[0],
                        **_pulled(factors[1], *beside),
                        noise_std=factors[2].abs() if with_noise else None,
                        stream=inputs.stream(count if offset else None) if with_noise else None,
                        finite=flag,
                    )
                    written.append(flag)
                    written.append(_sq_norms(grads, factors, *beside))
            written += grads
    unchanged = [inputs.normal(n) for n in (5, 1027)]
    flag = torch.ones((), dtype=torch.bool, device=inputs.device)
    ops.update_grads_(unchanged, inputs.vector(1.0, 1.0), finite=flag)
    written.append(torch.empty(2, device=inputs.device))
    ops.update_grads_(unchanged, inputs.vector(1.0, 1.0), sq_norm=written[-1])
    # More than one table of parameters holds: about 1,360, or 510 with anchors and noise.
    many = inputs.many(40 if inputs.interpreted else 1400)
    factors = inputs.normal(len(many))
    ops.update_grads_(many, factors)
    ops.update_grads_(
        many,
        factors,
        params=inputs.many(len(many)),
        anchors=inputs.many(len(many)),
        pull=factors,
        noise_std=factors.abs(),
        stream=inputs.stream(),
    )
    # More than a table of the sums' kernel holds, which is 2,000.
    many += inputs.many(0 if inputs.interpreted else 700)
    squares = torch.empty(len(many), dtype=torch.float64, device=inputs.device)
    ones = torch.ones(len(many), device=inputs.device)
    ops.update_grads_(many, ones, noise_std=ones, stream=inputs.stream(), sq_norm=squares)
    return [*written, squares, *unchanged, *many]


def _pulled(pull: Tensor, *beside: list[Tensor]) -> dict[str, Any]:
    """Arguments for no params, for params alone, and for params and anchors."""
    return (
        {"pull": pull, **dict(zip(("params", "anchors"), beside, strict=False))} if beside else {}
    )


def _sq_norms(grads: list[Tensor], factors: Sequence[Tensor], *beside: list[Tensor]) -> Tensor:
    """Updates the gradients once more, with their sums of squares."""
    squares = torch.empty(len(grads), dtype=torch.float64, device=grads[0].device)
    ops.update_grads_(
        grads,
        factors[0],
        **_pulled(factors[1], *beside),
        sq_norm=squares,
    )
    return squares


@case
def grad_stats(inputs: Inputs) -> list[Tensor]:
    """A chunk has 16,384 elements."""
    found = []
    sizes = (37,) if inputs.interpreted else (1, 37, 47, 1027, 0, 32768 + 37)
    for offset in (0, 1):
        for grads, params, anchors in _mirrors(inputs, sizes, offset):
            for beside in ((), (params,), (params, anchors)):
                found.append(ops.grad_stats(grads, *beside))
    # More than a table of the second kernel holds, which is 2,000.
    found.append(ops.grad_stats(inputs.many(40 if inputs.interpreted else 2001)))
    found.append(ops.grad_stats([inputs.normal(7)]))
    return [t for stats in found for t in stats if t is not None]


@case
def scale_grad(inputs: Inputs) -> list[Tensor]:
    written = []
    numel = 1027 if inputs.interpreted else 16384 + 47
    for dtype in DTYPES:
        for offset in (0, 1):
            for with_noise in (False, True):
                x = inputs.normal(numel, dtype=dtype, offset=offset).requires_grad_()
                y = ops.scale_grad(
                    x,
                    inputs.vector(0.7)[0],
                    noise_std=inputs.vector(0.3)[0] if with_noise else None,
                    stream=inputs.stream(1 if offset else None) if with_noise else None,
                )
                grad = inputs.normal(numel, dtype=dtype, offset=offset)
                written += torch.autograd.grad(y, x, grad)
    return written


@case
def noisy_views(inputs: Inputs) -> list[Tensor]:
    """A chunk has 4,096 elements."""
    written: list[Tensor] = []
    numel = 37 if inputs.interpreted else 2 * 4096 + 47
    for dtype in DTYPES:
        for offset, count in ((0, None), (1, None), (0, 2), (1, 2)):
            x = inputs.normal(numel, dtype=dtype, offset=offset)
            written += ops.noisy_views(x, 0.5, inputs.stream(count))
    return [*written, *ops.noisy_views(inputs.normal(5), 0.0, inputs.stream())]


@case
def drop_modalities(inputs: Inputs) -> list[Tensor]:
    """A chunk has 4,096 elements, or rows without elements."""
    written: list[Tensor] = []
    widths = (40, 33) if inputs.interpreted else (40, 33, 47, 1, 0, 4096 + 24, 5003)
    few = [
        inputs.normal(19, width, dtype=dtype, offset=offset).requires_grad_()
        for dtype in DTYPES
        for offset in (0, 1)
        for width in widths
    ]
    # A table of parameters holds about 680.
    many = [t.view(3, 1).requires_grad_() for t in inputs.many(20 if inputs.interpreted else 700)]
    for features, scale in ((few, inputs.vector(1.5)[0]), (few, None), (many, None)):
        q = torch.full((len(features),), 0.4, device=inputs.device)
        stream = inputs.stream(len(features) if scale is None else None)
        dropped, keep = ops.drop_modalities(features, q, stream, scale=scale)
        back = [torch.ones_like(d) for d in dropped]
        written += [*dropped, keep, *torch.autograd.grad(dropped, features, back)]
    return written


def _scores(inputs: Inputs, logits: Sequence[Tensor], rows: int) -> list[Tensor]:
    leaves = [z.requires_grad_() for z in logits]
    labels = torch.arange(rows, device=inputs.device) % 3
    labels[1] = -100
    scores = ops.modality_scores(leaves, labels)
    return [*scores, *torch.autograd.grad(scores.prob.sum() + scores.log_prob.sum(), leaves)]


@case
def modality_scores(inputs: Inputs) -> list[Tensor]:
    """A CUDA block has 128 rows, a launch 16 modalities; Triton splits from 9 tiles on."""
    rows, many, tall = (5, 2, 37) if inputs.interpreted else (37, 17, 137)
    mixed = [
        inputs.normal(rows, classes, dtype=dtype, offset=offset)
        for dtype in DTYPES
        for offset, classes in ((0, 3), (1, 33), (0, 47), (0, 309))
    ]
    narrow = [inputs.normal(rows, 5, offset=1) for _ in range(many)]
    written = [*_scores(inputs, mixed, rows), *_scores(inputs, narrow, rows)]
    for dtypes in ((torch.float32, torch.float16), (torch.float64,)):
        wide = [inputs.normal(tall, 600, dtype=dtype) for dtype in dtypes]
        written += _scores(inputs, wide, tall)
    return written


@case
def discrepancy_ratios(inputs: Inputs) -> list[Tensor]:
    return [ops.discrepancy_ratios((inputs.normal(37).abs() + 0.1).to(dtype)) for dtype in WIDE]


@case
def modulation_factors(inputs: Inputs) -> list[Tensor]:
    """A block has 128 modalities or tensors."""
    written: list[Tensor] = []
    owner = [0, 36] * (2 if inputs.interpreted else 67)
    for dtype in WIDE:
        scores = (inputs.normal(37).abs() + 0.1).to(dtype)
        stats = ops.grad_stats([inputs.normal(5, dtype=dtype)] * len(owner))
        for formula, given in (("tpami", stats), ("cvpr", stats), ("tpami", None), ("cvpr", None)):
            found = ops.modulation_factors(scores, 0.5, formula, owner=owner, stats=given)
            written += [x for x in found if x is not None]
    return written


@case
def paired_cosine(inputs: Inputs) -> list[Tensor]:
    """A row belongs to a warp, or from 1,025 columns on to a block."""
    written: list[Tensor] = []
    for dtype in DTYPES:
        for columns, offset in ((40, 0), (33, 0), (47, 0), (40, 1), (1064, 0), (1061, 1), (1, 0)):
            rows = 3 if columns > 1000 or inputs.interpreted else 37
            a, b = (
                inputs.normal(rows, columns, dtype=dtype, offset=offset).requires_grad_()
                for _ in "ab"
            )
            cosine = ops.paired_cosine(a, b)
            written += [cosine, *torch.autograd.grad(cosine, (a, b))]
    return written


@case
def co_information_gate(inputs: Inputs) -> list[Tensor]:
    """66 pairs; a launch has 64."""
    written = []
    for dtype in DTYPES:
        for modalities in (2, 3 if inputs.interpreted else 12):
            features = [inputs.normal(37, 40, dtype=dtype) for _ in range(modalities)]
            written.append(ops.co_information_gate(features, -0.9))
    return written


@case
def redundancy_ratio(inputs: Inputs) -> list[Tensor]:
    """A block has 2,048 elements."""
    written: list[Tensor] = []
    input_sq = inputs.vector(0.5)[0]
    for dtype in DTYPES:
        for offset in (0, 1):
            z1, z2 = (
                inputs.normal(2 * 2048 + 47, dtype=dtype, offset=offset).requires_grad_()
                for _ in "12"
            )
            ratio = ops.redundancy_ratio(z1, z2, input_sq)
            written += [ratio, *torch.autograd.grad(ratio, (z1, z2))]
    return written


@case
def info_nce(inputs: Inputs) -> list[Tensor]:
    """A tile has at most 2,048 columns and 2^20 elements; a block of slopes 1,024 columns."""
    written: list[Tensor] = []
    shapes = [(dtype, batch, 5) for dtype in DTYPES for batch in (36, 47, 1)]
    if not inputs.interpreted:
        shapes += [(torch.float32, 2051, 3), (torch.float64, 1032, 3)]
    for dtype, batch, width in shapes:
        a, b = (inputs.normal(batch, width, dtype=dtype).requires_grad_() for _ in "ab")
        temperature = inputs.vector(0.9).to(torch.promote_types(dtype, torch.float32))
        leaf = temperature[0].detach().requires_grad_()
        bound = ops.info_nce(a, b, leaf)
        written += [bound, *torch.autograd.grad(bound, (a, b, leaf))]
    return written


@case
def joint_entropies(inputs: Inputs) -> list[Tensor]:
    """Up to 8,192 columns a block has a whole problem; ranges are found in parts of 16,384."""
    shapes = [(3, 309, 0), (3, 320, 0), (3, 320, 1), (1, 47, 0)]
    shapes += [(2, 1033, 0)] if inputs.interpreted else [(2, 8209, 0), (1, 16384 + 43, 0)]
    written: list[Tensor] = []
    for dtype in DTYPES:
        for problems, columns, offset in shapes:
            data = [inputs.normal(problems, columns, dtype=dtype, offset=offset) for _ in range(3)]
            written += ops.joint_entropies(data, [(0, 1), (2, 0), (1, 1)], 5)
            written += ops.joint_entropies(data, [(0, 1, 2), (2, 2, 0)], 4)
            if not inputs.interpreted:  # so few counts that a block has several copies of them
                written += ops.joint_entropies(data, [(2, 1)], 2)
    short = [inputs.normal(3, 309) for _ in range(9)]
    # All pairs of 9 variables take two launches, because a block knows 8 variables.
    every_pair = [(i, j) for i in range(9) for j in range(i)]
    written += ops.joint_entropies(short, every_pair, 6)
    if inputs.interpreted:
        return written
    # More than 48 KiB of shared memory; more than a block can have; more than 64 rows of data.
    written += ops.joint_entropies(short, [(0, 1, 2), (3, 4, 5)], 24)
    long = [inputs.normal(2, 8209) for _ in range(3)]
    written += ops.joint_entropies(long, [(0, 1)], 120)
    written += ops.joint_entropies(long, [(0, 1)], 256)
    written += ops.joint_entropies(long, [(0, 1, 2)], 32)
    written += ops.joint_entropies([*long] * 22, [(0, 65), (64, 1)], 7)
    return written


@case
def soft_histogram(inputs: Inputs) -> list[Tensor]:
    """The public op widens half precision; the overload under it takes it as it is."""
    forward = OPS["soft_histogram"].overloads[inputs.backend]
    backward = OPS["soft_histogram_backward"].overloads[inputs.backend]
    shapes = [(3, 319, 0), (3, 320, 0), (3, 320, 1)]
    # Beyond 4,096 columns several blocks share a problem.
    shapes += [] if inputs.interpreted else [(2, 4096 + 37, 0), (2, 4096 + 40, 0)]
    written: list[Tensor] = []
    for dtype in DTYPES:
        wide = torch.promote_types(dtype, torch.float32)
        for problems, columns, offset in shapes:
            x, y = (
                inputs.sixteenths(problems, columns, most=4, dtype=dtype, offset=offset)
                for _ in "xy"
            )
            ends = inputs.vector(*[0.0, 4.0] * problems, dtype=wide).view(problems, 2)
            weights = forward(x, y, ends, ends, 5)
            grad = inputs.normal(problems, 5, 5, dtype=wide)
            written += [weights, *backward(grad, x, y, ends, ends, 5)]
    # One table of 50 KiB; one that no block can have; slopes that are not kept in shared memory.
    for bins, columns in () if inputs.interpreted else ((80, 309), (256, 309), (256, 4133)):
        for dtype in WIDE:
            x, y = (
                inputs.sixteenths(2, columns, most=bins - 1, dtype=dtype).requires_grad_()
                for _ in "xy"
            )
            weights = ops.soft_histogram(x, y, bins)
            written += [weights, *torch.autograd.grad(weights.square().sum(), (x, y))]
    return written


def run(
    device: str, backend: str, names: Sequence[str] = (), *, interpreted: bool | None = None
) -> dict[str, list[Tensor]]:
    """Runs the cases, or those of these names, and waits for them.

    Args:
        device: Where the tensors are.
        backend: Whose kernels run.
        names: Of cases; none are all.
        interpreted: Whether the inputs are those of Triton's interpreter.

    Returns:
        What each case has written.
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


def compared(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[str]:
    """A line for each output that differs."""
    if len(found) != len(expected):
        return [f"{len(found)} outputs instead of {len(expected)}"]
    return [
        f"output {i}: {why}"
        for i, (x, y) in enumerate(zip(found, expected, strict=True))
        if (why := difference(x, y)) is not None
    ]


def difference(found: Tensor, expected: Tensor) -> str | None:
    """How an output differs by more than `tolerances.whole_case` allows, or None."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        what = f"{found.dtype} {list(found.shape)}"
        return f"is {what} instead of {expected.dtype} {list(expected.shape)}"
    if not found.is_floating_point():
        wrong = int((found != expected).sum())
        return f"{wrong} of {found.numel()} differ" if wrong else None
    error = (found.double() - expected.double()).abs()
    share = error / tolerances.whole_case(expected)
    # A NaN is no smaller than anything.
    wrong = int((~(share <= 1)).sum())
    if not wrong:
        return None
    where = int(share.nan_to_num(torch.inf).argmax())
    x, y = found.flatten()[where].item(), expected.flatten()[where].item()
    return f"{wrong} of {found.numel()} differ; [{where}] is {x:.8g} instead of {y:.8g}"


def not_written(tensors: Sequence[Tensor]) -> list[int]:
    """Positions of tensors that hold a NaN, an infinity or the largest integer of their dtype.

    No case has such a result, and `poison` fills new memory with these.
    """
    found = []
    for i, tensor in enumerate(tensors):
        if tensor.is_floating_point():
            good = tensor.isfinite()
        elif tensor.dtype == torch.bool:
            # As bytes: reading another bit pattern as a bool means nothing.
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

    # Also where a real CUDA library is loaded: it has no kernels for tensors of the CPU.
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
