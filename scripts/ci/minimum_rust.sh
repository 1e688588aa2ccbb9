#!/usr/bin/env bash
# Checks the minimum Rust version that Cargo.toml states: no dependency may need a newer one. If rustup has a toolchain
# of that version, everything is compiled with it. Clippy (`incompatible_msrv`, a default lint) checks that the sources
# use no newer part of the standard library.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
minimum="$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)"
[[ "$minimum" =~ ^[0-9]+\.[0-9]+(\.[0-9]+)?$ ]] || { echo "error: Cargo.toml: rust-version = \"$minimum\"" >&2; exit 1; }

# The packages that a build on this machine uses, with all features.
cargo metadata --format-version 1 --locked --filter-platform "$(rustc -vV | sed -n 's/^host: //p')" |
    python3 -c 'import json, sys
minimum = sys.argv[1]
number = lambda version: tuple(int(part) for part in (version.split("-")[0] + ".0.0").split(".")[:3])
packages = json.load(sys.stdin)["packages"]
newer = [p for p in packages if p["rust_version"] and number(p["rust_version"]) > number(minimum)]
for p in newer:
    print("error: %s %s needs Rust %s" % (p["name"], p["version"], p["rust_version"]), file=sys.stderr)
print(f"{len(packages)} packages, {len(newer)} need a newer Rust than {minimum}")
sys.exit(bool(newer))' "$minimum"
toolchain="$(rustup toolchain list 2>/dev/null | sed -n "s/^\($minimum[.0-9]*-[^ ]*\).*/\1/p" | head -n 1)"
if [[ -n "$toolchain" ]]; then
    cargo "+$toolchain" check --workspace --all-targets --target-dir "${CARGO_TARGET_DIR:-target}/minimum-rust"
else
    echo "Rust $minimum is not installed: nothing was compiled with it"
fi
