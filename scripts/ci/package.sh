#!/usr/bin/env bash
# Packages every crate that is published and builds each one from its package alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# Sources that are not committed yet are packaged as they are.
cargo package --workspace --allow-dirty --exclude gd-examples --exclude gd-testing --exclude gd-tests
