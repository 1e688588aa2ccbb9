#!/usr/bin/env bash
# Tests and measures everything that runs on an NVIDIA GPU, within 9 minutes, on a machine without Rust and network.
#
# Usage: scripts/hardware/nvidia_gpu.sh --build [DIR]   where Rust and the CUDA toolkit are: builds the programs into DIR
#        scripts/hardware/nvidia_gpu.sh [DIR] [OUT]     on the GPU machine: runs them, writes logs and report.json to OUT
#
# DIR defaults to target/nvidia-gpu, and OUT to DIR/out. The second call needs the result of the first, the folders
# scripts and kernels, an NVIDIA driver, the CUDA libraries (cudart, cublas, curand, nvrtc; found below CUDA_HOME or in
# Python's packages), and for the comparison Python with PyTorch; compute-sanitizer is used where it is installed.
# Skipped steps are printed and counted; the exit code is 1 if anything failed or the tests themselves did not run.
#
# The times are for an H100 (CUDA_COMPUTE_CAP=90 for candle's kernels, GD_CUDA_ARCHS for ours).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ "${1:-}" == --build ]]; then
    set -e
    dir="${2:-target/nvidia-gpu}"
    mkdir -p "$dir"
    target="${CARGO_TARGET_DIR:-target}"
    export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-90}" GD_CUDA_ARCHS="${GD_CUDA_ARCHS:-80,90a}"
    # In one call: with two calls cargo would compile candle's kernels twice, with different features.
    tests=$(cargo build --release -p gd-cli -p gd-kernels --bin gd --test device --features cuda \
        --message-format json | sed -n '/"name":"device"/s/.*"executable":"\([^"]*\)".*/\1/p')
    cp "$target/release/gd" "$dir/gd"
    cp "$tests" "$dir/operators"
    strip "$dir/gd" "$dir/operators"
    git rev-parse HEAD >"$dir/commit"
    [[ -z "$(git status --porcelain)" ]] || echo "with changes" >>"$dir/commit"
    ls -l "$dir"
    exit
fi

dir="${1:-target/nvidia-gpu}"
out="${2:-$dir/out}"
mkdir -p "$out"
operators="$dir/operators"
. scripts/hardware/gpu_programs.sh "$dir" "$out" gd operators
gd="$dir/gd"

SECONDS=0
failed=()
skipped=()
ran=()
# Seconds at which running steps are ended, so that all of it with the report takes less than 9 minutes.
END=510
# step NAME LIMIT_S COMMAND..: runs a step for at most LIMIT_S seconds. Its output goes to a file and its last lines to the terminal.
step() {
    local name="$1" limit=$(($2 < END - SECONDS ? $2 : END - SECONDS)) began=$SECONDS status=0
    shift 2
    # For timeout, 0 means no limit.
    ((limit > 0)) || limit=1
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    tail -n "${LINES_SHOWN:-6}" "$out/$name.log"
    if ((status == 0)); then
        ran+=("$name")
        echo "== $name: passed in $((SECONDS - began)) s"
    else
        failed+=("$name")
        ((status == 124 || status == 137)) && echo "it ran past its $limit s"
        echo "== $name: FAILED (exit $status) after $((SECONDS - began)) s"
    fi
    return 0
}
skip() {
    skipped+=("$1")
    echo "== $1: SKIPPED: $2"
}

