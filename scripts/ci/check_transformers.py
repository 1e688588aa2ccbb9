#!/usr/bin/env python3
"""Compares the models that the program saves with the results of Python's transformers for them.

    python3 -m venv venv && venv/bin/pip install torch transformers peft
    cargo build --release -p gd-model -p gd-cli --bins --examples
    venv/bin/python scripts/ci/check_transformers.py [target/release]

The fixtures of tests/fixtures/llama, saved again by `gd convert`, must load as the classes of their families
and give the same bits. Selecting models, trained for a few steps and converted, must load through the Python
files beside them and give the program's logits. Adapters that the program trains (`gd train --lora`) must load in peft,
on the models that they were trained on, and give the program's logits. Prints the greatest difference of each. `generate`
must give the tokens of `gd generate`, with a cache and without one, for one prompt and for a batch of prompts of different
lengths.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures/llama"
SMALL = ROOT / "crates/gd-model/tests/fixtures/small.json"
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
           "qwen3": "Qwen3ForCausalLM"}
BOUND = 1e-4
# The tokenizer of the trained models is that of bytes.
PROMPTS = ["It was", "A letter of ink, and then", "Words"]
NEW_TOKENS = 24
BARRIER = {"floor": 0.2, "margin": 2.0, "strength": 1.5, "entropy_trigger": 0.5, "slack": 0.5}
BEACON = {"conv_width": 4, "averages": 2, "prior": True, "protected": 2, "barrier": BARRIER}

# Changes of the block `gd` of tests/fixtures/small.json, by the name of the model.
SELECTING = {
    "as-it-is": {},
    "barrier-rounds": {"beacon": BEACON, "output_gate": True, "output_bias": True, "windows": [None, 9],
                       "select": {"candidates": 4, "rounds": 3, "threshold": 1.0, "tie": "last"}},
    "energy-gate": {"select": {"candidates": 2, "gate": {"energy": {"temperature": 0.5}}, "threshold": 0.8}},
    "threshold-by-length": {"windows": [None, 7],
                            "select": {"candidates": 2, "gate": {"energy": {"temperature": 0.5}}, "threshold": 0.8,
                                       "exclude_below": 0.2, "threshold_by_length": True}},
    "margin-gate": {"select": {"candidates": 4, "gate": {"margin": {"temperature": 0.5}}, "threshold": 0.1,
                               "exclude_below": 0.4, "picks": 2}},
    "coherence-gate": {"qk_norm": False, "select": {"gate": "coherence", "estimator": "dense", "rounds": 2}},
    "passage": {"beacon": None, "select": {"gate": "coherence", "coherence": "passage", "norm_prior": True}},
    "blend-dot": {"beacon": BEACON | {"averages": 1, "conv_width": 1},
                  "select": {"score": "dot", "estimator": "blend", "temperature": 0.7, "threshold": 2.0}},
    "softmax": {"mechanism": ["gd", "softmax"]},
    "induction-heads": {"mechanism": ["gd", "softmax"], "induction_heads": [2, 2]},
}


def run(*args):
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, args))}: {done.stderr.strip()}")
    return done.stdout


def load(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def families(gd, work):
    """The families' fixtures, saved again by the program."""
    for family, expected in CLASSES.items():
        folder = work / family
        run(gd, "convert", FIXTURES / family, "--out", folder)
        before, after = load(FIXTURES / family), load(folder)
        assert type(after).__name__ == expected, type(after)
        ids = load_file(FIXTURES / family / "golden.safetensors")["ids"].tolist()
        assert torch.equal(logits(before, ids), logits(after, ids)), family
        print(f"{family}: {expected}, the same bits")


