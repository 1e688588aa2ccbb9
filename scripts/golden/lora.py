#!/usr/bin/env python3
"""Makes the small adapters of tests/fixtures/lora and the logits of their models, as peft computes them.

    python3 -m venv venv && venv/bin/pip install torch transformers peft
    venv/bin/python scripts/golden/lora.py

One folder for each adapter of a checkpoint of tests/fixtures/llama, with random weights. `golden.safetensors` holds the
`logits` [N, V] of the base with the adapter for the text (`ids`) in the golden file of the base.
"""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
BASES, OUT = ROOT / "tests/fixtures/llama", ROOT / "tests/fixtures/lora"

ADAPTERS = {
    "llama": LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"),
    "mistral": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], use_rslora=True,
                          rank_pattern={"q_proj": 4}, lora_dropout=0.1, task_type="CAUSAL_LM"),
}


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(BASES / name, dtype=torch.float32)
        model = get_peft_model(base, config).eval()
        for parameter_name, weight in model.named_parameters():
            if "lora_B" in parameter_name:
                weight.data = torch.randn(weight.shape) * 0.2
        folder = OUT / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        # The place of the base on this machine.
        path = folder / "adapter_config.json"
        settings = json.loads(path.read_text())
        settings["base_model_name_or_path"] = f"tests/fixtures/llama/{name}"
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        ids = load_file(BASES / name / "golden.safetensors")["ids"].long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        save_file({"logits": logits.contiguous()}, folder / "golden.safetensors")
        print(f"{name}: {sum(p.numel() for n, p in model.named_parameters() if 'lora' in n)} parameters")


if __name__ == "__main__":
    main()
