#!/usr/bin/env bash
# Compiles every CUDA kernel for sm_80 and sm_90a, and fails unless none of them spills registers.
#
# Usage: scripts/check_kernels.sh
#
# nvcc is that of CUDA_HOME, or of PATH, or one that scripts/cuda_toolchain.sh assembles below target/.
# A source *_sm90a.cu is for Hopper's own instructions and compiled for sm_90a alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target="${CARGO_TARGET_DIR:-target}"
if [[ -n "${CUDA_HOME:-}" ]]; then
    nvcc="$CUDA_HOME/bin/nvcc"
elif ! nvcc="$(command -v nvcc)"; then
    eval "$(scripts/cuda_toolchain.sh --compiler "$target/cuda-compiler")"
    nvcc="$CUDA_HOME/bin/nvcc"
fi
work="$target/check-kernels"
rm -rf "$work"
mkdir -p "$work"
"$nvcc" --version | sed -n 's/^Cuda compilation tools, /nvcc: /p'

# One source for one architecture; the report of the assembler goes to a file.
compile() {
    local nvcc="$1" source="$2" arch="$3" work="$4" name
    name="$(basename "$source" .cu)"
    [[ "$name" == *_sm90a && "$arch" != 90a ]] && return
    "$nvcc" --options-file kernels/cuda/nvcc.flags -I kernels/shared \
        "-gencode=arch=compute_$arch,code=sm_$arch" --cubin -o "$work/$name.sm_$arch.cubin" "$source" \
        >"$work/$name.sm_$arch.report" 2>&1 || { cat "$work/$name.sm_$arch.report" >&2; return 1; }
}
export -f compile
for source in kernels/cuda/*.cu; do
    for arch in 80 90a; do printf '%s\0%s\0%s\0%s\0' "$nvcc" "$source" "$arch" "$work"; done
done | xargs -0 -n 4 -P "$(nproc)" bash -c 'compile "$@"' compile

# "N bytes stack frame, N bytes spill stores, N bytes spill loads": one line a kernel.
failed=0
for arch in 80 90a; do
    reports=("$work"/*.sm_"$arch".report)
    kernels=$(cat "${reports[@]}" | grep -c 'bytes spill stores' || true)
    spilling=$(grep -h -B 1 -E '([1-9][0-9]* bytes spill (stores|loads))' "${reports[@]}" || true)
    registers=$(cat "${reports[@]}" | sed -n 's/.*Used \([0-9]*\) registers.*/\1/p' | sort -n | tail -1)
    echo "sm_$arch: $kernels kernels compiled, at most ${registers:-0} registers a thread"
    if ((kernels == 0)); then
        echo "error: the compiler reported no kernel for sm_$arch" >&2
        failed=1
    fi
    if [[ -n "$spilling" ]]; then
        echo "error: kernels that spill on sm_$arch:" >&2
        echo "$spilling" >&2
        failed=1
    fi
done
exit "$failed"
