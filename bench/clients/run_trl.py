"""trl: `SFTTrainer` and `DPOTrainer` with `peft_config`, what they log, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _client import ids, llama, saved, sentences, some, tokenizer, weights, write

# isort: split

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig

TRAINING = {"max_steps": 5, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2, "seed": 3}
PRECISION = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}
TEXTS = sentences(40)


def numbers(room: Path) -> dict[str, Any]:
    base = saved(llama(), room / "base")
    lora = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return {
        "sft": sft(room / "sft", base, LoraConfig(**lora)),
        "sft, prompt": sft(room / "prompt", base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        "dpo": dpo(room / "dpo", base, LoraConfig(**lora)),
    }


def sft(out: Path, base: str, config: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    trainer = SFTTrainer(
        base,
        args=SFTConfig(output_dir=str(out), max_length=16, dataset_text_field="text", **TRAINING, **PRECISION),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(),
        peft_config=config,
    )
    return trained(trainer, out)


def dpo(out: Path, base: str, config: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    rows = {"prompt": TEXTS[:12], "chosen": [f" {text}" for text in TEXTS[12:24]], "rejected": [f" {text}" for text in TEXTS[24:36]]}
    trainer = DPOTrainer(
        base,
        args=DPOConfig(output_dir=str(out), max_length=32, **TRAINING, **PRECISION),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=config,
    )
    return trained(trainer, out)


def trained(trainer: Any, out: Path) -> dict[str, Any]:
    trainer.train()
    trainer.save_model(str(out))
    timed = ("runtime", "per_second")
    logs = [{name: value for name, value in entry.items() if not any(word in name for word in timed)} for entry in trainer.state.log_history]
    loaded = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        logits = loaded(input_ids=ids()).logits
    return {"logs": logs, "file": weights(out / "adapter_model.safetensors"), "logits": some(logits)}


if __name__ == "__main__":
    write(numbers)
