#!/usr/bin/env bash
# Measures what reading is worth on text: selection, softmax attention in its place, and a model whose heads read nothing, with
# equal numbers of parameters, on the CPU.
#
# Usage: scripts/train/text.sh [OUT [SEEDS]]      (default: out/text 3)
#
# Fetches the manuals of Python, PostgreSQL and Rust (19 MB, permissive licences), learns a vocabulary of 2048 tokens and
# compares the three at contexts of 512 and 1024 tokens. Then trains them at 256 tokens and evaluates at 256, 1024 and
# 4096. Started again, the script continues with the runs that OUT does not have.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${1:-out/text}"
seeds="${2:-3}"
gd() { cargo run --quiet --release -- "$@"; }
config=scripts/train/text.toml

if [[ ! -f "$out/data/index.json" ]]; then
    scripts/data/corpus.py --out "$out/manuals" --sources python,postgresql,rust
    gd data prepare --data "$out"/manuals/{python,postgresql,rust}.jsonl --tokenizer bpe:2048 --valid-fraction 0.01 \
        --out "$out/data"
fi

# compare NAME CONTEXT MECHANISMS SEEDS FLAG..: trainings at a context with the same tokens per step.
compare() {
    gd compare --config "$config" --data "$out/data" --mechanisms "$3" --seeds "$4" \
        --set "train.context=$2" --set "train.batch=$((4096 / $2))" --out "$out/$1" "${@:5}"
}
for context in 512 1024; do
    compare "context-$context" "$context" beacon,softmax+beacon+null,gd "$seeds"
    compare "context-$context-one-key" "$context" gd "$seeds" --set model.gd.select.picks=1
done
# What the parts of the recipe are worth, one seed each.
compare two-keys 1024 gd 1 --set model.gd.select.picks=2
compare few-candidates 1024 gd 1 --set model.gd.select.picks=1 --set train.select.candidates=8
compare margin-gate 1024 gd 1 --set model.gd.select.picks=1 --set train.select.calibrate_thresholds=false \
    --set 'model.gd.select.gate={"margin":{"temperature":1.0}}' --set model.gd.select.threshold=0

# length NAME SEED FLAG..: one training at 256 tokens, and evaluations of whole texts at longer contexts.
length() {
    local run="$out/length/$1-$2"
    if [[ -f "$run/model.safetensors" ]]; then
        echo "$run is complete"
    elif compgen -G "$run/checkpoint-*" >/dev/null; then
        gd train --resume "$run"
    else
        gd train --config "$config" --data "$out/data" --seed "$2" --out "$run" \
            --set train.context=256 --set train.batch=16 "${@:3}"
    fi
    for context in 256 1024 4096; do
        [[ -f "$run/eval-$context.json" ]] && continue
        gd eval "$run" --data "$out/data" --context "$context" --json >"$run/part.json"
        mv "$run/part.json" "$run/eval-$context.json"
    done
}
for ((seed = 0; seed < seeds; seed++)); do
    length gd "$seed"
    length softmax "$seed" --set 'model.gd.mechanism=["softmax-null"]'
    # As wide as the others have parameters.
    length beacon "$seed" --set 'model.gd.selecting_heads=[0]' --set 'model.gd.induction_heads=[]' \
        --set model.intermediate_size=364
done
python3 - "$out" <<'PY'
import json, pathlib, sys

for file in sorted(pathlib.Path(sys.argv[1], "length").glob("*/eval-*.json")):
    print(file.parent.name, file.stem.removeprefix("eval-"), round(json.loads(file.read_text())["loss"], 4), sep="\t")
PY
