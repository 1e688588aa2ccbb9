#!/usr/bin/env bash
# Tests and measures everything that runs on an Apple GPU, and prints a table to send back.
#
# Usage: scripts/hardware/apple_gpu.sh [OUT]    writes logs, report.txt and JSON to OUT (target/apple-gpu if left out)
#        scripts/hardware/apple_gpu.sh --help
#
# Needs a Mac with Apple silicon (M1 or later), macOS 13 or later, Rust, and a quarter of an hour. Nothing is
# installed. The operator tests run with Metal's validation layers on, which end a program that binds a wrong buffer
# or reads beyond one. The exit code is 1 if a step failed or the tests did not run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }
case "${1:-}" in
-h | --help)
    usage
    exit
    ;;
-*)
    printf 'error: unknown option %s\n\n' "$1" >&2
    usage >&2
    exit 2
    ;;
esac
if [[ "$(uname -s)/$(uname -m)" != Darwin/arm64 ]]; then
    echo "error: this needs a Mac with Apple silicon; this machine is $(uname -s)/$(uname -m)" >&2
    exit 2
fi
if ! type cargo &>/dev/null; then
    echo "error: cargo is missing: install Rust from https://rustup.rs" >&2
    exit 2
fi
out="${1:-target/apple-gpu}"
mkdir -p "$out" || exit 2
out="$(cd "$out" && pwd)"
report="$out/report.txt"
gd="${CARGO_TARGET_DIR:-target}/release/gd"

SECONDS=0
failed=()
# step NAME COMMAND..: runs a step. Its output goes to a file, and its last lines to the terminal.
step() {
    local name="$1" began=$SECONDS status=0
    shift
    echo "== $name"
    "$@" >"$out/$name.log" 2>&1 || status=$?
    if ((status == 0)); then
        printf '%-24s passed in %s s\n' "$name" "$((SECONDS - began))" >>"$report"
    else
        failed+=("$name")
        printf '%-24s FAILED (exit %s)\n' "$name" "$status" >>"$report"
        tail -n 40 "$out/$name.log"
    fi
    return "$status"
}

{
    echo "commit   $(git rev-parse HEAD)$([[ -z "$(git status --porcelain)" ]] || echo ' with changes')"
    echo "machine  $(sysctl -n machdep.cpu.brand_string), $(($(sysctl -n hw.memsize) >> 30)) GiB"
    echo "macOS    $(sw_vers -productVersion)"
    rustc --version
} >"$report"

step build cargo build --release -p gd-cli --bin gd --features metal || {
    cat "$report"
    exit 1
}
step doctor "$gd" doctor --device metal && cat "$out/doctor.log" >>"$report"

# Every suite runs with and without the validation layers, which detect wrong bindings and reads, but change the timing.
operators() { # name, variables of its environment
    local name="$1" cases
    shift
    export GD_CASE_LOG="$out/$name.cases"
    : >"$GD_CASE_LOG"
    step "$name" env "$@" cargo test --release -p gd-kernels --features metal --test device -- --test-threads 2
    cases=$(awk '$1 == "device" { n += $2 } END { print n + 0 }' "$GD_CASE_LOG")
    printf '%-24s %s cases on the device\n' "" "$cases" >>"$report"
    ((cases >= 100)) || failed+=("$name: only $cases cases ran, at least 100 expected")
}
operators validated MTL_DEBUG_LAYER=1 MTL_SHADER_VALIDATION=1
operators operators MTL_DEBUG_LAYER=0

# Training: the loss of a small model must fall, and it must generate text.
step train "$gd" train --device metal --config tiny --steps 200 --seed 1 --out "$out/model" &&
    step generate "$gd" generate "$out/model" --device metal --prompt "The " --max-tokens 32 --temperature 0 &&
    cat "$out/generate.log" >>"$report"

# Compared with candle's own attention (sdpa, kernels in the style of MLX), alternating in one process.
for shape in 1x8x4096x64 1x8x4096x128 1x8x16384x128; do
    for dtype in f16 f32; do
        name="bench-$shape-$dtype"
        step "$name" "$gd" bench attention --device metal --shapes "$shape" --dtype "$dtype" \
            --pass fwd,fwdbwd,decode --json "$out/$name.json" && cat "$out/$name.log" >>"$report"
    done
done

echo
echo "---- send from here (also in $report) ----"
cat "$report"
echo "---- to here; ${SECONDS} s ----"
if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
