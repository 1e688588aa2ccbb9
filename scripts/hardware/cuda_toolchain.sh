#!/usr/bin/env bash
# Installs a CUDA toolkit into a folder, from NVIDIA's Python wheels, for machines without one.
#
# Usage: scripts/hardware/cuda_toolchain.sh [--compiler] DIR
#
# DIR gets nvcc 13.0 (bin, nvvm), its headers, the libraries that candle links, and a stub of the driver in
# lib64/stubs; with --compiler only what compiles kernels. The lines on stdout are the exports that a build
# needs:
#
#     eval "$(scripts/hardware/cuda_toolchain.sh DIR)"
#     cargo build --release --features cuda
#
# Such a program needs these libraries and a driver at run time. On a machine without an NVIDIA driver the stub replaces
# it, and `--device cpu` runs:
#
#     LD_LIBRARY_PATH=DIR/lib64:DIR/lib64/stubs gd ... --device cpu
#
# Needs Python 3 with pip, and a C compiler. A DIR that is already complete is left as it is. 64-bit Linux.
set -euo pipefail

compiler_only=0
if [[ "${1:-}" == --compiler ]]; then
    compiler_only=1
    shift
fi
if (($# != 1)) || [[ "$1" == -* ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
# One release: the parts of a toolkit do not mix. The libraries are those that PyTorch's CUDA 13.0 builds carry.
packages=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85
)
if ((!compiler_only)); then
    packages+=(
        nvidia-cuda-nvrtc==13.0.88
        nvidia-cublas==13.1.0.3
        nvidia-curand==10.4.0.35
    )
fi
mkdir -p "$1"
home="$(cd "$1" && pwd)"
complete="$home/.complete"

# The stub of the driver's library has every function of cuda.h. Each returns CUDA_ERROR_STUB_LIBRARY (34), so that a
# program that runs with the stub reports it.
stub() {
    local source
    source="$(mktemp --suffix .c)"
    grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "$home/include/cuda.h" | sort -u |
        sed 's/.*/int &(void) { return 34; }/' >"$source"
    mkdir -p "$home/lib64/stubs"
    "${CC:-cc}" -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$home/lib64/stubs/libcuda.so.1" "$source"
    ln -sf libcuda.so.1 "$home/lib64/stubs/libcuda.so"
    rm -f "$source"
}

# Compares the stamp, so that newer versions of the packages replace older ones.
if [[ "$(cat "$complete" 2>/dev/null)" != "${packages[*]}" ]]; then
    rm -f "$complete"
    wheels="$home/.wheels"
    rm -rf "$wheels"
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
        --only-binary=:all: --target "$wheels" "${packages[@]}" >&2
    for part in "$wheels"/nvidia/*/; do cp -al "$part/." "$home/"; done
    rm -rf "$wheels"
    # nvcc looks for its libraries in lib64; linkers look for names without a version.
    if [[ ! -e "$home/lib64" ]]; then ln -s lib "$home/lib64"; fi
    for library in "$home"/lib64/lib*.so.*; do
        name="$(basename "$library")"
        ln -sf "$name" "$home/lib64/${name%%.so.*}.so"
    done
    stub
    "$home/bin/nvcc" --version | sed -n 's/^Cuda compilation tools, /nvcc: /p' >&2
    echo "${packages[*]}" >"$complete"
fi

# The capability for which candle compiles its own kernels; its default is that of the machine's GPU.
cat <<EXPORTS
export CUDA_HOME='$home'
export CUDA_PATH='$home'
export PATH='$home/bin':"\$PATH"
export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-80}"
EXPORTS
