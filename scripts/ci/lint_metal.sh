#!/usr/bin/env bash
# Checks the Metal backend without a Mac: lints the Rust side for macOS with the real crates, then type-checks with clang
# the sources that the program passes to Metal, with distinct address spaces. Both checks are tested, too: a pointer to
# the wrong address space and a source with a missing header must be refused. The results of the kernels are tested by
# crates/gd-testing.
# Needs Rust from rustup, for the target aarch64-apple-darwin, and clang.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
apple=aarch64-apple-darwin
# A separate folder, because scripts/ci/stand_in_cc.sh gives the build scripts empty libraries.
target="${CARGO_TARGET_DIR:-target}/check-metal"
mkdir -p "$target"
target="$(cd "$target" && pwd)"

rustup target list --installed | grep -q "^$apple\$" || rustup target add "$apple"
rm -rf "$target/$apple"/*/build/gd-kernels-*
CC_aarch64_apple_darwin="$PWD/scripts/ci/stand_in_cc.sh" AR_aarch64_apple_darwin="$PWD/scripts/ci/stand_in_cc.sh" \
    SDKROOT=/ CARGO_TARGET_DIR="$target" \
    cargo clippy --target "$apple" --features gd-cli/metal -p gd-cli -p gd-model -p gd-layer -p gd-kernels \
    --lib --bins --test device -- -D warnings

texts=("$target/$apple"/debug/build/gd-kernels-*/out/metal/*.metal)
# With all headers expanded, clang would warn of constants that a source does not use.
strict() {
    clang++ -std=c++14 --target=arm64-apple-macos -ffreestanding -nostdinc++ -fsyntax-only -DGD_STRICT -Wall -Wextra \
        -Wdouble-promotion -Werror -Wno-unused-const-variable -Wno-unknown-attributes -Wno-ignored-attributes \
        -Wno-duplicate-decl-specifier -x c++ "$@"
}
header=kernels/emulate/strict_metal.h
for text in "${texts[@]}"; do
    strict -include "$header" "$text"
done
[[ "${#texts[@]}" -eq "$(find kernels/metal -name '*.metal' | wc -l)" ]] || {
    echo "error: ${#texts[@]} texts of the sources in kernels/metal: ${texts[*]}" >&2
    exit 1
}

# refused WHAT WHY FILE: the check must fail with this message.
refused() {
    local output
    if output="$(strict -include "$header" "$3" 2>&1)"; then
        echo "error: $1 passed the check" >&2
        exit 1
    fi
    grep -q "$2" <<<"$output" || { printf 'error: %s was refused for another reason:\n%s\n' "$1" "$output" >&2; exit 1; }
}
seeded="$target/seeded.metal"
for spaces in "threadgroup device" "device constant" "threadgroup constant"; do
    read -r from to <<<"$spaces"
    { cat "${texts[0]}"; echo "$to const float *gd_wrong($from float *x) { return x; }"; } >"$seeded"
    refused "a pointer from $from to $to" "cannot initialize return object" "$seeded"
done
grep -v '^struct .*Params {$' "${texts[0]}" >"$seeded"
refused "a text without the params" "error:" "$seeded"
echo "Metal: the Rust side checked for $apple, ${#texts[@]} sources by clang, 4 seeded faults refused"
