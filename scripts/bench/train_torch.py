#!/usr/bin/env python3
"""Time the training steps of `gd train` and of the same model in PyTorch in turn, on the CPU.

Usage: scripts/bench/train_torch.py [--gd PROGRAM] [--models tiny,small,base] [--contexts 256,1024,..] [--threads 1,2]
                                [--steps N] [--rounds R] [--ours NAME,..] [--torch NAME,..] [--json]

A model has the shape of a preset and reads bytes; a step has the tokens of a micro-batch of the preset, in sequences of
the context, or one sequence if that is longer. In every round all contenders run one after the other, each in a process
of its own, so that other load of the machine affects all; the table has the medians over the rounds of the median tokens
per second of a run, the peak of the resident memory, and the ratio to the fastest mode of PyTorch.

PyTorch's model is what a user would write: embedding, RMSNorm, scaled_dot_product_attention with RoPE, SwiGLU, tied
output projection, clipped gradients and fused AdamW; eager or compiled, in f32 or in bf16 autocast. Ours are softmax
attention and selection (gd) in all heads, without and with Beacon, and the preset, in which few heads select, in f32 and
in the precision `auto`. All steps are as after the schedule of the preset. Build the program first, with
`cargo build --release`, and install PyTorch with `pip install torch`; torch.compile needs a C++ compiler.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = ROOT / "models" / "text" / "sample.txt"
# Steps of a run that are not measured: the first ones compile, fault pages in and fill caches.
WARM_UP = 3
TORCH = {
    "f32": (False, False),
    "f32 compiled": (False, True),
    "bf16": (True, False),
    "bf16 compiled": (True, True),
}
ALL_HEADS = {"model.gd.selecting_heads": "[]"}
BARE = {"model.gd.beacon": "null", "model.gd.qk_norm": "false", **ALL_HEADS}
OURS = {
    "softmax": {"model.gd.mechanism": '["softmax"]', **BARE},
    "softmax + Beacon": {"model.gd.mechanism": '["softmax"]', **ALL_HEADS},
    "gd": BARE,
    "gd + Beacon": ALL_HEADS,
    "the preset": {},
}
PRECISIONS = ["f32", "auto"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gd", default=ROOT / "target" / "release" / "gd", help="the program (default: %(default)s)")
    parser.add_argument("--models", default="tiny,small", help="presets (default: %(default)s)")
    parser.add_argument("--contexts", help="tokens of a sequence (default: those of the presets)")
    parser.add_argument("--threads", default="1,2", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--ours", default=",".join(OURS), help="(default: %(default)s)")
    parser.add_argument("--torch", default=",".join(TORCH), help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--run-torch", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for option, names, known in [("--ours", args.ours, OURS), ("--torch", args.torch, TORCH)]:
        if unknown := [name for name in names.split(",") if name not in known]:
            parser.error(f"{option} {unknown[0]}: expected {', '.join(known)}")
    if args.steps <= WARM_UP or args.rounds < 1:
        parser.error(f"--steps {args.steps} must be above {WARM_UP}, --rounds {args.rounds} at least 1")
    if not args.run_torch and not pathlib.Path(args.gd).is_file():
        parser.error(f"--gd {args.gd}: no such program (run `cargo build --release` first)")
    return args


def run(command: list[str], threads: int) -> str:
    env = {**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def run_gd(args: argparse.Namespace, case: dict, name: str, precision: str) -> tuple[float, float]:
    """The median tokens per second and the peak of the resident memory in MiB."""
    settings = {
        "model.max_position_embeddings": case["context"],
        "train.batch": case["batch"],
        "train.context": case["context"],
        "train.accumulation": 1,
        "train.tokenizer": '"bytes"',
        "train.precision": precision,
        "train.eval_every": 1000000,
        "train.save_every": 1000000,
        "train.select.candidates": "null",
        "train.select.hardness": 1,
        **OURS[name],
    }
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "run"
        command = [str(args.gd), "train", "--config", case["model"], "--data", str(TEXT), "--out", str(out)]
        # A longer run is stopped, so that it ends without an evaluation.
        command += ["--steps", str(args.steps + 1), "--stop-after", str(args.steps)]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        run(command, case["threads"])
        lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line][WARM_UP:]
    rate = statistics.median(line["tokens_per_second"] for line in steps)
    return rate, max(line["peak_mib"] for line in steps)


def train_torch(case: dict) -> None:
    """Trains and prints the median tokens per second and the peak of the resident memory in MiB."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    shape, batch, context = case["shape"], case["batch"], case["context"]
    width, heads, dim = shape["hidden_size"], shape["num_attention_heads"], shape["head_dim"]
    torch.manual_seed(0)
    torch.set_num_threads(case["threads"])
    frequencies = shape["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(context), frequencies)
    cos, sin = angles.cos(), angles.sin()

    def rotated(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            linear = lambda i, o: nn.Linear(i, o, bias=False)
            self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
            self.q, self.k, self.v = (linear(width, heads * dim) for _ in range(3))
            self.o = linear(heads * dim, width)
            inner = shape["intermediate_size"]
            self.gate, self.up, self.down = linear(width, inner), linear(width, inner), linear(inner, width)

        def forward(self, x):
            y = self.norm1(x)
            split = lambda t: t.view(batch, context, heads, dim).transpose(1, 2)
            q, k, v = split(self.q(y)), split(self.k(y)), split(self.v(y))
            y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).reshape(batch, context, heads * dim))
            y = self.norm2(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(shape["vocab_size"], width)
            nn.init.normal_(self.embedding.weight, std=width**-0.5)
            self.blocks = nn.ModuleList(Block() for _ in range(shape["num_hidden_layers"]))
            self.norm = nn.RMSNorm(width)

        def forward(self, ids, targets):
            x = self.embedding(ids)
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.embedding.weight)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))

    model = Model()
    step = torch.compile(model) if case["compiled"] else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    rates = []
    for _ in range(case["steps"]):
        starts = torch.randint(len(text) - context - 1, (batch,))
        rows = torch.stack([text[s : s + context + 1] for s in starts])
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["bf16"]):
            loss = step(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        rates.append(batch * context / (time.perf_counter() - started))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([statistics.median(rates[WARM_UP:]), peak_mib]))


