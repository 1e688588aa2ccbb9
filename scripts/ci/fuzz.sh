#!/usr/bin/env bash
# Runs libFuzzer on one of the readers of files, or on all of them.
#
#   scripts/ci/fuzz.sh gguf 200000        the reader (fuzz/src/readers.rs lists them) and how many inputs
#   scripts/ci/fuzz.sh all 20000
#
# Needs a C++ compiler besides Rust. The inputs start from fuzz/corpus/READER; what libFuzzer finds worth keeping goes
# to fuzz/target/corpus/READER, an input that fails to fuzz/target/failed-READER-*.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../fuzz"
if (($# != 2)); then
    echo "usage: scripts/ci/fuzz.sh READER|all RUNS" >&2
    exit 2
fi
readers=("$1")
if [[ $1 == all ]]; then
    readers=()
    for folder in corpus/*/; do readers+=("$(basename "$folder")"); done
fi
# What cargo-fuzz passes, less the sanitizer, which needs a nightly compiler.
passes=sancov-module
for option in level=4 inline-8bit-counters pc-table trace-compares; do
    flags="${flags:-} -Cllvm-args=-sanitizer-coverage-$option"
done
host="$(rustc -vV | sed -n 's/^host: //p')"
# With a target named, build scripts and macros are not instrumented.
RUSTFLAGS="--cfg fuzzing -Cpasses=$passes $flags -Ccodegen-units=1" cargo build --release --target "$host"
for reader in "${readers[@]}"; do
    mkdir -p "target/corpus/$reader"
    echo "== $reader"
    GD_READER="$reader" RAYON_NUM_THREADS=1 "target/$host/release/gd-fuzz" "target/corpus/$reader" "corpus/$reader" \
        -runs="$2" -max_len=65536 -timeout=20 -rss_limit_mb=2048 -artifact_prefix="target/failed-$reader-" \
        -print_final_stats=1 2>&1 | grep -E 'stat::|SUMMARY|panicked|ERROR|Test unit|bytes held|Done' || exit 1
done
