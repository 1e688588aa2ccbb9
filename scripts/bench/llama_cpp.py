#!/usr/bin/env python3
"""Time `gd generate` and llama.cpp in turn: the same weights, the same text, greedy, on the CPU.

Usage: scripts/bench/llama_cpp.py MODEL --text FILE [--gd PROGRAM] [--context 128,1024,4096] [--tokens N]
                                  [--type q4_1,q8_0,f16] [--threads 1,2] [--rounds R] [--k K]

MODEL is any softmax model of the Llama family that `gd convert` reads, a GGUF file for f32 and f16. Both programs get its
weights in each type: q8_0 and the like as one GGUF file that `gd convert --quantize` writes; in f32 and f16 llama.cpp gets
a GGUF file that this script writes, and gd a checkpoint folder. gd runs with softmax attention, and with selection attention
of --k keys (untrained, so only its speed is meaningful).

Rates are tokens/s, medians over the rounds; "reading" is the prompt up to the first new token. Memory is the greatest
resident memory of a process, for llama.cpp without that of Python before the model is loaded. "Start" is the time from the
start of gd, or the call that loads the model in llama.cpp, up to the first new token.

Needs `pip install xllamacpp gguf` (llama.cpp built for AVX2, and its file format).
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LLAMA = "llama.cpp"
COLUMNS = ("reading", "writing", "MiB", "start s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, default=ROOT / "models/text/sample.txt", help="(default: %(default)s)")
    parser.add_argument("--gd", default=ROOT / "target" / "release" / "gd", help="the program (default: %(default)s)")
    parser.add_argument("--context", default="128,1024,4096", help="prompt tokens, nearly (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens (default: %(default)s)")
    parser.add_argument("--type", default="q4_1,q8_0,f16,f32", help="types of the weights (default: %(default)s)")
    parser.add_argument("--threads", default=str(os.cpu_count() or 1), help="(default: %(default)s)")
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


def models(args: argparse.Namespace, folder: pathlib.Path, kind: str) -> dict[str, pathlib.Path]:
    """The models of one type by contender."""
    convert = [str(args.gd), "convert", str(args.model), "--json", "--out"]
    select = ["--attention", "gd", "--k", str(args.k)]

    def converted(name: str, *flags: str) -> pathlib.Path:
        subprocess.run([*convert, str(folder / name), *flags], check=True, stdout=subprocess.DEVNULL)
        return folder / name

    if kind in ("f32", "f16"):
        # Not in this process: Linux counts its greatest memory as that of the programs that it starts.
        writer = multiprocessing.Process(target=write_gguf, args=(args.model, folder / f"{kind}.gguf", kind))
        writer.start()
        writer.join()
        if writer.exitcode != 0:
            sys.exit(f"error: {kind}.gguf was not written")
        softmax = converted(f"{kind}-softmax", "--dtype", kind)
        return {LLAMA: folder / f"{kind}.gguf", "softmax": softmax, f"k = {args.k}": converted(f"{kind}-gd", "--dtype", kind, *select)}
    softmax = converted(f"{kind}.gguf", "--quantize", kind)
    return {LLAMA: softmax, "softmax": softmax, f"k = {args.k}": converted(f"{kind}-gd.gguf", "--quantize", kind, *select)}


def finish(process: subprocess.Popen, what: str) -> tuple[str, float]:
    """The output of a process, and its greatest resident memory in MiB."""
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"error: {what}: exit code {process.returncode}")
    return output, usage.ru_maxrss / 1024


def run_gd(program: str, model: pathlib.Path, prompt: str, tokens: int, threads: int) -> tuple:
    command = [str(program), "generate", str(model), "--device", "cpu", "--json", "--temperature", "0"]
    command += ["--max-tokens", str(tokens), "--prompt", prompt]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    output, memory = finish(process, " ".join(command[:3]))
    wall, reply = time.perf_counter() - begin, json.loads(output)
    start = wall - (len(reply["token_ids"]) - 1) / reply["tokens_per_second"]
    return reply["prompt_tokens"], reply["prompt_tokens_per_second"], reply["tokens_per_second"], memory, start


CHILD = """
import json, resource, sys, time, xllamacpp
def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
params = xllamacpp.CommonParams()
params.model.path, prompt, tokens, threads, context = sys.argv[1], sys.stdin.read(), *map(int, sys.argv[2:])
params.n_ctx, params.n_parallel = context, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
before, begin = memory(), time.perf_counter()
server = xllamacpp.Server(params)
loaded = time.perf_counter() - begin
request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
times = server.handle_completions(request)["timings"]
print("RESULT" + json.dumps([times, memory() - before, loaded]))
"""


def run_llama(model: pathlib.Path, prompt: str, tokens: int, threads: int, context: int) -> tuple:
    command = [sys.executable, "-c", CHILD, str(model), str(tokens), str(threads), str(context)]
    done = subprocess.run(command, input=prompt, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    results = [line[6:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not results:
        sys.exit(f"error: llama.cpp: {done.stderr.strip()[-500:]}")
    times, memory, loaded = json.loads(results[0])
    start = loaded + times["prompt_ms"] / 1000
    return times["prompt_n"], times["prompt_per_second"], times["predicted_per_second"], memory, start


def main() -> None:
    args = parse()
    text = args.text.read_text()
    print(f"{args.model.name}, medians of {args.rounds} rounds\n")
    print("| weights | threads | prompt | program | " + " | ".join(COLUMNS) + " | relative to llama.cpp |", flush=True)
    print("|---|---:|---:|---|" + "---:|" * (len(COLUMNS)) + "---|", flush=True)
    for kind in args.type.split(","):
        with tempfile.TemporaryDirectory() as folder:
            paths = models(args, pathlib.Path(folder), kind)
            # About as many characters as have this number of tokens.
            rate = run_gd(args.gd, paths["softmax"], text[:2000], 2, 1)[0] / 2000
            for threads in map(int, args.threads.split(",")):
                for size in map(int, args.context.split(",")):
                    prompt = text[: int(size / rate)]
                    runs: dict[str, list] = {name: [] for name in paths}
                    for _ in range(args.rounds):
                        for name, model in paths.items():
                            room = size * 5 // 4 + args.tokens + 64
                            run = run_llama(model, prompt, args.tokens, threads, room) if name == LLAMA else run_gd(args.gd, model, prompt, args.tokens, threads)
                            runs[name].append(run)
                    medians = {name: [statistics.median(run[i] for run in all_runs) for i in range(5)] for name, all_runs in runs.items()}
                    for name, (count, *values) in medians.items():
                        ratios = ", ".join(f"{value / base:.2f}" for value, base in zip(values, medians[LLAMA][1:]))
                        reading, writing, memory, start = values
                        print(f"| {kind} | {threads} | {count:.0f} | {name} | {reading:.0f} | {writing:.1f} | {memory:.0f} | {start:.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
