#!/usr/bin/env bash
# Installs a wheel of gd-attention into a fresh virtual environment and runs the tests of crates/gd-python.
#
# Usage: scripts/python/test_wheel.sh WHEEL GD [TORCH]
#
# GD is the program, with which models and traces are compared. TORCH is a requirement for pip such as `torch==2.13.0`, which
# can be several gigabytes; without it the tests of PyTorch do not run, and the output says so.
set -euo pipefail
(($# == 2 || $# == 3)) || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
wheel="$(realpath "$1")"
GD="$(realpath "$2")"
export GD
cd "$(dirname "${BASH_SOURCE[0]}")/../../crates/gd-python"

venv="$(mktemp -d)"
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q "$wheel[test]" mypy ${3+"$3"}
"$venv/bin/python" -m pytest -q -p no:cacheprovider
# The types that the package states: those of the native functions against the library, and those of the package itself.
cd "$venv"
bin/python -m mypy.stubtest gd_attention._native
bin/python -m mypy --config-file "$OLDPWD/pyproject.toml" --cache-dir "$venv/mypy"
if [[ -z "${3-}" ]]; then
    echo "the tests of PyTorch did not run: scripts/python/test_wheel.sh $(basename "$wheel") gd torch"
fi
