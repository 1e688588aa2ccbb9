#!/usr/bin/env python3
"""Time `gd bench attention --device cuda:0` and PyTorch's attention in turn, on the same GPU.

Usage: scripts/bench/torch_gpu.py --gd PROGRAM [--shapes BxHxNxD,..] [--pass fwd,fwdbwd,decode] [--dtype bf16]
                                  [--rounds R] [--seconds S] [--json FILE]

PyTorch runs scaled_dot_product_attention with its cuDNN and its flash backend, each forced, and FlashAttention 3
where its package is installed. fwd runs under no_grad and causal, fwdbwd causal with the gradients of q, k and v,
decode with one query on N keys under no_grad. Both are warmed up; a measurement enqueues several runs and then waits for the
GPU. In every round each shape and pass is measured with all of them; the table has the medians over the rounds. No
round starts after S seconds. A backend that refuses a case is listed with the reason.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

PASSES = ["fwd", "fwdbwd", "decode"]
# Runs shorter than this many seconds are repeated within a measurement, as in `gd bench`.
MIN_MEASUREMENT_S = 0.02
OURS = "gd k=1,gd k=8,gd k=1 winner,gd k=1 certified,gd k=8 certified"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gd", required=True, help="the program, built with --features cuda")
    parser.add_argument(
        "--shapes",
        default="1x16x4096x64,1x16x4096x128,1x16x16384x64,1x16x16384x128",
        help="(default: %(default)s)",
    )
    parser.add_argument("--pass", dest="passes", default=",".join(PASSES), help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "f16"], help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=200.0, help="(default: %(default)s)")
    parser.add_argument("--only", default=OURS, help="contenders of gd bench (default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, help="a file for all medians")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} must be at least 1")
    if unknown := [name for name in args.passes.split(",") if name not in PASSES]:
        parser.error(f"--pass {unknown[0]}: expected {', '.join(PASSES)}")
    for text in args.shapes.split(","):
        sizes = text.split("x")
        if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            parser.error(f"--shapes {text}: expected BxHxNxD")
    if not pathlib.Path(args.gd).is_file():
        parser.error(f"--gd {args.gd}: no such program")
    return args


def run_gd(args: argparse.Namespace, shape: str, which: str) -> dict[str, float | str]:
    """Median seconds of every contender, or the reason why it was not run."""
    command = [args.gd, "bench", "attention", "--device", "cuda:0", "--json", "--dtype", args.dtype]
    command += ["--shapes", shape, "--pass", which, "--repeats", "3", "--only", args.only]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return {"gd": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    lines = json.loads(done.stdout)["results"]
    return {line["contender"]: line["skipped"] if line["median_s"] is None else line["median_s"] for line in lines}


def backends(torch) -> dict:
    """Forward functions (q, k, v, causal) by name; q [B, H, N, D]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend):
        def run(q, k, v, causal):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return run

    runs = {"torch cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION), "torch flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    try:
        from flash_attn_interface import flash_attn_func

        def third(q, k, v, causal):
            rows_first = [t.transpose(1, 2) for t in (q, k, v)]
            out = flash_attn_func(*rows_first, causal=causal)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        runs["FlashAttention 3"] = third
    except ImportError:
        pass
    return runs


def run_torch(torch, forward, dtype: str, shape: str, which: str) -> float | str:
    """Median seconds of a run, or the error."""
    batch, heads, length, dim = map(int, shape.split("x"))
    queries = 1 if which == "decode" else length
    kind = {"bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    gradient = which == "fwdbwd"
    q, k, v = (
        torch.randn(batch, heads, n, dim, device="cuda", dtype=kind, requires_grad=gradient)
        for n in (queries, length, length)
    )
    dy = torch.ones_like(q)

    def once():
        if not gradient:
            with torch.no_grad():
                return forward(q, k, v, which == "fwd")
        q.grad = k.grad = v.grad = None
        forward(q, k, v, True).backward(dy)

    def timed(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            once()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    try:
        timed(2)
        count = max(1, min(1000, int(MIN_MEASUREMENT_S / timed(2))))
        return statistics.median(timed(count) for _ in range(3))
    except RuntimeError as e:
        return str(e).strip().splitlines()[0]


def work(shape: str, which: str) -> float:
    """Operations of attention: two products over the visible pairs, and 2.5 times as many in the backward pass."""
    batch, heads, length, dim = map(int, shape.split("x"))
    pairs = length if which == "decode" else length * (length + 1) / 2
    return batch * heads * pairs * 4 * dim * (3.5 if which == "fwdbwd" else 1)


def main() -> int:
    args = parse()
    try:
        import torch
    except ImportError as e:
        print(f"PyTorch is missing: {e}", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU", file=sys.stderr)
        return 1
    began = time.monotonic()
    cases = [(which, shape) for shape in args.shapes.split(",") for which in args.passes.split(",")]
    seconds: dict = {case: {} for case in cases}
    refused: dict = {}
    rounds = 0
    while rounds < args.rounds and (rounds == 0 or time.monotonic() - began < args.seconds):
        for which, shape in cases:
            print(f"round {rounds + 1}: {which} {shape}", file=sys.stderr)
            measured = run_gd(args, shape, which)
            for name, forward in backends(torch).items():
                measured[name] = run_torch(torch, forward, args.dtype, shape, which)
                torch.cuda.empty_cache()
            for name, value in measured.items():
                if isinstance(value, str):
                    refused[which, shape, name] = value
                else:
                    seconds[which, shape].setdefault(name, []).append(value)
        rounds += 1
    print(f"{torch.cuda.get_device_name()}, {args.dtype}, PyTorch {torch.__version__}, medians of {rounds} rounds\n")
    print("| pass | shape | what | ms | attention TFLOP/s | fastest PyTorch / this |")
    print("|---|---|---|---:|---:|---:|")
    results = []
    for which, shape in cases:
        medians = {name: statistics.median(values) for name, values in seconds[which, shape].items()}
        theirs = [value for name, value in medians.items() if not name.startswith("gd")]
        for name, value in medians.items():
            ratio = min(theirs) / value if theirs else None
            rate = work(shape, which) / value / 1e12
            shown = "" if ratio is None else f"{ratio:.2f}"
            print(f"| {which} | {shape} | {name} | {1e3 * value:.4f} | {rate:.1f} | {shown} |")
            results.append({"pass": which, "shape": shape, "what": name, "seconds": value, "ratio": ratio})
    for (which, shape, name), reason in refused.items():
        print(f"not run: {which} {shape} {name}: {reason}")
        results.append({"pass": which, "shape": shape, "what": name, "not_run": reason})
    if args.json:
        report = {"dtype": args.dtype, "torch": torch.__version__, "rounds": rounds, "results": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    # Fails if no pass of gd was measured.
    return 0 if any(name.startswith("gd ") for case in cases for name in seconds[case]) else 1


if __name__ == "__main__":
    sys.exit(main())