def shake(folder, halved):
    """Changes every weight by a fraction of its size, so that no part of the model has its initial value."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in sorted(tensors.items()):
        size = 0.15 if tensor.dim() == 1 else max(0.2 * tensor.std().item(), 0.5 * tensor.shape[-1] ** -0.5)
        tensors[name] = tensor + size * torch.randn(tensor.shape)
        # Equal weights of query and key: the only ones for which the modes of coherence differ.
        if halved and name.endswith("gd.alpha"):
            tensors[name] = torch.zeros(tensor.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def compare(program, folder, work):
    """The greatest difference of logits between the program and the Python files in the folder."""
    out = work / "logits.safetensors"
    run(program, folder, work / "text.txt", out)
    found = load_file(out)
    model = load(folder, trust_remote_code=True)
    assert type(model).__name__ == "GdForCausalLM", type(model)
    return model, found["ids"], (logits(model, found["ids"].tolist()) - found["logits"]).abs().max().item()


def generating(gd, model, folder):
    """Compares greedy generations with those of the program. Returns the number of compared tokens, and the greatest difference
    between logits with a cache and without one."""
    prompts = [run_json(gd, folder, prompt) for prompt in PROMPTS]
    ids, expected = [p["ids"] for p in prompts], [p["token_ids"] for p in prompts]
    count = 0

    def compare_tokens(found, what):
        nonlocal count
        assert found == expected, (folder.name, what, found, expected)
        count += sum(map(len, found))

    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    for use_cache in (False, True):
        one = [model.generate(torch.tensor([i]), use_cache=use_cache, **options)[0, len(i):].tolist() for i in ids]
        compare_tokens(one, f"one prompt, use_cache={use_cache}")
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(i)) + i for i in ids])
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
        batch = model.generate(padded, attention_mask=mask, use_cache=use_cache, **options)[:, width:].tolist()
        compare_tokens(batch, f"batch, use_cache={use_cache}")
    # Beams reorder the cache: the score of each is the mean log-probability of its tokens, computed here without a cache.
    beams = model.generate(padded, attention_mask=mask, num_beams=3, return_dict_in_generate=True, output_scores=True,
                           **options)
    mask = torch.cat([mask, torch.ones(len(ids), NEW_TOKENS, dtype=torch.long)], 1)
    with torch.no_grad():
        logs = model(beams.sequences, attention_mask=mask).logits[:, width - 1:-1].log_softmax(-1)
    scores = logs.gather(2, beams.sequences[:, width:, None]).mean((1, 2))
    off = (scores - beams.sequences_scores).abs().max().item()
    # Parts of one sequence through the cache.
    whole, cache = logits(model, ids[-1]), None
    with torch.no_grad():
        for start, end in ((0, 3), (3, 4), (4, len(ids[-1]))):
            output = model(torch.tensor([ids[-1][start:end]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            off = max(off, (output.logits[0] - whole[start:end]).abs().max().item())
    return count, off


def run_json(gd, folder, prompt):
    """What the program generates greedily, and the ids of the prompt."""
    args = ("generate", folder, "--prompt", prompt, "--max-tokens", NEW_TOKENS, "--temperature", 0, "--json")
    return json.loads(run(gd, *args)) | {"ids": list(prompt.encode())}


def selecting(gd, program, work):
    """Models that select: trained here, and converted from another family."""
    small, worst = json.loads(SMALL.read_text()), 0.0
    for name, changes in SELECTING.items():
        config = json.loads(json.dumps(small))
        block = config["model"]["gd"]
        block |= {key: value for key, value in changes.items() if key != "select"}
        block["select"] |= changes.get("select", {})
        config["model"]["num_key_value_heads"] = 1
        (work / "config.json").write_text(json.dumps(config))
        run(gd, "train", "--config", work / "config.json", "--out", work / "run")
        run(gd, "convert", work / "run", "--out", work / name)
        shake(work / name, name == "passage")
        model, ids, off = compare(program, work / name, work)
        worst = max(worst, off)
        steps, cached = generating(gd, model, work / name)
        worst = max(worst, cached)
        print(f"{name}: off by {off:.1e}, {steps} generated tokens equal, logits with the cache off by {cached:.1e}")
    for family in CLASSES:
        for score in ("dot", "energy"):
            folder = work / f"{family}-{score}"
            run(gd, "convert", FIXTURES / family, "--attention", "gd", "--k", 4, "--score", score, "--out", folder)
            _, _, off = compare(program, folder, work)
            worst = max(worst, off)
            print(f"{family}, 4 keys by {score}: off by {off:.1e}")
    return worst


def adapters(gd, program, work):
    """Adapters of models of other families, of different ranks and projections, and of a selecting model."""
    worst, text = 0.0, work / "text.txt"
    bases = {family: (FIXTURES / family, {}) for family in CLASSES}
    bases["selecting"] = (work / "barrier-rounds", {"trust_remote_code": True})
    projections = ["all-linear", "q_proj,v_proj", "down_proj", "all-linear", "all-linear"]
    for (name, (base, options)), targets in zip(bases.items(), projections):
        folder, lora = work / f"{name}-adapter", f"r=3,alpha=5,dropout=0.1,targets={targets}"
        run(gd, "train", "--from", base, "--data", text, "--lora", lora, "--steps", 5, "--set", "train.lr.peak=0.02",
            "--set", "train.batch=1", "--set", "train.context=32", "--set", "train.valid_fraction=0", "--out", folder)
        out = work / "adapted.safetensors"
        run(program, folder, text, out)
        found = load_file(out)
        model = PeftModel.from_pretrained(load(base, **options), folder).eval()
        ids = found["ids"].tolist()
        adapted = logits(model, ids)
        with model.disable_adapter():
            moved = (logits(model, ids) - adapted).abs().max().item()
        assert moved > 0.01, f"{name}: the adapter moves logits by {moved}"
        off = (adapted - found["logits"]).abs().max().item()
        # The program adds the adapter to the stored weights in f32.
        worst = max(worst, off)
        print(f"{name}, adapter of {targets}: off by {off:.1e}, moved by {moved:.2f}")
    return worst


def refusals(work):
    """A config with a part that the Python files do not have."""
    path = work / "as-it-is" / "config.json"
    config = json.loads(path.read_text())
    config["gd"]["select"]["colour"] = 1
    path.write_text(json.dumps(config))
    try:
        load(path.parent, trust_remote_code=True)
    except ValueError as e:
        assert "gd.select.colour is not implemented" in str(e), e
        return
    sys.exit("an unknown key was accepted")


def main():
    built = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "target/release"
    gd, program = built / "gd", built / "examples/logits"
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "text.txt").write_text("All work is made of words, and words of letters; letters of ink.")
        families(gd, work)
        worst = max(selecting(gd, program, work), adapters(gd, program, work))
        refusals(work)
    print(f"greatest difference {worst:.1e}, at most {BOUND} allowed")
    if not worst <= BOUND:
        sys.exit(1)


if __name__ == "__main__":
    main()
