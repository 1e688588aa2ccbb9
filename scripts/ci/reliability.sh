#!/usr/bin/env bash
# Runs the suites of reliability with larger counts than .ci/run: 10,000 crash states, 500 kills, 1000 injected errors, 1000
# reads of checkpoints that are being replaced, 100 power cuts of ext4 and xfs each, and 64 clients of gd serve for a minute.
#
#   scripts/ci/reliability.sh                    all of them, about an hour on 2 cores
#   scripts/ci/reliability.sh kills reads        some: states kills errors reads power serve
#
# Needs what .ci/run needs, and root for the power cuts. Each suite fails by itself where something is lost; at the end the
# number of cases of each suite is compared with the number that was asked for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
(($#)) || set -- states kills errors reads power serve
export GD_CRASH_STATES=10000 GD_KILLS=500 GD_INJECTED_ERRORS=1100 GD_READS=1000
cuts=100
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export GD_CASE_LOG="$work/cases"
: >"$GD_CASE_LOG"

# suite TEST COUNT NAME..: runs a test of the program, which reports COUNT cases of each NAME.
suite() {
    cargo test -p gd-cli --test suite -- --nocapture "$1"
    expect "${@:2}"
}
expect() {
    local count="$1" name ran
    for name in "${@:2}"; do
        ran=$(awk -v name="$name" '$1 == name { n += $2 } END { print n + 0 }' "$GD_CASE_LOG")
        echo "$name: $ran cases ran, at least $count expected"
        ((ran >= count))
    done
}
cargo test -p gd-cli --test suite --no-run
gd="${CARGO_TARGET_DIR:-target}/debug/gd"
for part; do
    echo "== $part"
    case "$part" in
    states) suite crash_states "$GD_CRASH_STATES" crash-states ;;
    kills) suite kills_lose_no_reported_checkpoint "$GD_KILLS" kill ;;
    errors) suite system_calls 1000 injected-errors ;;
    reads) suite readers_meet_only_whole_checkpoints "$GD_READS" concurrent-readers ;;
    power)
        scripts/ci/power_cut.py "$gd" --cuts "$cuts"
        expect "$cuts" power-cut-ext4 power-cut-xfs
        ;;
    serve)
        python3 -m venv "$work/venv"
        "$work/venv/bin/pip" install -q openai
        "$gd" train --config crates/gd-model/tests/fixtures/small.json --out "$work/run" >/dev/null
        echo '{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:' >"$work/run/chat_template.jinja"
        "$work/venv/bin/python" scripts/ci/check_serve.py "$gd" "$work/run" --clients 64 --seconds 60
        ;;
    *)
        echo "unknown part: $part" >&2
        exit 2
        ;;
    esac
done
