"""Counts the machine instructions of each loop of compiled CUDA kernels; needs no GPU.

    nvcc -std=c++17 -O3 -Icsrc -arch=sm_90 -cubin \
        csrc/cuda/update_grads_kernel.cu -o /tmp/update.cubin
    python .ci/sass.py /tmp/update.cubin 'update_grads_kernel<float'

A loop is what lies between the target of a backward branch and that branch; an inner loop counts
in the outer ones too. Code that the compiler moved behind the kernel's end is not seen.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from processes import cuda_tool

CLASSES = {  # the first that matches
    "load": r"LDG|LD\.",
    "store": r"STG|ST\.",
    "shared": r"LDS|STS|ATOMS",
    "atomic": r"ATOM|RED",
    "constant": r"LDC|ULDC",
    "convert": r"I2F|F2I|F2F|FRND|I2FP|F2FP",
    "mufu": r"MUFU",
    "imad.wide": r"IMAD\.WIDE|IMAD\.HI",
    "imad": r"IMAD(?!\.MOV|\.SHL|\.IADD|\.U32)",
    "float": r"FADD|FMUL|FFMA|FSETP|FMNMX|FSEL|FSET|FCHK|HADD|HFMA|HMUL|DADD|DMUL|DFMA",
    "branch": r"BRA|BSSY|BSYNC|EXIT|CALL|RET|WARPSYNC",
    "uniform": r"U[A-Z]",
    "logic": r"LOP3|SHF|PRMT|SEL|LEA|PLOP3",
    "integer": r"",
}


def tool(name: str) -> str:
    """A CUDA binary tool: from the PATH, CUDA_HOME, or the one that comes with Triton."""
    found = cuda_tool(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec and spec.origin:
        found = shutil.which(name, path=Path(spec.origin).parent / "backends/nvidia/bin")
    if found is None:
        raise SystemExit(f"{name} is neither on PATH nor in the CUDA toolkit, nor with Triton")
    return found


def kernels(binary: str) -> dict[str, list[tuple[int, str]]]:
    """Address and text of each instruction of each kernel, by readable name."""
    text = subprocess.run([tool("cuobjdump"), "-sass", binary], capture_output=True, text=True)
    text = subprocess.run(["c++filt"], input=text.stdout, capture_output=True, text=True).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (.*)", line):
            name = re.sub(r"mmfuse::cuda::|\(anonymous namespace\)::|^void ", "", match[1])
            code = found.setdefault(name, [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code.append((int(match[1], 16), match[2]))
    return found


def classify(instruction: str) -> str:
    """The class of an instruction without its guard."""
    opcode = re.sub(r"^@!?U?P\w+\s+", "", instruction)
    return next(name for name, pattern in CLASSES.items() if re.match(pattern, opcode))


def main() -> None:
    """Prints the loops of the kernels whose name contains the pattern."""
    pattern = sys.argv[2] if len(sys.argv) > 2 else ""
    for name, code in kernels(sys.argv[1]).items():
        if pattern not in name:
            continue
        print(f"{name.split('(mmfuse')[0]}: {len(code)} instructions")
        for address, text in code:
            match = re.search(r"BRA\S*\s+(?:\S+,\s*)?`?\(?(?:0x)([0-9a-f]+)", text)
            if not match or int(match[1], 16) >= address:
                continue
            body = [t for a, t in code if int(match[1], 16) <= a <= address]
            counts = Counter(map(classify, body))
            listed = "  ".join(f"{k} {counts[k]}" for k in CLASSES if counts[k])
            print(f"  {match[1]}-{address:x}: {len(body)} = {listed}")


if __name__ == "__main__":
    main()
