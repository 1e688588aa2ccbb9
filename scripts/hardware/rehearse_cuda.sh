#!/usr/bin/env bash
# Runs the programs that scripts/hardware/nvidia_gpu.sh --build makes on a machine without a GPU, with the driver of
# scripts/hardware/host_driver.sh: doctor, the operators' tests, training, resumption, evaluation and generation, as
# compute capability 8.0 and 9.0, and compares them with the CPU. It measures no times, and it does not run the compiled
# CUDA code.
#
# Usage: scripts/hardware/rehearse_cuda.sh [DIR [DRIVER]]   (default: target/nvidia-gpu, target/host-driver)
#
# CUDA_HOME names the toolkit. Takes about ten minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
dir="$(cd "${1:-target/nvidia-gpu}" && pwd)"
driver="${2:-target/host-driver}"
[[ -e "$driver/libcuda.so.1" ]] || scripts/hardware/host_driver.sh "$driver" >/dev/null
LD_LIBRARY_PATH="$(cd "$driver" && pwd):$CUDA_HOME/lib64"
export LD_LIBRARY_PATH
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
gd="$dir/gd"
head -c 4000 models/text/sample.txt >"$out/text"

# train DEVICE PRECISION RUN [FLAG..]: further flags go to `gd train`
train() {
    local device="$1" precision="$2" run="$3"
    shift 3
    "$gd" train --device "$device" --config crates/gd-model/tests/fixtures/small.json --data "$out/text" --steps 6 \
        --seed 3 --set "train.precision=\"$precision\"" --out "$out/$run" "$@" >"$out/$run.log" 2>&1 ||
        { tail -n 5 "$out/$run.log" >&2; return 1; }
}
# compare CPU_RUN CUDA_RUN BOUND: compares the losses of six steps and of the validation text in two runs, and the text
# that the model of the second one generates on the CPU and on the device.
compare() {
    python3 - "$out/$1/train.jsonl" "$out/$2/train.jsonl" "$3" <<'COMPARE'
import json
import sys

runs = [[json.loads(line) for line in open(path)] for path in sys.argv[1:3]]
cpu, cuda = ([x["loss"] for x in run if x.get("loss") is not None] for run in runs)
largest = max(abs(a - b) / a for a, b in zip(cpu, cuda))
print(f"{len(cuda)} losses, differences of at most {largest:.1e}, from {cuda[0]:.4f} to {cuda[-1]:.4f}")
sys.exit(not (len(cpu) == len(cuda) == 7 and largest < float(sys.argv[3]) and cuda[-1] < cuda[0] - 0.5))
COMPARE
    for device in cpu cuda:0; do
        "$gd" eval --device "$device" "$out/$2" --data "$out/text" | tail -n 1
        "$gd" generate --device "$device" "$out/$2" --prompt "The " --max-tokens 12 --temperature 0 \
            >"$out/$2.${device%:*}"
    done
    cmp "$out/$2.cpu" "$out/$2.cuda"
}

for precision in f32 bf16; do
    train cpu "$precision" "cpu-$precision"
done
for compute in 80 90; do
    export GD_DRIVER_COMPUTE="$compute" GD_DRIVER_LOG="$out/calls-$compute"
    echo "== compute capability $compute"
    "$gd" doctor --device cuda:0 | grep -E 'cuda:|learn'
    GD_SANITIZE=1 "$dir/operators" | grep -E '^test result|FAILED|panicked'
    for precision in f32 bf16; do
        run="cuda-$compute-$precision"
        train cuda:0 "$precision" "$run" --stop-after 3
        "$gd" train --device cuda:0 --resume "$out/$run" >>"$out/$run.log" 2>&1
        compare "cpu-$precision" "$run" "$([[ $precision == f32 ]] && echo 1e-5 || echo 5e-3)"
    done
done
echo "== the script of the larger models"
mkdir "$out/bin" "$out/quality"
printf '#!/bin/sh\necho "no GPU, 0, 0 MiB"\n' >"$out/bin/nvidia-smi"
chmod +x "$out/bin/nvidia-smi"
cp "$gd" "$out/quality/gd"
cp -r "$out/text" "$out/quality/data"
PATH="$out/bin:$PATH" QUALITY_CONFIG=crates/gd-model/tests/fixtures/small.json QUALITY_SECONDS=1 QUALITY_TASKS= \
    scripts/hardware/quality_gpu.sh "$out/quality" "$out/quality/out" | grep -E '^\| (gd|softmax|beacon)'
echo "the most frequent calls on 9.0:"
awk '{ n[$1] += $2 } END { for (k in n) print n[k], k }' "$out/calls-90" | sort -rn | sed -n '1,12p'
