#!/usr/bin/env bash
# Type-checks the feature nccl on a machine without CUDA: a stand-in for nvcc answers the build scripts
# with empty kernels. What it builds cannot run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cuda="$(mktemp -d)"
trap 'rm -rf "$cuda"' EXIT
mkdir -p "$cuda/bin" "$cuda/include" "$cuda/lib64"
touch "$cuda/include/cuda.h"
cat >"$cuda/bin/nvcc" <<'NVCC'
#!/usr/bin/env bash
if [[ "$*" == *--version* ]]; then
    printf 'nvcc: NVIDIA (R) Cuda compiler driver\n\n\nCuda compilation tools, release 13.0, V13.0.88\n'
    exit
fi
while (($#)); do
    case "$1" in
    -o) : >"$2" ;;
    --output-directory) folder="$2" ;;
    *.cu) sources+=("$1") ;;
    esac
    shift
done
if [[ -n "${folder:-}" ]]; then
    for source in "${sources[@]}"; do : >"$folder/$(basename "$source" .cu).ptx"; done
fi
NVCC
chmod +x "$cuda/bin/nvcc"
# A folder of its own, so that a build with a real nvcc never takes up what this one left behind.
target="${CARGO_TARGET_DIR:-target}/check-nccl"
PATH="$cuda/bin:$PATH" CUDA_HOME="$cuda" CUDA_PATH="$cuda" CUDA_COMPUTE_CAP=80 \
    RUSTFLAGS="${RUSTFLAGS:-} -D warnings" CARGO_TARGET_DIR="$target" cargo check -p gd-model --features nccl
