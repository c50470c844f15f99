"""The first stage of `make gpu`: libraries that load, and how fast this machine copies.

Takes the libraries that `make gpu-library` has built elsewhere, if they load here; builds what does
not. A CUDA library that cannot be built is not the end: Triton and the reference go on without.
`backends.json` in the folder says which backends run, with the reason where one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from processes import importing_checkout

ROOT = Path(__file__).resolve().parent.parent
BROUGHT = ROOT / "build" / "gpu_library"
NATIVE = ("cpu", "cuda")
# A process of its own, because a library that has failed to load is not tried again in the same.
ASK = (
    "import json; from mmfuse import _native;"
    f"print(json.dumps({{b: _native.why_missing(b) for b in {NATIVE!r}}}))"
)
# 2 GiB read and written, the best of ten: what all shares of "copy" are about.
COPY = """
import torch
source = torch.randn(2**29, device="cuda")
target = torch.empty_like(source)
start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
times = []
for _ in range(12):
    start.record(); target.copy_(source); end.record(); end.synchronize()
    times.append(start.elapsed_time(end))
print(f"copy: {2 * source.nbytes / min(times) / 1e6:.0f} GB/s")
"""


def library(backend: str, folder: Path = ROOT / "mmfuse") -> Path:
    """The path of a backend's library."""
    return folder / f"libmmfuse_{backend}.so"


def python(*words: str, **environment: str) -> tuple[int, str]:
    """Runs Python with this interpreter, and shows what it prints."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **importing_checkout(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, end="", flush=True)
    return done.returncode, done.stdout


def missing() -> dict[str, str | None]:
    """Each native backend's reason why it does not run here, or None."""
    code, output = python("-c", ASK)
    if code != 0:
        return dict.fromkeys(NATIVE, output.strip().splitlines()[-1])
    return json.loads(output.splitlines()[-1])


def bring() -> None:
    """Copies what was built elsewhere to where the package looks."""
    for backend in NATIVE:
        source = library(backend, BROUGHT)
        if source.is_file() and not library(backend).exists():
            print(f"brought: {source.name}")
            shutil.copyfile(source, library(backend))


def build(capability: str) -> None:
    """Builds for this GPU alone; without CUDA if that fails."""
    architectures = {"TORCH_CUDA_ARCH_LIST": capability} if capability else {}
    command = ("setup.py", "build_ext", "--inplace")
    code, _ = python(*command, MMFUSE_CUDA="1" if capability else "0", **architectures)
    if code != 0 and capability:
        python(*command, MMFUSE_CUDA="0")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all native backends run, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--capability", default="", help="of the GPU; none: only the CPU's")
    options = parser.parse_args(argv)
    wanted = NATIVE if options.capability else ("cpu",)
    bring()
    reasons = missing()
    if any(reasons[backend] for backend in wanted):
        for backend in wanted:
            if reasons[backend]:
                print(f"{backend}: {reasons[backend]}; building it here")
                library(backend).unlink(missing_ok=True)
        build(options.capability)
        reasons = missing()
    (options.output / "backends.json").write_text(json.dumps(reasons, indent=2) + "\n")
    python("-m", "mmfuse")
    copy = python("-c", COPY)[1].strip() if options.capability else ""
    bad = [f"without {b}: {reasons[b]}" for b in wanted if reasons[b]]
    print("prepared: " + "; ".join([*bad, copy or "no copy measured"]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
