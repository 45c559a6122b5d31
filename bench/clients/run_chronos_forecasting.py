"""chronos-forecasting: `Chronos2Pipeline.fit(finetune_mode="lora")`, its forecasts, and `from_pretrained` of the folder that it saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _client import some, weights, write

# isort: split

import torch
from chronos.chronos2 import Chronos2Model, Chronos2Pipeline
from chronos.chronos2.config import Chronos2CoreConfig
from transformers import TrainerCallback


class Losses(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.found += [logs["loss"]] if "loss" in logs else []


def numbers(room: Path) -> dict[str, Any]:
    base(room / "base")
    pipeline = Chronos2Pipeline.from_pretrained(room / "base")
    series = [torch.sin(torch.arange(96) / (3 + index)) + 0.1 * index for index in range(6)]
    losses = Losses()
    training = {"num_steps": 8, "batch_size": 4, "learning_rate": 1e-2, "callbacks": [losses], "logging_steps": 1, "seed": 3}
    adapted = pipeline.fit(series, prediction_length=8, finetune_mode="lora", output_dir=room / "out", **training)
    loaded = Chronos2Pipeline.from_pretrained(room / "out" / "finetuned-ckpt")
    found = {"losses": losses.found, "file": weights(room / "out" / "finetuned-ckpt" / "adapter_model.safetensors")}
    for name, model in (("base", pipeline), ("adapted", adapted), ("loaded", loaded)):
        found[f"forecasts, {name}"] = some(torch.stack(model.predict(series, prediction_length=8)), 40)
    return found


def base(folder: Path) -> None:
    torch.manual_seed(0)
    forecasting = {
        "context_length": 64, "input_patch_size": 8, "input_patch_stride": 8, "output_patch_size": 8,
        "quantiles": [tenth / 10 for tenth in range(1, 10)],
        "use_reg_token": True, "use_arcsinh": True, "max_output_patches": 2,
    }  # fmt: skip
    config = Chronos2CoreConfig(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, chronos_config=forecasting)
    config.architectures = ["Chronos2Model"]
    Chronos2Model(config).save_pretrained(folder)


if __name__ == "__main__":
    write(numbers)
