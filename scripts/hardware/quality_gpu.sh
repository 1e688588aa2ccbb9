#!/usr/bin/env bash
# Trains models of 125 M parameters on an NVIDIA GPU, within 8 minutes, on a machine without Rust and network: selection,
# its softmax control, the Beacon alone and softmax, with equal data, steps and parameters. Then tests selection and its
# control on associative recall and on the needle.
#
# Usage: scripts/hardware/quality_gpu.sh --build [DIR]   where Rust, the CUDA toolkit and a network are: builds the
#                                                        program and prepares the text in DIR
#        scripts/hardware/quality_gpu.sh [DIR [OUT]]     on the GPU machine
#
# DIR defaults to target/nvidia-gpu, and OUT to DIR/quality. The number of steps is what the budget allows at the rates
# that a few steps of each model have. Runs that OUT has are not repeated, so a script that was ended continues with the
# same number of steps.
#
# Environment: QUALITY_CONFIG (a preset or a file; default 125M), QUALITY_SECONDS (of the four trainings; default 330),
# QUALITY_TASKS (default "mqar needle"), QUALITY_TASK_STEPS (default 600).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mechanisms=gd,softmax+beacon+null,beacon,softmax

if [[ "${1:-}" == --build ]]; then
    dir="${2:-target/nvidia-gpu}"
    scripts/hardware/nvidia_gpu.sh --build "$dir"
    scripts/data/corpus.py --out "$dir/corpus"
    # 50 MB of text: with the programs the folder stays below 60 MB.
    head -q -c 50000000 "$dir"/corpus/*.jsonl | sed '$d' |
        target/release/gd data prepare --data - --tokenizer bpe:16384 --valid-fraction 0.01 --out "$dir/data"
    rm -r "$dir/corpus"
    du -sh "$dir"
    exit
fi

dir="${1:-target/nvidia-gpu}"
out="${2:-$dir/quality}"
mkdir -p "$out"
. scripts/hardware/gpu_programs.sh "$dir" "$out" gd
config="${QUALITY_CONFIG:-125M}"
# Four batches a step instead of the recipe's, so that a few minutes have some hundred steps.
train=(--device cuda:0 --config "$config" --data "$dir/data" --seed 1 --set train.accumulation=4
    --mechanisms "$mechanisms" --json)

[[ -e "$out/steps" ]] || {
    "$dir/gd" compare "${train[@]}" --steps 6 --set train.lr.warmup=1 --out "$out/rates" >"$out/rates.json"
    python3 - "$out/rates.json" "${QUALITY_SECONDS:-330}" >"$out/steps" <<'STEPS'
import json
import sys

rates = json.load(open(sys.argv[1]))
seconds = sum(rates["tokens_per_step"] / one["tokens_per_second"] for one in rates["mechanisms"])
print(max(20, int(float(sys.argv[2]) / seconds)))
STEPS
}
steps=$(cat "$out/steps")
echo "$steps steps of each model"
"$dir/gd" compare "${train[@]}" --steps "$steps" --set "train.lr.warmup=$((steps / 10))" --out "$out/text" \
    >"$out/text.json"
cat "$out/text/table.md"
for task in ${QUALITY_TASKS-mqar needle}; do
    "$dir/gd" task "$task" --device cuda:0 --mechanisms gd,softmax+beacon+null --longest 4096 \
        --steps "${QUALITY_TASK_STEPS:-600}" --out "$out/$task" >"$out/$task.log"
    cat "$out/$task/table.md"
done
