#!/usr/bin/env bash
# Builds the Python package gd-attention as a wheel for Python 3.10 and later.
#
# Usage: scripts/python/wheel.sh OUT [dev]
#
# Writes OUT/gd_attention-VERSION-cp310-abi3-PLATFORM.whl and prints its path. With `dev`, the wheel is compiled by the dev
# profile with the features of the workspace's tests, and reuses what they compiled. Needs Rust, a C compiler and Python 3 with
# venv and pip.
set -euo pipefail
(($# == 1 || $# == 2)) && [[ "${2-dev}" == dev ]] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
out="$(cd "$1" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
target="$(mkdir -p "${CARGO_TARGET_DIR:-target}" && cd "${CARGO_TARGET_DIR:-target}" && pwd)"

venv="$target/maturin"
if [[ ! -x "$venv/bin/maturin" ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q 'maturin>=1.9,<2'
fi
profile=(--release --strip)
if [[ "${2-}" == dev ]]; then profile=(--profile dev --features workspace-features); fi
rm -f "$out"/gd_attention-*.whl
"$venv/bin/maturin" build --manifest-path crates/gd-python/Cargo.toml --locked "${profile[@]}" \
    --compatibility linux --out "$out" >&2
ls "$out"/gd_attention-*.whl
