#!/usr/bin/env bash
# Packages every crate that can be published, and builds each one from the files in its package alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# Includes changes that are not committed.
CARGO_PROFILE_DEV_DEBUG=false CARGO_INCREMENTAL=0 cargo package --workspace --allow-dirty \
    --exclude gd-examples --exclude gd-features --exclude gd-python --exclude gd-testing --exclude gd-tests
