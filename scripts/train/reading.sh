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
gate='model.gd.select.gate={"energy":{"temperature":1.0}}'
margin='model.gd.select.gate={"margin":{"temperature":1.0}}'
# From the mixture of the candidates to hard selection between 40 % and 70 % of the steps.
warm_up='train.select.hardness=[[0,0],[0.4,0],[0.7,1]]'
# Both with a gate by the margin.
recipe=(
    --set "$margin" --set model.gd.select.threshold=0 --set model.gd.select.exclude_below=0
    --set 'model.gd.select.gradient={"gate_floor":0.2,"null":false}' --set "$warm_up"
)

# measure TASK NAME MECHANISMS FLAG..: the runs of a task in a folder of their own.
measure() { gd task "$1" --mechanisms "$3" --seeds "$seeds" --out "$out/$1/$2" "${@:4}"; }

measure max-retrieval controls softmax,softmax+null
for task in mqar-small flip-flop needle; do
    measure "$task" controls softmax+beacon+null,beacon
done
for task in max-retrieval mqar-small flip-flop needle; do
    for temperature in 0.5 1 4; do
        measure "$task" "hard-$temperature" gd --set "model.gd.select.temperature=$temperature"
    done
    measure "$task" warm-up gd --set "$warm_up"
    measure "$task" margin gd "${recipe[@]}"
    measure "$task" schedule gd --set 'train.select.temperature=[[0,8],[0.6,0.5]]'
    measure "$task" spread gd --set model.gd.select.temperature=0.5 \
        --set 'model.gd.select.gradient={"temperature_spread":0.05}'
    measure "$task" gate gd --set "$gate" --set model.gd.select.threshold=0.5 \
        --set model.gd.select.exclude_below=0 --set train.select.calibrate_thresholds=true \
        --set 'model.gd.select.gradient={"gate_floor":0.2,"null":false}'
done
# Selection goes on improving for eight times as many steps.
measure max-retrieval long softmax,gd --steps 20000 --longest 5000 "${recipe[@]}"
