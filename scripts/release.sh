#!/usr/bin/env bash
# Builds the program for distribution: a stripped binary, its shell completions and manual pages, the licences of all
# packages that it contains, and checksums, in one archive. Builds the Python package as a wheel, too.
#
# Usage: scripts/release.sh OUT
#
# Writes OUT/gd-VERSION-TARGET.tar.gz, OUT/gd_attention-VERSION-cp310-abi3-PLATFORM.whl and a .sha256 beside each. Needs Rust, a
# C compiler and Python 3 with venv and pip. The same sources and compiler give the same archive, byte for byte.
set -euo pipefail
(($# == 1)) || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
out="$(cd "$1" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

host="$(rustc --version --verbose | sed -n 's/^host: //p')"
version="$(cargo metadata --format-version 1 --no-deps |
    python3 -c 'import json, sys; print(next(p["version"] for p in json.load(sys.stdin)["packages"] if p["name"] == "gd-cli"))')"
name="gd-$version-$host"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
folder="$work/$name"
mkdir -p "$folder/completions"

CARGO_PROFILE_RELEASE_STRIP=symbols cargo build --release --locked -p gd-cli --bin gd
cp "${CARGO_TARGET_DIR:-target}/release/gd" "$folder/gd"
"$folder/gd" completions bash >"$folder/completions/gd.bash"
"$folder/gd" completions zsh >"$folder/completions/_gd"
"$folder/gd" completions fish >"$folder/completions/gd.fish"
"$folder/gd" man --out "$folder/man/man1" >/dev/null
cp README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE "$folder/"
python3 scripts/licenses.py "$host" >"$folder/THIRD-PARTY-LICENSES.txt"
(cd "$folder" && find . -type f ! -name SHA256SUMS | LC_ALL=C sort | xargs sha256sum >SHA256SUMS)
# The same times, owners and order for every build.
tar -C "$work" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf - "$name" | gzip -n >"$out/$name.tar.gz"
(cd "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
echo "$out/$name.tar.gz"
wheel="$(scripts/python/wheel.sh "$out")"
(cd "$out" && sha256sum "$(basename "$wheel")" >"$(basename "$wheel").sha256")
echo "$wheel"
