#!/usr/bin/env bash
# Stands in for nvcc: writes an empty file for every kernel, so that scripts/ci/lint_cuda.sh can type-check the CUDA
# features without a toolkit. The result of such a build cannot run.
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
