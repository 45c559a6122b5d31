"""optimum: `TasksManager.get_model_from_task`, what its exporters load a model with, on folders with an adapter beside the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _client import adapter, bert, ids, llama, saved, some, write

# isort: split

import torch
from optimum.exporters.tasks import TasksManager

from peft import LoraConfig

MODELS = {
    "text-generation": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True}),
    "text-classification": (bert, {"target_modules": ["query", "value"]}),
}


def numbers(room: Path) -> dict[str, Any]:
    found = {}
    for task, (make, settings) in MODELS.items():
        place = room / task
        found[f"{task}, bare"] = answer(task, saved(make(), place))
        adapter(make(), LoraConfig(r=4, lora_alpha=16, **settings), place, base=str(place))
        found[task] = answer(task, str(place))
    return found


def answer(task: str, folder: str) -> list[float]:
    model = TasksManager.get_model_from_task(task, folder, framework="pt", library_name="transformers", torch_dtype=torch.float32)
    with torch.no_grad():
        return some(model.eval()(input_ids=ids()).logits)


if __name__ == "__main__":
    write(numbers)
