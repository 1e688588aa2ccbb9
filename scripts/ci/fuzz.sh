#!/usr/bin/env bash
# Runs libFuzzer on one of the readers of files, or on all of them.
#
#   scripts/ci/fuzz.sh gguf 200000        a reader (fuzz/src/readers.rs lists them) and the number of inputs
#   scripts/ci/fuzz.sh all 20000
#
# Needs Rust and a C++ compiler. Mutations start from fuzz/corpus/READER. Inputs that reach new code are written to
# fuzz/target/corpus/READER, and inputs that fail to fuzz/target/failed-READER-*.
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
# The flags of cargo-fuzz without the sanitizer, which needs a nightly compiler.
passes=sancov-module
for option in level=4 inline-8bit-counters pc-table trace-compares; do
    flags="${flags:-} -Cllvm-args=-sanitizer-coverage-$option"
done
host="$(rustc -vV | sed -n 's/^host: //p')"
# With --target, build scripts and macros are not instrumented.
RUSTFLAGS="--cfg fuzzing -Cpasses=$passes $flags -Ccodegen-units=1" cargo build --release --target "$host"
for reader in "${readers[@]}"; do
    mkdir -p "target/corpus/$reader"
    echo "== $reader"
    GD_READER="$reader" RAYON_NUM_THREADS=1 "target/$host/release/gd-fuzz" "target/corpus/$reader" "corpus/$reader" \
        -runs="$2" -max_len=65536 -timeout=20 -rss_limit_mb=2048 -artifact_prefix="target/failed-$reader-" \
        -print_final_stats=1 2>&1 | grep -E 'stat::|SUMMARY|panicked|ERROR|Test unit|bytes held|Done' || exit 1
done
