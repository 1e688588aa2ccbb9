#!/usr/bin/env python3
"""Makes the small random checkpoints of tests/fixtures/llama and their logits, as transformers computes them.

    python3 -m venv venv && venv/bin/pip install torch transformers
    venv/bin/python scripts/golden/llama.py

One folder a family, each with another layout of file and config. `golden.safetensors` holds a text (`ids`
[N]) and its `logits` [N, V], computed in f64 from the stored weights.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

OUT = Path(__file__).resolve().parents[2] / "tests/fixtures/llama"
TEXT = b"The quick brown fox jumps over 13 lazy dogs, twice."
SHAPE = dict(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None)


def llama3(rope_theta):
    return dict(rope_type="llama3", rope_theta=rope_theta, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32)


# Config, dtype of the stored weights, maximum size of a shard.
FAMILIES = {
    "llama": (LlamaConfig(**SHAPE | dict(num_hidden_layers=3), attention_bias=True, mlp_bias=True,
                          tie_word_embeddings=True, rope_parameters=llama3(200.0)), torch.float32, "60KB"),
    "mistral": (MistralConfig(**SHAPE, sliding_window=8, tie_word_embeddings=False,
                              rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
                torch.float32, "1GB"),
    "qwen2": (Qwen2Config(**SHAPE, tie_word_embeddings=True, use_sliding_window=True, sliding_window=12,
                          max_window_layers=1, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
              torch.bfloat16, "1GB"),
    "qwen3": (Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=False,
                          rope_parameters=dict(rope_type="default", rope_theta=1e6)), torch.float16, "1GB"),
}


def fill(model):
    """Random weights that preserve the scale of activations, and gains and biases that differ from 1 and 0."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape)
        if weight.dim() == 2:
            weight.data = noise * (1.0 if "embed" in name else weight.shape[1] ** -0.5)
        else:
            weight.data = noise * 0.3 + (1.0 if "norm" in name else 0.0)


def as_older_versions(folder):
    """The config as transformers wrote it before version 5: rope_theta, rope_scaling, torch_dtype."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def bytes_tokenizer():
    """The 256 bytes as tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in printable)
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({alphabet[b]: b for b in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, (name, (config, dtype, shard)) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        folder = OUT / name
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fill(model)
        model.tie_weights()
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        if name == "llama":
            as_older_versions(folder)
        bytes_tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
        stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        ids = torch.tensor(list(TEXT))
        with torch.no_grad():
            logits = stored(ids[None]).logits[0]
        save_file({"ids": ids, "logits": logits.float()}, folder / "golden.safetensors")
        print(f"{name}: logits of {len(TEXT)} tokens, deviation {logits.std():.3f}, {stored.dtype} from {dtype}")


if __name__ == "__main__":
    main()
