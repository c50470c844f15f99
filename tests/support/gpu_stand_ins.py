"""Stand-ins for what `make gpu` starts: they succeed, fail, hang or flood, as a test wants.

A folder with `python`, `nvcc`, `compute-sanitizer` and `ncu`. Parts that only run small programs
(the noise's words, the profiler's stage, the sanitizer's jobs) are the project's own scripts; parts
that would need a GPU or minutes (every_kernel.py, pytest, the benchmark, the build) are played.
"""

from __future__ import annotations

import stat
import sys
from pathlib import Path

PARTS = ("kernels", "pytest", "benchmark", "nvcc", "compute-sanitizer", "ncu", "build")

# STAND_IN holds part=mode words; a part that is not named succeeds. Its arguments are the part and
# what it prints last.
PLAY = r"""#!/bin/sh
mode=good
for word in $STAND_IN; do case "$word" in "$1="*) mode=${word#*=};; esac; done
case "$mode" in
  hang)
    trap '' INT TERM
    sleep 300 &
    echo "$! $$" >> "$STAND_IN_PIDS"
    wait ;;
  flood) "$STAND_IN_PYTHON" -S -c 'import sys
for _ in range(300): sys.stdout.write("flood " * 20000 + "\n")' ;;
  fail) echo "$1 has failed"; exit 1 ;;
esac
echo "$2"
"""

PYTHON = r"""#!/bin/sh
here=$(dirname "$0")
folder() { while [ $# -gt 1 ]; do [ "$1" = --output ] && echo "$2"; shift; done; }
out=$(folder "$@")
[ -z "$out" ] || mkdir -p "$out"
case "$*" in
  *is_available*)
    cat "$STAND_IN_MACHINE" ;;
  *gpu_prepare.py*)
    case "$STAND_IN" in
      *build=fail*) echo '{"cpu": null, "cuda": "nvcc failed"}' > "$out/backends.json" ;;
      *) echo '{"cpu": null, "cuda": null}' > "$out/backends.json" ;;
    esac
    exec "$here/play" build "prepared: copy: 4300 GB/s" ;;
  *every_kernel.py*--each*)
    echo '["cuda-grad_stats"]' > "$out/failed.json"
    exec "$here/play" kernels "kernels: 14 of 14 cases agree with the reference" ;;
  *benchmarks/run.py*)
    cp "$STAND_IN_RESULTS" "$out/results.csv"
    exec "$here/play" benchmark "written to $out" ;;
  *"-m pytest"*)
    exec "$here/play" pytest "7 passed in 3.00s" ;;
  *)
    exec "$STAND_IN_PYTHON" "$@" ;;
esac
"""

# The compiled program prints what all_words.py expects.
NVCC = r"""#!/bin/sh
case "$*" in *--version*) echo "release 13.0, V13.0"; exit 0;; esac
"$(dirname "$0")/play" nvcc compiled || exit 1
while [ $# -gt 1 ]; do [ "$1" = -o ] && target=$2; shift; done
printf '#!/bin/sh\necho "4294967296 0.46 0.73 1e-06 3e-06"\n' > "$target"
chmod +x "$target"
"""

SANITIZER = r"""#!/bin/sh
case "$*" in
  *"--control "*) echo "========= ERROR SUMMARY: 2 errors"; exit 1 ;;
esac
exec "$(dirname "$0")/play" compute-sanitizer "========= ERROR SUMMARY: 0 errors"
"""

NCU = r"""#!/bin/sh
exec "$(dirname "$0")/play" ncu '"update_grads_kernel","gpu__time_duration.sum","530000"'
"""


def install(folder: Path) -> Path:
    """Writes the programs; returns the path of `python`."""
    folder.mkdir(parents=True)
    programs = {
        "play": PLAY,
        "python": PYTHON,
        "nvcc": NVCC,
        "compute-sanitizer": SANITIZER,
        "ncu": NCU,
        "nvidia-smi": "#!/bin/sh\necho 580.159.04\n",
    }
    for name, text in programs.items():
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder / "python"


def environment(folder: Path, modes: dict[str, str]) -> dict[str, str]:
    """The environment that the programs read; `folder` is theirs.

    Raises:
        ValueError: there is no such part.
    """
    unknown = set(modes) - set(PARTS)
    if unknown:
        raise ValueError(f"the parts are {', '.join(PARTS)}; got {', '.join(unknown)}")
    machine, results = folder / "machine.json", folder / "results.csv"
    machine.write_text(
        '{"PyTorch": "2.11.0+cu130 (CUDA 13.0)", "available": true, "capability": "9.0", '
        '"GPU": "NVIDIA H200, sm_90, 140 GiB", "Triton": "3.6.0", "Python": "3.12.3, 16 cores"}\n'
    )
    results.write_text("case,workload,dtype,provider,median_ms\n")
    return {
        "STAND_IN": " ".join(f"{part}={mode}" for part, mode in modes.items()),
        "STAND_IN_MACHINE": str(machine),
        "STAND_IN_RESULTS": str(results),
        "STAND_IN_PIDS": str(folder / "pids"),
        "STAND_IN_PYTHON": sys.executable,
    }
