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
# The build scripts of this workspace and of candle compile their kernels again where NVCC or a path of CUDA changes, so that
# a build with a real nvcc in the same folder never uses these empty ones.
NVCC="$cuda/bin/nvcc" PATH="$cuda/bin:$PATH" CUDA_HOME="$cuda" CUDA_PATH="$cuda" CUDA_COMPUTE_CAP=80 \
    cargo clippy --workspace --all-targets --features cuda,gd-cli/nccl -- -D warnings
