"""llamafactory: `run_exp` (SFT; LoRA, DoRA, PiSSA, saved embeddings; resumed; on top of a merged adapter) and `export_model`, on a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _client import ids, llama, saved, sentences, some, stand_in, weights, write

stand_in("torchaudio")  # imported at the top of its data module, used for audio alone; the index has none for this build of torch

# isort: split

import torch
from llamafactory.train.tuner import export_model, run_exp
from transformers import AutoModelForCausalLM

TRAINING = {
    "stage": "sft", "do_train": True, "dataset": "tiny", "cutoff_len": 32, "template": "empty", "overwrite_cache": True, "max_steps": 5,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 5, "seed": 3, "report_to": "none",
    "preprocessing_num_workers": 1, "use_cpu": True,
}  # fmt: skip
LORA = {"finetuning_type": "lora", "lora_target": "all", "lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0.1}
EXPORT = {"template": "empty", "finetuning_type": "lora", "export_device": "cpu", "infer_dtype": "float32"}


def numbers(room: Path) -> dict[str, Any]:
    base = saved(llama(), room / "base")
    rows = [{"instruction": first, "input": "", "output": second} for first, second in zip(sentences(24), reversed(sentences(24)), strict=True)]
    (room / "tiny.json").write_text(json.dumps(rows))
    (room / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "tiny.json"}}))
    common = {"model_name_or_path": base, "dataset_dir": str(room), "trust_remote_code": False, **TRAINING}
    runs = {
        "lora": {**LORA},
        "dora, rslora": {**LORA, "use_dora": True, "use_rslora": True},
        "pissa": {**LORA, "pissa_init": True, "pissa_iter": -1},
        "embeddings": {**LORA, "lora_target": "q_proj,v_proj", "additional_target": "embed_tokens,lm_head"},
        "resumed": {**LORA, "adapter_name_or_path": str(room / "lora")},
        "on top": {**LORA, "adapter_name_or_path": str(room / "lora"), "create_new_adapter": True},
    }
    found = {name: trained({**common, **settings}, room / name) for name, settings in runs.items()}
    export_model({"model_name_or_path": base, "adapter_name_or_path": str(room / "lora"), "export_dir": str(room / "export"), **EXPORT})
    found["export"] = {"file": weights(room / "export" / "model.safetensors"), "logits": logits(room / "export")}
    return found


def trained(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    run_exp({**settings, "output_dir": str(out)})
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {"losses": [entry["loss"] for entry in logs if "loss" in entry], "file": weights(out / "adapter_model.safetensors")}


def logits(folder: Path) -> list[float]:
    with torch.no_grad():
        return some(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids()).logits)


if __name__ == "__main__":
    write(numbers)