export GD_CASE_LOG="$PWD/$out/cases"
[[ "$out" == /* ]] && GD_CASE_LOG="$out/cases"
: >"$GD_CASE_LOG"
LINES_SHOWN=25 step doctor 60 "$gd" doctor --device cuda:0
step operators 150 "$operators" --test-threads 4
cases=$(awk '$1 == "device" { n += $2 } END { print n + 0 }' "$GD_CASE_LOG")
echo "$cases cases on the device"
((cases >= 100)) || failed+=("operators: only $cases cases ran, at least 100 expected")
if type compute-sanitizer &>/dev/null; then
    for tool in memcheck synccheck; do
        GD_SANITIZE=1 GD_CASE_LOG="$GD_CASE_LOG.sanitized" step "$tool" 60 compute-sanitizer --tool "$tool" \
            --error-exitcode 9 "$operators" --test-threads 1
    done
else
    skip memcheck "compute-sanitizer is not installed"
    skip synccheck "compute-sanitizer is not installed"
fi
if python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' &>/dev/null; then
    LINES_SHOWN=60 step attention 150 python3 scripts/bench/torch_gpu.py --gd "$gd" --seconds 60 --json "$out/attention.json"
else
    skip attention "Python has no PyTorch that sees the GPU"
fi
# Training: the rate of a model of 125 M parameters (1.3 million tokens, in steps of an eighth of the recipe's), and a
# short run to its end, whose loss must fall.
step throughput 90 "$gd" train --device cuda:0 --config 125M --steps 20 --set train.eval_every=20 \
    --set train.accumulation=8 --seed 1 --out "$out/throughput" --json
step train 60 "$gd" train --device cuda:0 --config tiny --steps 200 --seed 1 --out "$out/train" --json

python3 - "$out" "$dir" "$SECONDS" "$cases" "${#ran[@]}" "${failed[@]}" -- "${skipped[@]}" <<'REPORT'
"""Puts GPU, driver, commit, hashes of the kernels and the figures into report.json, and prints the training."""
import hashlib
import json
import pathlib
import statistics
import sys

out, programs = map(pathlib.Path, sys.argv[1:3])
seconds, cases, ran = map(int, sys.argv[3:6])
names = sys.argv[6:]
failed, skipped = names[: names.index("--")], names[names.index("--") + 1 :]


def lines(path):
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def training(name):
    steps = [x for x in lines(out / name / "train.jsonl") if "tokens_per_second" in x]
    if not steps:
        return None
    later = steps[len(steps) // 3 :]
    return {
        "steps": len(steps),
        "tokens_per_second": statistics.median(x["tokens_per_second"] for x in later),
        "mfu": statistics.median(x["mfu"] for x in later),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
    }


gpu = [part.strip() for part in (out / "gpu").read_text().splitlines()[0].split(",")]
report = {
    "gpu": gpu[0],
    "driver": gpu[1],
    "memory": gpu[2],
    "commit": (programs / "commit").read_text().split("\n")[0] if (programs / "commit").is_file() else None,
    "programs": {p: hashlib.sha256((programs / p).read_bytes()).hexdigest() for p in ("gd", "operators")},
    "kernels": {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest()[:16]
        for p in sorted(pathlib.Path("kernels").glob("*/*"))
        if p.suffix in (".cu", ".cuh", ".h")
    },
    "seconds": seconds,
    "cases": cases,
    "passed": ran,
    "failed": failed,
    "skipped": skipped,
    "attention": json.loads((out / "attention.json").read_text()) if (out / "attention.json").is_file() else None,
    "training": {name: training(name) for name in ("throughput", "train")},
}
(out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
for name, run in report["training"].items():
    if run:
        print(
            f"{name}: {run['tokens_per_second']:.0f} tokens/s, MFU {100 * run['mfu']:.1f} %, "
            f"loss {run['first_loss']:.3f} to {run['last_loss']:.3f} in {run['steps']} steps"
        )
run = report["training"]["train"]
if run and not run["last_loss"] < run["first_loss"] - 0.5:
    print("the loss of the short run did not fall")
    sys.exit(1)
REPORT
(($? == 0)) || failed+=("report")
echo "${#ran[@]} steps passed, ${#failed[@]} failed, ${#skipped[@]} skipped in $SECONDS s; $out/report.json"
printf 'failed: %s\n' "${failed[@]+"${failed[@]}"}" | grep -v '^failed: $'
((${#failed[@]} == 0))