def run_torch(args: argparse.Namespace, case: dict, name: str) -> tuple[float, float]:
    bf16, compiled = TORCH[name]
    case = {**case, "steps": args.steps, "bf16": bf16, "compiled": compiled}
    return tuple(json.loads(run([sys.executable, __file__, "--run-torch", json.dumps(case)], case["threads"])))


def cases(args: argparse.Namespace) -> list[dict]:
    found = []
    for model in args.models.split(","):
        recipe = json.loads((ROOT / "models" / f"{model}.json").read_text())
        tokens = recipe["train"]["batch"] * recipe["train"]["context"]
        contexts = args.contexts or str(recipe["train"]["context"])
        for context in map(int, contexts.split(",")):
            for threads in map(int, args.threads.split(",")):
                batch = max(1, tokens // context)
                case = {"model": model, "context": context, "batch": batch, "threads": threads}
                found.append({**case, "shape": {**recipe["model"], "vocab_size": 256}})
    return found


def main() -> int:
    args = parse()
    if args.run_torch:
        train_torch(json.loads(args.run_torch))
        return 0
    results = []
    for case in cases(args):
        title = f"{case['model']}, {case['batch']} x {case['context']} tokens, {case['threads']} threads"
        runs: dict[str, list] = {}
        for number in range(args.rounds):
            print(f"{title}: round {number + 1} of {args.rounds}", file=sys.stderr)
            for name in filter(None, args.torch.split(",")):
                runs.setdefault(f"PyTorch {name}", []).append(run_torch(args, case, name))
            for name in filter(None, args.ours.split(",")):
                for precision in PRECISIONS:
                    runs.setdefault(f"{name}, {precision}", []).append(run_gd(args, case, name, precision))
        medians = {name: [statistics.median(x) for x in zip(*values)] for name, values in runs.items()}
        torch = [value for name, value in medians.items() if name.startswith("PyTorch")]
        best = max((rate for rate, _ in torch), default=float("nan"))
        least = min((peak for _, peak in torch), default=float("nan"))
        for name, (rate, peak) in medians.items():
            result = {"case": title, "contender": name, "tokens_per_second": rate, "ratio": rate / best}
            results.append({**result, "peak_mib": peak, "memory_ratio": peak / least})
    if args.json:
        print(json.dumps(results, indent=1))
        return 0
    print("| case | contender | tokens/s | / best PyTorch | peak MiB | / least PyTorch |")
    print("|---|---|---:|---:|---:|---:|")
    for r in results:
        figures = f"{r['tokens_per_second']:,.0f} | {r['ratio']:.2f} | {r['peak_mib']:.0f} | {r['memory_ratio']:.2f}"
        print(f"| {r['case']} | {r['contender']} | {figures} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
