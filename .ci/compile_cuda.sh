#!/usr/bin/env bash
# Compiles and links csrc/cuda for every supported GPU generation; needs neither a GPU nor PyTorch.
# Prints each kernel's registers. Warnings, spills and undefined symbols are errors.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=$(command -v nvcc || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" || true)
if [ -z "$nvcc" ]; then
  if [ "${MMFUSE_CUDA:-auto}" = 1 ]; then
    echo "compile_cuda: MMFUSE_CUDA=1, but nvcc was not found" >&2
    exit 1
  fi
  echo "compile_cuda: skipped, because nvcc was not found"
  exit 0
fi

out=build/compile_cuda
rm -rf "$out"
mkdir -p "$out"

compile() {
  "$nvcc" -std=c++17 -O3 -Icsrc -Werror all-warnings \
    -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 \
    -gencode=arch=compute_100,code=sm_100 \
    -Xcompiler=-fPIC,-Wall,-Wno-unknown-pragmas -Xptxas=-v \
    -c "$1" -o "$out/$(basename "$1").o" >"$out/$(basename "$1").log" 2>&1 ||
    { cat "$out/$(basename "$1").log" >&2; return 255; }
}
export -f compile
export nvcc out
printf '%s\n' csrc/cuda/*.cu | xargs -P "${MAX_JOBS:-$(nproc)}" -I{} bash -c 'compile {}'
"$nvcc" -shared -Xlinker=-z,defs "$out"/*.o -o "$out/kernels.so"

# One line per kernel: its name, then registers and spilled bytes for each architecture.
cat "$out"/*.log | c++filt | awk '
  /Compiling entry function/ {
    arch = $NF; gsub(/\x27/, "", arch)
    name = $0; sub(/.*entry function \x27(void )?/, "", name); sub(/\x27 for .*/, "", name)
    gsub(/mmfuse::cuda::|\(anonymous namespace\)::/, "", name)
    gsub(/\(Anchors\)0/, "none", name); gsub(/\(Anchors\)1/, "same", name)
    gsub(/\(Anchors\)2/, "mixed", name); gsub(/\(Anchors\)3/, "zero", name)
    sub(/>\(.*/, ">", name); sub(/\(.*/, "", name)
    if (!(name in seen)) { seen[name] = 1; order[++count] = name }
  }
  /bytes stack frame/ {
    stack = $1; spill = 0
    for (i = 2; i <= NF; ++i) if ($i == "spill") spill += $(i - 2)
    if (stack + spill > 0) { print "spills: " name " " arch ": " $0; failed = 1 }
  }
  /Used [0-9]+ registers/ {
    match($0, /Used [0-9]+/)
    regs[name] = regs[name] sprintf("  %s %3d", arch, substr($0, RSTART + 5, RLENGTH - 5))
  }
  END {
    for (i = 1; i <= count; ++i) printf "%-52s registers:%s\n", order[i], regs[order[i]]
    if (!failed) print "compile_cuda: " count " kernels, no warnings, no spills"
    exit failed
  }'
