"""mergekit: a merge of models with LoRA folders (`base+adapter`), and `mergekit-extract-lora`, whose folder is loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _client import adapter, ids, llama, saved, some, weights, write

# isort: split

import torch
from click.testing import CliRunner
from mergekit.scripts.extract_lora import main as extract_lora
from mergekit.scripts.run_yaml import main as merge
from transformers import AutoModelForCausalLM

from peft import LoraConfig, PeftModel

MERGE = """
models:
  - {{model: {base}+{first}, parameters: {{weight: 0.7}}}}
  - {{model: {base}+{second}, parameters: {{weight: 0.3}}}}
merge_method: linear
dtype: float32
"""


def numbers(room: Path) -> dict[str, Any]:
    base = saved(llama(), room / "base")
    folders = {
        "first": adapter(llama(), lora(target_modules=["q_proj", "v_proj", "down_proj"]), room / "first", base=base),
        "second": adapter(llama(), lora(target_modules="all-linear", use_rslora=True), room / "second", base=base),
    }
    (room / "merge.yaml").write_text(MERGE.format(base=base, **folders))
    call(merge, room / "merge.yaml", room / "merged", "--lora-merge-cache", room / "cache", "--lora-merge-dtype", "float32")
    extract = ("--model", room / "merged", "--base-model", base, "--out-path", room / "extracted", "--max-rank", "6")
    call(extract_lora, *extract)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), room / "extracted")
    return {
        "merged file": weights(room / "merged" / "model.safetensors"),
        "merged": logits(AutoModelForCausalLM.from_pretrained(room / "merged")),
        "extracted": logits(model),
        "extracted and merged": logits(model.merge_and_unload()),
    }


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)


def call(command: Any, *arguments: Any) -> None:
    CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def logits(model: Any) -> list[float]:
    with torch.no_grad():
        return some(model.eval()(input_ids=ids()).logits)


if __name__ == "__main__":
    write(numbers)
