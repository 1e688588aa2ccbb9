#!/usr/bin/env python3
"""Time `gd generate` and llama.cpp in turn: the same weights, the same text, greedy, on the CPU.

Usage: scripts/bench/llama_cpp.py MODEL.gguf --text FILE [--gd PROGRAM] [--context 128,1024,4096] [--tokens N]
                                  [--dtype f32,f16] [--rounds R] [--k K]

MODEL.gguf is any llama model that `gd convert` reads. Both get its weights in each dtype: llama.cpp from a GGUF file
that this script writes, gd from a checkpoint folder, with softmax attention and with selection attention of --k keys
(untrained, so only its speed is meaningful). Rates are tokens/s, medians over the rounds; "reading" is the prompt up
to the first new token. The figures of llama.cpp are the timings that its server reports.

Needs `pip install xllamacpp gguf` (llama.cpp built for AVX2, and its file format).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, default=ROOT / "models/text/sample.txt", help="(default: %(default)s)")
    parser.add_argument("--gd", default=ROOT / "target" / "release" / "gd", help="the program (default: %(default)s)")
    parser.add_argument("--context", default="128,1024,4096", help="prompt tokens, nearly (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens (default: %(default)s)")
    parser.add_argument("--dtype", default="f32,f16", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--k", type=int, default=1, help="keys of a selecting head (default: %(default)s)")
    return parser.parse_args()


def write_gguf(source: pathlib.Path, target: pathlib.Path, dtype: str) -> None:
    """Writes the same model with its matrices in f32 or f16."""
    import gguf
    import numpy as np

    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.quantization_version"):
            continue
        if field.name == "general.file_type":
            writer.add_uint32(field.name, {"f32": 0, "f16": 1}[dtype])
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1] if array else None)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.astype(np.float16) if dtype == "f16" and values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_gd(args: argparse.Namespace, model: pathlib.Path, prompt: str) -> dict:
    command = [str(args.gd), "generate", str(model), "--device", "cpu", "--json", "--temperature", "0"]
    command += ["--max-tokens", str(args.tokens), "--prompt", prompt]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(command[:3])}: {done.stderr.strip()}")
    return json.loads(done.stdout)


CHILD = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, prompt, tokens, threads, context = sys.argv[1], sys.stdin.read(), *map(int, sys.argv[2:])
params.n_ctx, params.n_parallel = context, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
print("RESULT" + json.dumps(server.handle_completions(request)))
"""


def run_llama(model: pathlib.Path, prompt: str, tokens: int, threads: int, context: int) -> dict:
    command = [sys.executable, "-c", CHILD, str(model), str(tokens), str(threads), str(context)]
    done = subprocess.run(command, input=prompt, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    results = [line[6:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not results:
        sys.exit(f"error: llama.cpp: {done.stderr.strip()[-500:]}")
    return json.loads(results[0])


def main() -> None:
    args = parse()
    threads = int(os.environ.get("RAYON_NUM_THREADS", os.cpu_count() or 1))
    text = args.text.read_text()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for dtype in args.dtype.split(","):
            gguf_file, softmax, select = (folder / f"{dtype}{end}" for end in (".gguf", "-softmax", "-gd"))
            write_gguf(args.model, gguf_file, dtype)
            convert = [str(args.gd), "convert", str(args.model), "--dtype", dtype, "--json", "--out"]
            subprocess.run([*convert, str(softmax)], check=True, stdout=subprocess.DEVNULL)
            subprocess.run([*convert, str(select), "--attention", "gd", "--k", str(args.k)], check=True, stdout=subprocess.DEVNULL)
            for size in map(int, args.context.split(",")):
                # About as many characters as have this number of tokens.
                rate = run_gd(argparse.Namespace(gd=args.gd, tokens=1), softmax, text[:2000])["prompt_tokens"] / 2000
                prompt = text[: int(size / rate)]
                results: dict[str, list] = {"llama.cpp": [], "gd softmax": [], f"gd k={args.k}": []}
                for at in range(args.rounds):
                    print(f"{dtype}, {size} tokens: round {at + 1} of {args.rounds}", file=sys.stderr)
                    reply = run_llama(gguf_file, prompt, args.tokens, threads, size * 5 // 4 + args.tokens + 64)
                    times = reply["timings"]
                    results["llama.cpp"].append((times["prompt_n"], times["prompt_per_second"], times["predicted_per_second"]))
                    for name, model in (("gd softmax", softmax), (f"gd k={args.k}", select)):
                        timing = run_gd(args, model, prompt)
                        results[name].append((timing["prompt_tokens"], timing["prompt_tokens_per_second"], timing["tokens_per_second"]))
                base = [statistics.median(run[i] for run in results["llama.cpp"]) for i in (1, 2)]
                for name, runs in results.items():
                    reading, writing = (statistics.median(run[i] for run in runs) for i in (1, 2))
                    rows.append((dtype, runs[0][0], name, reading, writing, reading / base[0], writing / base[1]))
    print(f"{args.model.name} on {threads} threads, tokens/s, medians of {args.rounds} rounds\n")
    print("| weights | prompt tokens | program | reading | writing | reading / llama.cpp | writing / llama.cpp |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for dtype, size, name, reading, writing, by_reading, by_writing in rows:
        print(f"| {dtype} | {size} | {name} | {reading:.0f} | {writing:.1f} | {by_reading:.2f} | {by_writing:.2f} |")


if __name__ == "__main__":
    main()
