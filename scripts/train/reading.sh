#!/usr/bin/env bash
# Measures selection and its controls on the tasks of `gd task`, each with three seeds, on the CPU.
#
# Usage: scripts/train/reading.sh [OUT [SEEDS]]      (default: out/reading 3)
#
# Every run is saved when it is complete. Started again, the script continues with the runs that OUT does not have.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${1:-out/reading}"
seeds="${2:-3}"
gd() { cargo run --quiet --release -- "$@"; }
# The tasks have the margin gate and move from the mixture of the candidates to hard selection between 40 % and 70 % of the
# steps. These flags take both away.
no_schedule=(--set train.select.hardness=1)
no_gate=(
    --set model.gd.select.gate=none --set model.gd.select.threshold=null --set model.gd.select.exclude_below=0.5
    --set 'model.gd.select.gradient={"gate_floor":0,"null":true}'
)
hard=("${no_schedule[@]}" "${no_gate[@]}")

# measure TASK NAME MECHANISMS FLAG..: the runs of a task in a folder of their own.
measure() { gd task "$1" --mechanisms "$3" --seeds "$seeds" --out "$out/$1/$2" "${@:4}"; }

measure max-retrieval controls softmax,softmax+null
for task in mqar-small flip-flop needle induction copy; do
    measure "$task" controls softmax+beacon+null,beacon
done
for task in max-retrieval mqar-small flip-flop needle induction copy; do
    measure "$task" selection gd
    measure "$task" no-schedule gd "${no_schedule[@]}"
    measure "$task" no-gate gd "${no_gate[@]}"
    for temperature in 0.5 1 4; do
        measure "$task" "hard-$temperature" gd "${hard[@]}" --set "model.gd.select.temperature=$temperature"
    done
    measure "$task" temperature-schedule gd "${hard[@]}" --set 'train.select.temperature=[[0,8],[0.6,0.5]]'
    measure "$task" spread gd "${hard[@]}" --set model.gd.select.temperature=0.5 \
        --set 'model.gd.select.gradient={"temperature_spread":0.05}'
    measure "$task" energy-gate gd "${no_schedule[@]}" --set 'model.gd.select.gate={"energy":{"temperature":1.0}}' \
        --set model.gd.select.threshold=0.5 --set train.select.calibrate_thresholds=true
done
# Selection goes on improving for eight times as many steps.
measure max-retrieval long softmax,gd --steps 20000 --longest 5000
