#!/usr/bin/env bash
# Builds a CUDA driver whose device is the host (crates/gd-testing/host_driver), so that programs built with the feature
# cuda run on a machine without a GPU: slowly and synchronously, but with all calls that a GPU would get.
#
# Usage: scripts/hardware/host_driver.sh DIR
#
#     eval "$(scripts/hardware/cuda_toolchain.sh target/cuda)"
#     cargo build --release -p gd-cli --features cuda
#     eval "$(scripts/hardware/host_driver.sh target/host-driver)"
#     target/release/gd train --device cuda:0 ...
#
# The line on stdout is the export that such a program needs. CUDA_HOME must name the toolkit; a C++ compiler and the
# sources of candle-kernels, which cargo has fetched, are needed too. 64-bit x86 Linux.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if (($# != 1)) || [[ "$1" == -* ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
mkdir -p "$1/sources"
dir="$(cd "$1" && pwd)"
candle="$(cargo metadata --all-features --format-version 1 | python3 -c 'import json, pathlib, sys
found = [p for p in json.load(sys.stdin)["packages"] if p["name"] == "candle-kernels"]
print(pathlib.Path(found[0]["manifest_path"]).parent / "src")')"

# C++ has no shared memory whose size the launch defines.
for source in affine binary cast fill indexing reduce sort ternary unary; do
    sed 's/extern __shared__ \([a-z0-9_]*\) \([a-z_]*\)\[\];/\1 *\2 = (\1 *)grid::dynamic_shared();/' \
        "$candle/$source.cu" >"$dir/sources/candle_$source.cpp"
done
for source in kernels/cuda/*.cu; do
    echo "#include \"$PWD/$source\"" >"$dir/sources/$(basename "$source" .cu).cpp"
done
cp kernels/emulate/*.cpp crates/gd-testing/host_driver/*.cpp "$dir/sources/"
sed -i "s|#include \"\.\./\.\./\.\./|#include \"$PWD/|; s|#include \"\.\./cuda/|#include \"$PWD/kernels/cuda/|" "$dir"/sources/*.cpp
rm -f "$dir/sources/metal.cpp"

compile() {
    local source="$1" object="${1%.cpp}.o" flags
    flags=(-std=c++17 -O2 -fPIC -ffp-contract=off -w -I "$CUDA_HOME/include" -I crates/gd-testing/host_driver)
    case "$(basename "$source")" in
    candle_*) flags=(-std=c++17 -O2 -fPIC -fno-strict-aliasing -ffp-contract=off -w -I crates/gd-testing/host_driver/candle -I "$2") ;;
    *) flags+=(-DGD_EMULATE -I kernels/emulate -I kernels/shared -I kernels/cuda) ;;
    esac
    "${CXX:-c++}" "${flags[@]}" -c -o "$object" "$source"
}
export -f compile
printf '%s\0' "$dir"/sources/*.cpp | xargs -0 -n 1 -P "$(nproc)" bash -c 'compile "$1" "$0"' "$candle"
# The other functions of the driver return an error.
grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "$CUDA_HOME/include/cuda.h" | sort -u |
    sed 's/.*/__attribute__((weak)) int &(void) { return 801; }/' >"$dir/sources/others.c"
"${CC:-cc}" -fPIC -w -c -o "$dir/sources/others.o" "$dir/sources/others.c"

# candle's sources each define the same helpers.
link() {
    local library="$1"
    rm -f "$dir/$library"
    shift
    echo "$library { global: *; };" >"$dir/sources/$library.map"
    "${CXX:-c++}" -shared -o "$dir/$library" "-Wl,-soname,$library,-z,muldefs,--no-undefined" \
        -Wl,--version-script,"$dir/sources/$library.map" "$@"
}
mv "$dir/sources/blas.o" "$dir/sources/random.o" "$dir"
link libcuda.so.1 "$dir"/sources/*.o -ldl -lpthread
link libcublas.so.13 "$dir/blas.o" "$dir/libcuda.so.1"
link libcurand.so.10 "$dir/random.o"
echo "export LD_LIBRARY_PATH=$dir:$CUDA_HOME/lib64"
