#!/usr/bin/env python3
"""Time `gd bench attention` and PyTorch's scaled_dot_product_attention in turn, on the CPU.

Usage: scripts/bench/torch_cpu.py [--gd PROGRAM] [--shapes BxHxNxD,..] [--pass fwd,fwdbwd,decode] [--rounds R]
                              [--repeats R] [--only NAME,..] [--seed S]

In every round each shape and pass is measured with both, so that other load of the machine affects both; the
table has the medians over the rounds. Both get f32 and the same number of threads:
RAYON_NUM_THREADS, or the number of CPUs. PyTorch runs fwd under no_grad and causal, fwdbwd causal with the
gradients of q, k and v, and decode with one query on N keys under no_grad. Build the program first, with
`cargo build --release`, and install PyTorch with `pip install torch`.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PASSES = ["fwd", "fwdbwd", "decode"]
# Runs shorter than this many seconds are repeated within a measurement, as in `gd bench`.
MIN_MEASUREMENT_S = 0.02


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gd", default=ROOT / "target" / "release" / "gd", help="the program (default: %(default)s)")
    parser.add_argument("--shapes", default="1x8x4096x64,1x8x4096x128", help="(default: %(default)s)")
    parser.add_argument("--pass", dest="passes", default=",".join(PASSES), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each in a round (default: %(default)s)")
    parser.add_argument("--only", default="gd k=1,gd k=8,gd k=1 certified,gd k=8 certified", help="contenders of gd bench (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.rounds < 1 or args.repeats < 1:
        parser.error(f"--rounds {args.rounds} and --repeats {args.repeats} must be at least 1")
    if unknown := [name for name in args.passes.split(",") if name not in PASSES]:
        parser.error(f"--pass {unknown[0]}: expected {', '.join(PASSES)}")
    for text in args.shapes.split(","):
        sizes = text.split("x")
        if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            parser.error(f"--shapes {text}: expected BxHxNxD")
    if not pathlib.Path(args.gd).is_file():
        parser.error(f"--gd {args.gd}: no such program (run `cargo build --release` first)")
    return args


def run_gd(args: argparse.Namespace, shape: str, which: str, threads: int) -> dict[str, float]:
    """Median seconds of every contender."""
    command = [str(args.gd), "bench", "attention", "--device", "cpu", "--json", "--seed", str(args.seed)]
    command += ["--shapes", shape, "--pass", which, "--repeats", str(args.repeats), "--only", args.only]
    done = subprocess.run(
        command, env={**os.environ, "RAYON_NUM_THREADS": str(threads)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    lines = json.loads(done.stdout)["results"]
    return {line["contender"]: line["median_s"] for line in lines if line["median_s"] is not None}


def attention(torch, shape: str, which: str, seed: int):
    """A function that runs PyTorch's attention once."""
    batch, heads, length, dim = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(seed)
    queries = 1 if which == "decode" else length
    rows = [queries, length, length, queries]
    q, k, v, dy = (torch.randn(batch, heads, n, dim, generator=generator) for n in rows)
    sdpa, causal = torch.nn.functional.scaled_dot_product_attention, which != "decode"

    def forward():
        with torch.no_grad():
            return sdpa(q, k, v, is_causal=causal).flatten()[0].item()

    def both():
        for t in (q, k, v):
            t.grad = None
        sdpa(q, k, v, is_causal=True).backward(dy)
        return q.grad.flatten()[0].item()

    if which == "fwdbwd":
        for t in (q, k, v):
            t.requires_grad_()
        return both
    return forward


def timed(run, count: int) -> float:
    """Seconds of one of `count` runs."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def run_torch(run, repeats: int) -> float:
    """Median seconds, after a warm-up."""
    once = min(timed(run, 1), timed(run, 1))
    count = max(1, min(1000, int(MIN_MEASUREMENT_S / once)))
    return statistics.median(timed(run, count) for _ in range(repeats))


def main() -> int:
    args = parse()
    try:
        import torch
    except ImportError as e:
        print(f"PyTorch is missing ({e}): install it with `pip install torch`", file=sys.stderr)
        return 1
    threads = int(os.environ.get("RAYON_NUM_THREADS") or os.cpu_count() or 1)
    torch.set_num_threads(threads)
    cases = [(which, shape) for shape in args.shapes.split(",") for which in args.passes.split(",")]
    ours = {case: {} for case in cases}
    theirs = {case: [] for case in cases}
    for number in range(args.rounds):
        for which, shape in cases:
            print(f"round {number + 1} of {args.rounds}: {which} {shape}", file=sys.stderr)
            for name, seconds in run_gd(args, shape, which, threads).items():
                ours[which, shape].setdefault(name, []).append(seconds)
            theirs[which, shape].append(run_torch(attention(torch, shape, which, args.seed), args.repeats))
    print(f"gd and PyTorch {torch.__version__} on {threads} threads, medians of {args.rounds} rounds\n")
    print("| pass | shape | ours | ours ms | torch ms | torch / ours |")
    print("|---|---|---|---:|---:|---:|")
    for which, shape in cases:
        torch_s = statistics.median(theirs[which, shape])
        for name, seconds in ours[which, shape].items():
            our_s = statistics.median(seconds)
            cells = [which, shape, name, f"{1e3 * our_s:.3f}", f"{1e3 * torch_s:.3f}", f"{torch_s / our_s:.2f}"]
            print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
