"""gliner: an encoder whose folder has an adapter; training of the adapter, entities found, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _client import adapter, bert, saved, sentences, some, write

# isort: split

import torch
from gliner import GLiNER
from gliner.config import GLiNERConfig

from peft import LoraConfig

LABELS = ["w5", "w6"]


def numbers(room: Path) -> dict[str, Any]:
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value", "dense"])
    backbone = adapter(bert(cls="BertModel"), config, room / "backbone")
    saved(bert(cls="BertModel"), room / "backbone")
    torch.manual_seed(1)
    model = GLiNER.from_config(GLiNERConfig(model_name=backbone, hidden_size=32, max_width=3, max_len=32, dropout=0.0))
    found: dict[str, Any] = {"before": entities(model)}
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name or "prompt_rep_layer" in name)
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "dataloader_num_workers": 0, "logging_steps": 1}
    trainer = model.train_model(examples(), None, output_dir=room / "out", learning_rate=1e-2, warmup_ratio=0.0, save_steps=100, **settings)
    found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    found["after"] = entities(model)
    found["adapter"] = {name: some(weight, 6) for name, weight in sorted(trained(model).items())}
    model.save_pretrained(room / "saved")
    found["loaded"] = entities(GLiNER.from_pretrained(room / "saved"))
    return found


def entities(model: GLiNER) -> list[Any]:
    """Return each span of three sentences with its label and score."""
    rows = model.inference(sentences(3), LABELS, threshold=0.0, flat_ner=False, multi_label=True)
    return [[[entity["text"], entity["label"], entity["score"]] for entity in row] for row in rows]


def examples() -> list[dict[str, Any]]:
    """Return sentences whose first word is an entity of one or the other label."""
    return [{"tokenized_text": text.split(), "ner": [[0, 0, LABELS[index % 2]]]} for index, text in enumerate(sentences(24))]


def trained(model: GLiNER) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


if __name__ == "__main__":
    write(numbers)
