#!/usr/bin/env bash
# Lints every crate with the features cuda and nccl on a machine without CUDA. scripts/ci/stand_in_nvcc.sh gives
# the build scripts empty kernels; scripts/ci/compile_kernels.sh compiles the real ones.
# Needs MPI and libclang, for the feature nccl.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
cuda="$(mktemp -d)"
trap 'rm -rf "$cuda"' EXIT
mkdir -p "$cuda/bin" "$cuda/include" "$cuda/lib64"
touch "$cuda/include/cuda.h"
cp scripts/ci/stand_in_nvcc.sh "$cuda/bin/nvcc"
# A separate folder, so that a build with a real nvcc never uses these empty kernels.
target="${CARGO_TARGET_DIR:-target}/check-cuda"
NVCC="$cuda/bin/nvcc" PATH="$cuda/bin:$PATH" CUDA_HOME="$cuda" CUDA_PATH="$cuda" CUDA_COMPUTE_CAP=80 \
    CARGO_TARGET_DIR="$target" \
    cargo clippy --workspace --all-targets --features cuda,gd-cli/nccl -- -D warnings
