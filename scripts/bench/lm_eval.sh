#!/usr/bin/env bash
# Evaluates a model with lm-eval through `gd serve`.
#
#     scripts/bench/lm_eval.sh MODEL TASKS [LM_EVAL_FLAGS..]
#
# $GD is the program (default: target/release/gd), TASKS the names of lm-eval's tasks, separated by commas. Needs `pip install "lm_eval[api]"` and the data
# of the tasks. The tokenizer of the model must be a folder that transformers reads; prompts are sent as token ids.
set -euo pipefail
(($# >= 2)) || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
gd="${GD:-target/release/gd}" model="$1" tasks="$2"
shift 2
work="$(mktemp -d)"
"$gd" serve "$model" --port 0 --name model --json >"$work/url" &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -r "$work"' EXIT
until [[ -s "$work/url" ]]; do
    kill -0 "$server" || { echo "error: the server has ended" >&2; exit 1; }
    sleep 0.2
done
url="$(python3 -c 'import json, sys; print(json.load(sys.stdin)["url"])' <"$work/url")"
lm_eval --model local-completions --tasks "$tasks" \
    --model_args "model=model,base_url=$url/v1/completions,tokenizer=$model,tokenized_requests=True,num_concurrent=8" "$@"
